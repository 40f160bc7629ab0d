"""`python -m fastops verify`: every operator and backend against its reference, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

import fastops

from .. import _registry
from .._checks import FLOAT_DTYPES, dtype_name
from ..reference._truth import Sample, Truth, truth
from ..testing import on_copies
from ._terminal import progress, say, show_table

COLUMNS = ("op", "device", "backend", "dtype", "samples", "worst error", "budget", "result")
INTERPRETER_BF16 = "skipped: Triton's interpreter computes bfloat16 wrongly"


@dataclass(frozen=True)
class Case:
    """What is proved at once: an operator's samples on one device, backend and dtype."""

    op: str
    device: torch.device
    backend: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Verdict:
    """How a case went; `result` is "ok", or starts with FAILED or skipped."""

    samples: int
    worst: float
    budget: float
    result: str


def verify(
    ops: Annotated[list[str] | None, typer.Argument(help="Operators to verify; all when none is named.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device: cpu, cuda, cuda:1. Default: all here.")] = None,
) -> None:
    """Prove every operator and backend here against its reference.

    The error is a multiple of the best possible rounding error, except where the reference says otherwise; it must stay
    within the operator's budget. Exits with 1 if anything fails or crashes.
    """
    cases = list(find_cases(chosen_ops(ops), chosen_devices(device)))
    verdicts: list[tuple[Case, Verdict]] = []
    with progress() as bar:
        task = bar.add_task("verifying", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.op} {case.backend} on {case.device}")
            verdicts.append((case, prove(case)))
            bar.advance(task)
    shown = [(case, verdict) for case, verdict in verdicts if verdict.samples or verdict.result != "ok"]
    show_table(COLUMNS, [_row(case, verdict) for case, verdict in shown], right=(4, 5, 6))
    failed = sum(verdict.result.startswith("FAILED") for _, verdict in shown)
    say(f"{len(shown) - failed} of {len(shown)} cases passed or were skipped, {failed} failed")
    if failed or not shown:
        raise typer.Exit(1)


def chosen_ops(names: list[str] | None) -> list[str]:
    """The operators to look at, unknown names refused."""
    unknown = sorted(set(names or ()) - set(_registry.registry))
    if unknown:
        raise typer.BadParameter(f"op must be one of {', '.join(sorted(_registry.registry))}, got {', '.join(unknown)}")
    return names or sorted(_registry.registry)


def chosen_devices(name: str | None) -> list[torch.device]:
    """The devices to look at: the named one, or the CPU and the first GPU."""
    if name is None:
        return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"device must be like cpu, cuda or cuda:1, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"device must be here, got {name!r}: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return [device]


def find_cases(ops: list[str], devices: list[torch.device]) -> Iterator[Case]:
    """Every combination that can run here."""
    for op in ops:
        for device in devices:
            for backend in _registry.registry[op].available(device):
                for dtype in FLOAT_DTYPES:
                    yield Case(op, device, backend, dtype)


def prove(case: Case) -> Verdict:
    """Run a case's samples; the first failure ends it and is named."""
    reference = truth(case.op, _registry.registry[case.op].family)
    budget = float(reference.budget)
    if case.backend == "triton" and case.device.type == "cpu" and case.dtype == torch.bfloat16:
        return Verdict(0, 0.0, budget, INTERPRETER_BF16)
    worst, count = 0.0, 0
    for sample in reference.samples(case.device, case.dtype):
        count += 1
        try:
            error = _error(case, reference, sample)
        except Exception as exception:  # whatever goes wrong is this case's result, and the others still run
            return Verdict(count, float("inf"), budget, f"FAILED {sample.name}: {_first_line(exception)}")
        worst = max(worst, error)
        if not error <= budget:
            return Verdict(count, worst, budget, f"FAILED {sample.name}")
    return Verdict(count, worst, budget, "ok")


def _error(case: Case, reference: Truth, sample: Sample) -> float:
    got = on_copies(getattr(fastops, case.op), case.op, *sample.args, **sample.kwargs, backend=case.backend)
    return float(reference.error(got, *sample.args, **sample.kwargs))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _row(case: Case, verdict: Verdict) -> list[str]:
    ran = verdict.samples > 0
    return [
        case.op, str(case.device), case.backend, dtype_name(case.dtype), str(verdict.samples) if ran else "-",
        f"{verdict.worst:.3f}" if ran else "-", f"{verdict.budget:g}", verdict.result,
    ]  # fmt: skip
