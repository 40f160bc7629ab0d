"""`python -m fastops bench`: measure operators and methods against their floors and peers, and show the results.

The benches are not part of the package: they lie in the source checkout, beside the kernels they measure.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.progress import Progress

from ._terminal import console, say, show_table

PACKAGE = "fastops_bench"  # what bench/ is called once it is imported


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Which operators and methods; all of them when none is named.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure nothing: show the results, write docs/results.md and the plots.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Measure nothing: list results older than their kernels; exit 1 if any.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help='Only cases that have these words of their line: "M=8", "M=8 N=4096", "double_quant". Repeated: the '
            "cases of each.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the time, and nothing is written.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; the GPU where there is one.", show_default=False)
    ] = None,
) -> None:
    """Time operators with cold caches, beside their floor and their peers.

    The floor of a case is the longer of its bytes over the copy bandwidth and its flops over the matrix peak, both
    measured in the same run. On a GPU each case is timed eagerly and inside a CUDA graph. A kernel whose output is
    wrong is not timed, and the command exits with 1. A method is measured on whole models.

    Results go to bench/results/<device>/<op>.json or methods/<method>.json, floors to bench/peaks/<device>.json.
    """
    benches = _load_benches()
    known = benches.page_names()
    for op in ops or ():
        if op not in known:
            raise typer.BadParameter(f"op must be one of {', '.join(known)}, got {op!r}")
    try:
        where = benches.pick_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if report:
        _report(ops)
    failed = check and not _check(ops)
    if not report and not check:
        failed = not _measure(benches, ops or known, where, quick, only or [])
    if failed:
        raise typer.Exit(1)


def _load_benches() -> ModuleType:
    """bench/harness.py of the checkout that fastops is imported from, or of the current folder."""
    folders = [Path(__file__).resolve().parents[2] / "bench", Path.cwd() / "bench"]
    folder = next((f for f in folders if (f / "harness.py").is_file()), None)
    if folder is None:
        say(f"fastops bench: no bench/ in {folders[0].parent} or {folders[1].parent}.")
        say("The benches come with the source, not with the package: clone the repository and run this inside it.")
        raise typer.Exit(2)
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return _bench_module("harness")


def _bench_module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _measure(benches: ModuleType, ops: list[str], device: Any, quick: bool, only: list[str]) -> bool:
    """Run the pages of `ops`; whether everything was right."""
    pages = [benches.page(op) for op in ops]
    counts = {page.op: sum(benches.matches(case, only) for case in page.cases_on(device)) for page in pages}
    for op in (op for op, count in counts.items() if not count):
        say(f"{op}: no case for {device.type}{' with ' if only else ''}{' or '.join(only)}, see --device and --only")
    if not any(counts.values()):
        return not only
    session = _start(benches, device, quick)
    outcomes: list[tuple[str, Any]] = []
    # On the console that `say` prints to, so that lines appear above the bar.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("bench", total=sum(counts.values()))
        for page, outcome in benches.run(pages, session, keep=not quick, only=only):
            for line in _bench_module("report").lines(outcome):
                say(f"{page.op} {line}")
            outcomes.append((page.op, outcome))
            bar.update(task, advance=1, description=page.op)
    absent = {f"{op}: {name} absent: {why}" for op, outcome in outcomes for name, why in outcome.absent.items()}
    failures = [f"FAILED {op} {outcome.case} {why}" for op, outcome in outcomes for why in outcome.failures]
    for line in [*sorted(absent), *failures]:
        say(line)
    return not failures


def _start(benches: ModuleType, device: Any, quick: bool) -> Any:
    """A session on this device, its floors measured and shown."""
    timing, records = _bench_module("timing"), _bench_module("records")
    say("measuring the floors …")
    session = benches.Session.start(device, timing.QUICK if quick else timing.FULL)
    peaks = dataclasses.asdict(session.peaks)
    say(f"{records.full_name(session.device)}: {', '.join(f'{name} {value:g}' for name, value in peaks.items())}")
    return session


def _report(ops: list[str] | None) -> None:
    """Tables to stdout, plots and docs/results.md to docs/."""
    report = _bench_module("report")
    for table in report.tables(ops):
        if console.is_terminal:
            say(f"\n{table.title}: {table.note}")
            show_table(table.columns, table.rows, right=range(3, len(table.columns)))
        else:
            say(table.markdown() + "\n")
    for path in report.write_docs(ops):
        say(f"wrote {path}")
    if importlib.util.find_spec("matplotlib") is None:
        say("no plots: matplotlib is not installed (pip install 'fastops[bench]')")


def _check(ops: list[str] | None) -> bool:
    """List stale results; whether there are none."""
    stale = _bench_module("report").stale(ops)
    counts: dict[str, int] = {}
    for device, record in stale:
        line = (
            f"{device}/{record['op']}.json: {record['backend']}, measured {record['date']} at {record['commit'][:10]}"
        )
        counts[line] = counts.get(line, 0) + 1
    for line, count in counts.items():
        say(f"{line}: {count} results older than their kernel")
    if not stale:
        say("all results are of the kernels as they are now")
    return not stale
