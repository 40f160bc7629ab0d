"""`python -m fastops cadc fit ratings.csv`: compress interactions, train on the sample, and say what it cost."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..methods import cadc as method
from ._terminal import progress, say, show_table

app = typer.Typer(
    help="CADC: train a recommender on a tenth of its interactions.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _group() -> None:
    """CADC: train a recommender on a tenth of its interactions."""


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback that draws a bar."""
    with progress() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _timed(seconds: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = run()
    seconds[name] = time.perf_counter() - start
    return result


@app.command()
def fit(
    ratings: Annotated[Path, typer.Argument(help="Interactions: .csv, .tsv or .parquet.")],
    rate: Annotated[float, typer.Option(help="Share of the interactions to keep.")] = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="The artefact; RATINGS.cadc.safetensors beside it by default.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Column of users.", show_default=False)] = None,
    item: Annotated[str | None, typer.Option(help="Column of items.", show_default=False)] = None,
    timestamp: Annotated[str | None, typer.Option("--time", help="Column of times.", show_default=False)] = None,
    rating: Annotated[str | None, typer.Option(help="Column of ratings.", show_default=False)] = None,
    min_rating: Annotated[float | None, typer.Option(help="Only what is rated at least this.")] = None,
    duplicates: Annotated[str, typer.Option(help="Pairs that come twice: error or drop.")] = "error",
    user_content: Annotated[Path | None, typer.Option(help="A table of users, ids in its first column.")] = None,
    item_content: Annotated[Path | None, typer.Option(help="A table of items, ids in its first column.")] = None,
    factors: Annotated[int, typer.Option(help="Width of the embeddings.")] = method.MfSettings.factors,
    epochs: Annotated[int, typer.Option(help="Of the factorisation.")] = method.MfSettings.epochs,
    tower_epochs: Annotated[int, typer.Option(help="Of the two towers.")] = method.TowerSettings.epochs,
    strategy: Annotated[str, typer.Option(help="init-freeze, init-finetune or random.")] = "init-freeze",
    compare: Annotated[bool, typer.Option("--compare", help="Also train on the sample without CADC.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A PNG of the ranking metrics (needs matplotlib).")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compress interactions, train the two towers on the sample, evaluate on each user's last interaction.

    The last interaction of each user is held out from everything; HR@10 and NDCG@10 rank it among 99 sampled items and
    among all. Writes the artefact (sampled pairs and embeddings, safetensors), which any trainer can load.
    """
    try:
        _fit(**locals())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        say(f"fastops cadc: {error}")
        raise typer.Exit(2) from error


def _fit(
    ratings: Path, rate: float, out: Path | None, user: str | None, item: str | None, timestamp: str | None,
    rating: str | None, min_rating: float | None, duplicates: str, user_content: Path | None,
    item_content: Path | None, factors: int, epochs: int, tower_epochs: int, strategy: str, compare: bool,
    plot: Path | None, seed: int, device: str,
) -> None:  # fmt: skip
    """The command, whose errors are exceptions."""
    if strategy not in method.STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(method.STRATEGIES)}, got {strategy!r}")
    compressor = method.Cadc(rate, factors=factors, epochs=epochs, seed=seed, device=device)
    found = method.load_interactions(
        ratings, user=user, item=item, time=timestamp, rating=rating, min_rating=min_rating, duplicates=duplicates
    )
    ids = ((user_content, found.user_ids), (item_content, found.item_ids))
    content = [None if path is None else method.load_content(path, names or []) for path, names in ids]
    split = method.leave_one_out(found)
    say(f"{ratings.name}: {found.n} interactions of {found.users} users with {found.items} items")
    say(f"held out for the test: the last of each of {len(split.test)} users")
    seconds: dict[str, float] = {}
    with _bar("factorising") as advance:
        small = _timed(seconds, "factorise", lambda: compressor.fit_transform(split.train, progress=advance))
    path = small.save(out or ratings.with_suffix(".cadc.safetensors"))
    share = f"{path.stat().st_size / 1e6:.1f} MB, {len(small.pairs)} of {split.train.n} pairs"
    say(f"wrote {path} ({share} and {factors} factors)")

    towers = method.TowerSettings(epochs=tower_epochs)
    models: dict[str, Any] = {"factorisation alone": small.factors}
    arms = {f"CADC {100 * rate:g} %, {strategy}": strategy}
    if compare:
        arms[f"plain {100 * rate:g} %"] = "random"
    for name, how in arms.items():
        with _bar(name) as advance:
            models[name] = _timed(
                seconds, name, lambda how=how, advance=advance: small.train(  # type: ignore[misc]
                    towers, strategy=how, user_content=content[0], item_content=content[1], device=device,
                    progress=advance,
                ),
            )  # fmt: skip
    rows = {name: _metrics(model, split, device) for name, model in models.items()}
    columns = ["model", *next(iter(rows.values())), "seconds"]
    shown = [
        [name, *(f"{v:.4f}" for v in each.values()), f"{seconds.get(name, seconds['factorise']):.1f}"]
        for name, each in rows.items()
    ]
    say()
    show_table(columns, shown, right=range(1, len(columns)))
    say(f"seconds of a model come after the factorisation's {seconds['factorise']:.1f}")
    if plot is not None:
        _draw(plot, rows)
        say(f"wrote {plot}")


def _metrics(model: Any, split: method.Split, device: str) -> dict[str, float]:
    """HR@10 and NDCG@10 of both rankings; fewer candidates where there are not 99 items to draw."""
    counts = torch.bincount(split.train.pairs[:, 0], minlength=split.train.users)
    most = min(99, split.train.items - int(counts.max()) - 1)
    found: dict[str, float] = {}
    for candidates, where in (((most, f"of {most + 1}"),) if most >= 10 else ()) + ((None, "of all"),):
        each = method.evaluate(model, split.test, split.train, candidates=candidates, device=device)
        found |= {f"HR@10 {where}": each["hr10"], f"NDCG@10 {where}": each["ndcg10"]}
    return found


def _draw(path: Path, rows: dict[str, dict[str, float]]) -> None:
    """Bars of each metric, a colour for each model."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install matplotlib", name="matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    metrics = list(next(iter(rows.values())))
    width = 0.8 / len(rows)
    for i, (name, each) in enumerate(rows.items()):
        bars = axes.bar([m + i * width for m in range(len(metrics))], list(each.values()), width, label=name)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axes.set_xticks([m + 0.4 - width / 2 for m in range(len(metrics))], metrics)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
