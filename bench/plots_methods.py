"""Plots of methods whose results are more than shares of a floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .records import Record

Draw = Callable[[Path, str, Sequence[Record]], bool]  # False without matplotlib, or where there is nothing to draw


def _pyplot() -> Any:
    """matplotlib's, without a screen; None where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> bool:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
    return True


def cadc(path: Path, device: str, found: Sequence[Record]) -> bool:
    """HR@10 among 100 and among all, by the share of interactions that the towers were trained on."""
    arms = [r for r in found if "rate" in r["case"] and r["case"]["strategy"] != "init-finetune"]
    pyplot = _pyplot()
    if not arms or pyplot is None:
        return False
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, metric, title in zip(panels, ("hr10", "hr10_all"), ("among 100", "among all items"), strict=True):
        for i, name in enumerate(("cadc", "plain", "full")):
            points = sorted((r["case"]["rate"], r["figures"]) for r in arms if r["case"]["arm"] == name)
            shares, values = [100 * rate for rate, _ in points], [f[metric] for _, f in points]
            errors = [f[f"{metric}_ci"] for _, f in points]
            axes.errorbar(shares, values, errors, marker="o", capsize=3, color=f"C{i}", label=name)
            if name == "full" and values:
                axes.axhspan(0.97 * values[0], 1.03 * values[0], color=f"C{i}", alpha=0.12, label="full ± 3 %")
        axes.set_xscale("log")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_xlabel("% of the interactions")
        axes.set_ylabel(f"HR@10 {title}")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"CADC on {found[0]['case']['model']}, {device}: mean of the seeds, 95 % intervals", fontsize=11)
    return _save(figure, path)


def bmc(path: Path, device: str, found: Sequence[Record]) -> bool:
    """Milliseconds a token by r, a panel a shape; the model's curve beside the padded setting's points."""
    shapes = list(dict.fromkeys(_shape(r) for r in found))
    pyplot = _pyplot()
    if not shapes or pyplot is None:
        return False
    figure, panels = pyplot.subplots(
        1, len(shapes), figsize=(4.6 * len(shapes), 3.6), squeeze=False, layout="constrained"
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        here = [r for r in found if _shape(r) == shape]
        new = shape[3]
        for i, setting in enumerate(dict.fromkeys(r["case"]["setting"] for r in here)):
            points = sorted(
                (new if r["case"]["r"] == "all" else r["case"]["r"], r["figures"])
                for r in here
                if r["case"]["setting"] == setting and r["case"]["r"] != "auto"
            )
            rows, ms = [r for r, _ in points], [f["ms_per_token"] for _, f in points]
            axes.plot(rows, ms, "o-" if setting != "padded" else "o", color=f"C{i}", label=setting, markersize=4)
            if setting == "padded":
                base = statistics.median(f["ms_per_token"] - f["overhead_ms"] for _, f in points)
                axes.plot(
                    rows,
                    [base + f["overhead_ms"] for _, f in points],
                    "--",
                    color=f"C{i}",
                    label="padded, by the model",
                )
            for r in here:
                if r["case"]["setting"] == setting and r["case"]["r"] == "auto":
                    at = r["figures"]["r_model"], r["figures"]["ms_per_token"]
                    axes.plot(*at, "*", color=f"C{i}", markersize=11, markeredgecolor="black", markeredgewidth=0.5)
        theirs = {name: us / 1e3 for r in here for name, us in r["peers"].items()}
        for name, style in (("hf_dynamic", "--"), ("hf_static", ":")):
            if name in theirs:
                axes.axhline(theirs[name], color="black", linestyle=style, linewidth=1, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"batch {shape[1]}, {shape[2]} tokens and {new} new", fontsize=9)
        axes.set_xlabel("r (rows; the last: all at once; star: auto)", fontsize=8)
        axes.set_ylabel("ms a token", fontsize=8)
        axes.legend(fontsize=7)
    figure.suptitle(f"BMC on {found[0]['case']['model']}, {device}", fontsize=11)
    return _save(figure, path)


def _shape(r: Record) -> tuple[Any, ...]:
    return tuple(r["case"][name] for name in ("model", "batch", "context", "new"))


METHODS: dict[str, Draw] = {"bmc": bmc, "cadc": cadc}
