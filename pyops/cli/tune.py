"""`python -m fastops tune`: measure every configuration on this GPU and keep the winners."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import _extension
from .._registry import Op, TuningCase, registry, triton_missing
from ..triton_ops import _tuned
from ._terminal import progress, say, show_table

# A configuration replaces the default only if it is at least this much faster: less is noise.
MIN_GAIN = 0.01

Candidate = tuple[dict[str, Any], Callable[[], Any]]  # a configuration and a call that runs under it


def tune(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to tune; all that have configurations when left out.")
    ] = None,
    ship: Annotated[
        bool, typer.Option("--ship", help="Write to triton_ops/tuned of this checkout instead of the cache folder.")
    ] = False,
) -> None:
    """Measure the Triton and CUDA configurations of each op on this GPU and keep the fastest.

    The default configuration takes part in every race, so a tuned one is never slower than it. Results are JSON under
    $FASTOPS_CACHE_DIR (~/.cache/fastops), read at the next start; nothing is ever searched while an op runs.
    """
    if not torch.cuda.is_available():
        say("tune: needs a CUDA device, found none; the CPU kernels have nothing to tune")
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = _tuned.gpu_slug(device.index)
    unknown = sorted(set(ops or []) - set(registry))
    if unknown:
        say(f"tune: unknown ops {', '.join(unknown)}; there are {', '.join(sorted(registry))}")
        raise typer.Exit(2)
    folder = (_tuned.SHIPPED if ship else _tuned.local_folder()) / gpu
    for name in ops or sorted(registry):
        op = registry[name]
        if op.tuning is None:
            continue
        entries = tune_op(op, device)
        path = write(folder, name, gpu, entries)
        _tuned.table.cache_clear()
        _tuned.lookup.cache_clear()
        op.load_tuned()
        show(name, gpu, entries)
        say(f"written: {path}")


def tune_op(op: Op, device: torch.device) -> list[dict[str, Any]]:
    """One table entry for each case and backend."""
    assert op.tuning is not None
    entries = []
    with progress() as bar:
        task = bar.add_task(f"tuning {op.name}", total=None)
        for case in op.tuning(device):
            for backend, candidates in _races(op, case):
                entries.append(_winner(backend, case, candidates))
            bar.advance(task)
    return entries


def _races(op: Op, case: TuningCase) -> Iterator[tuple[str, list[Candidate]]]:
    """(backend, candidates with the default first) for each backend that has a choice."""
    if not triton_missing() and op._triton is not None:
        default, launch = op.triton_member("DEFAULT"), op.triton_member("launch")
        space = [default, *(c for c in op.triton_member("SPACE") if c != default)]
        yield "triton", [(c, functools.partial(launch, *case.args, **case.kwargs, config=c)) for c in space]
    if op.cuda_configs and _extension.HAS_CUDA_KERNELS:
        indices = [{"index": i} for i in range(op.cuda_configs)]  # the first one is the default
        yield "cuda", [(c, _cuda_call(op, case, c)) for c in indices]


def _cuda_call(op: Op, case: TuningCase, config: dict[str, Any]) -> Callable[[], Any]:
    """The compiled kernel under one configuration, forced through the table that it looks up."""
    assert op.cuda_key is not None
    row = f"{op.cuda_key(case.key)} {case.size} {config['index']}"
    gpu = _tuned.gpu_slug(case.args[0].device.index)

    def call() -> Any:
        return op("cuda", *case.args, **case.kwargs)

    call.prepare = lambda: _extension.C.set_tuned(op.name, gpu, row)  # type: ignore[attr-defined,union-attr]
    return call


def _winner(backend: str, case: TuningCase, candidates: list[Candidate]) -> dict[str, Any]:
    """Race the candidates twice, in both orders, and keep each one's better time."""
    best: dict[int, float] = {}
    for i in [*range(len(candidates)), *reversed(range(len(candidates)))]:
        best[i] = min(best.get(i, float("inf")), _microseconds(candidates[i][1]))
    default_us = best[0]
    fastest = min(best, key=lambda i: best[i])
    if best[fastest] > default_us * (1 - MIN_GAIN):
        fastest = 0
    config = candidates[fastest][0]
    entry = {"backend": backend, "key": dict(case.key), "size": case.size, "config": config}
    return entry | {"us": round(best[fastest], 2), "default_us": round(default_us, 2)}


def _microseconds(call: Callable[[], Any]) -> float:
    """Median GPU time with a cold L2; of a graph, so that the host's part of a launch is no part of the race."""
    import triton.testing

    getattr(call, "prepare", lambda: None)()
    call()  # compiles what a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=3, rep=15, return_mode="median"))


def write(folder: Path, op: str, gpu: str, entries: list[dict[str, Any]]) -> Path:
    """Write a table whole or not at all."""
    versions = {"torch": torch.__version__}
    if not triton_missing():
        import triton

        versions["triton"] = triton.__version__
    lines = ",\n    ".join(json.dumps(e) for e in entries)
    head = json.dumps({"op": op, "gpu": gpu, "versions": versions})[:-1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(f'{head}, "entries": [\n    {lines}\n]}}\n')
    path = folder / f"{op}.json"
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def show(op: str, gpu: str, entries: list[dict[str, Any]]) -> None:
    """A table of what won."""
    rows = [
        [
            e["backend"],
            " ".join(f"{k}={v}" for k, v in e["key"].items()),
            str(e["size"]),
            " ".join(f"{k}={v}" for k, v in e["config"].items()),
            f"{e['us']:.1f}",
            f"{e['default_us'] / e['us']:.3f}x",
        ]
        for e in entries
    ]
    say(f"{op} on {gpu}")
    show_table(["backend", "key", "size", "configuration", "us", "over default"], rows, right={2, 4, 5})
