"""Tables and plots of bench/results, and which of the results are older than their kernels.

`tables` is the one source of what is shown: the terminal, docs/results.md and the README take their rows from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import harness, plots, records
from .plots import bytes_of, peer_names, timing
from .records import Record

DOCS = records.ROOT / "docs"


def lines(outcome: harness.Outcome) -> list[str]:
    """A line for each way of timing: `N=4096 … graph | cuda 19.8 µs, 71.0 % of floor, error 0.99 | torch 91 µs`.

    A method's: `model=… batch=8 … eager | cuda ms_per_token 21.3, …`.
    """
    shown = []
    for how in ("eager", "graph"):
        found = [r for r in outcome.records if timing(r) == how]
        if not found:
            continue
        ours = [f"{r['backend']} {_said(r)}" for r in found]
        theirs = [f"{name} {digits(us)} µs" for name, us in found[0]["peers"].items() if "figures" not in found[0]]
        shown.append(" | ".join([f"{outcome.case} {how}", *ours, *theirs]))
    return shown


def _said(r: Record) -> str:
    """What was found of one backend."""
    if "figures" in r:
        return ", ".join(f"{name} {digits(value)}" for name, value in r["figures"].items())
    return f"{digits(r['us'])} µs, {100 * r['floor_share']:.1f} % of floor, error {r['error_ratio']:g}"


@dataclass(frozen=True)
class Table:
    """One op or method on one device."""

    op: str
    device: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str

    @property
    def title(self) -> str:
        """`nf4_dequant on h100`."""
        return f"{self.op} on {self.device}"

    def markdown(self) -> str:
        """A heading, the versions, the table."""
        return "\n".join([f"## {self.title}", "", self.note, "", *_lines(self.columns, self.rows, left=3)])


def tables(ops: Sequence[str] | None = None) -> list[Table]:
    """A table for each device and op that has results."""
    return [
        _table(op, device, found)
        for device, by_op in records.all_results().items()
        for op, found in by_op.items()
        if found and (not ops or op in ops)
    ]


def _table(op: str, device: str, found: Sequence[Record]) -> Table:
    if "figures" in found[0]:
        return _method_table(op, device, found)
    peers = peer_names(found)
    columns = ("case", "backend", "timing", "µs", "% of floor", "GB/s", *(f"× {p}" for p in peers), "error")
    return Table(op, device, columns, [_row(r, peers) for r in found], _note(found))


def _method_table(method: str, device: str, found: Sequence[Record]) -> Table:
    """A column for each figure that some case has."""
    names = list(dict.fromkeys(name for r in found for name in r["figures"]))
    rows = [
        (
            harness.case_label(r),
            r["backend"],
            timing(r),
            f"{100 * r['floor_share']:.1f}",
            *(digits(r["figures"][name]) if name in r["figures"] else "–" for name in names),
        )
        for r in found
    ]
    columns = ("case", "backend", "timing", "% of floor", *(name.replace("_", " ") for name in names))
    return Table(method, device, columns, rows, _note(found))


def _row(r: Record, peers: Sequence[str]) -> tuple[str, ...]:
    times = [f"{r['peers'][p] / r['us']:.2f}" if p in r["peers"] else "–" for p in peers]
    share = f"{100 * r['floor_share']:.1f}"
    return (
        harness.case_label(r),
        r["backend"],
        timing(r),
        digits(r["us"]),
        share,
        _gbps(r),
        *times,
        f"{r['error_ratio']:g}",
    )


def digits(value: float) -> str:
    """Four significant digits, or every digit before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _gbps(r: Record) -> str:
    moved = bytes_of(r)
    return digits(moved / r["us"] / 1e3) if moved else "–"


def _note(found: Sequence[Record]) -> str:
    """Device, versions, dates and commits, each as often as it varies."""
    parts = []
    for name in ("torch", "triton", "cuda", "driver", "threads", "date", "commit"):
        values = sorted({str(r[name])[:10] if name == "commit" else str(r[name]) for r in found if r.get(name)})
        if values:
            parts.append(f"{name} {', '.join(values)}")
    return "; ".join(parts) + "."


def stale(ops: Sequence[str] | None = None) -> list[tuple[str, Record]]:
    """(device, record) of every result whose kernel has changed since, or has no bench any more."""
    known = harness.page_names()

    @functools.cache
    def now(op: str, backend: str) -> str | None:
        return records.kernel_hash(harness.page(op).sources(backend)) if op in known else None

    return [
        (device, r)
        for device, by_op in records.all_results().items()
        for op, found in by_op.items()
        if not ops or op in ops
        for r in found
        if r["kernel_hash"] != now(op, r["backend"])
    ]


def write_docs(ops: Sequence[str] | None = None) -> list[Path]:
    """Plots of `ops`, docs/results.md with every table, the README's tables; returns what was written."""
    results = records.all_results()
    drawn = [
        path
        for t in tables(ops)
        if plots.draw(path := DOCS / f"{t.op}_{t.device}.png", t.op, t.device, results[t.device])
    ]
    page = DOCS / "results.md"
    page.write_text("\n\n".join([_HEADER, *map(_section, tables())]) + "\n")
    readme = records.ROOT / "README.md"
    _fill(readme, "results", short_tables(README_TABLES))
    methods = {DOCS / f"{method}.md": (method, short_tables(ops)) for method, ops in METHOD_OPS.items()}
    for path, (method, text) in methods.items():
        _fill(path, method, text)
    return [*drawn, page, readme, *methods]


# What the README shows; methods have pages of their own.
README_TABLES = ("decoder", "nf4_linear", "nf4_dequant", "nf4_quantize")

# Whose tables the page of a method shows, its own among them.
METHOD_OPS = {
    "bmc": ("bmc",),
    "cadc": ("cadc",),
    "decoder": ("decoder",),
    "kvpr": ("kv_recompute", "kvpr"),
    "marche": ("marche",),
    "nf4": ("nf4_linear", "nf4_linear_dx", "nf4"),
}


def _fill(path: Path, block: str, text: str) -> None:
    """Replace what stands between the marks of a block."""
    pattern = rf"(<!-- begin: {block} -->\n).*?(<!-- end: {block} -->)"
    path.write_text(re.sub(pattern, lambda match: match[1] + text + match[2], path.read_text(), flags=re.DOTALL))


def short_tables(ops: Sequence[str] | None = None) -> str:
    """A short table a device and op, of `ops` or of all: bf16, the usual blocksize; and what whole models gave."""
    parts = []
    for device, by_op in sorted(records.all_results().items(), reverse=True):
        for op, found in by_op.items():
            if ops is None or op in ops:
                parts += _short_table(op, device, found, by_op)
    return "\n".join(parts)


def _short_table(op: str, device: str, found: Sequence[Record], by_op: Mapping[str, Sequence[Record]]) -> list[str]:
    """Its lines; none where another table holds them, or there is nothing usual."""
    if found and "figures" in found[0]:
        table = _table(op, device, found)
        return [f"**{op} on {device}**, whole models. {table.note}", "", *table.markdown().splitlines()[4:], ""]
    usual = [r for r in found if r["dtype"] == "bfloat16" and r["case"].get("blocksize") == 64]
    if not usual or (op in plots.BY_ROWS.values() and set(plots.BY_ROWS) & set(by_op)):
        return []
    if "M" not in usual[0]["case"]:
        return [f"**{op} on {device}**, bf16, blocksize 64. {_note(usual)}", "", *_short_rows(usual), ""]
    single = plots.BY_ROWS.get(op)
    usual = [r for r in by_op.get(single or "", []) if r["dtype"] == "bfloat16"] + usual
    graphed = [r for r in usual if r["graphed"]]
    title = f"**{op} on {device}**{f' (M = 1: {single})' if single else ''}, bf16, blocksize 64"
    what = f"{timing((graphed or usual)[0])}: µs of the fastest backend (times faster than bitsandbytes, than dense)"
    return [f"{title}, {what}. {_note(usual)}", "", *_by_rows(graphed or usual), ""]


def _by_rows(found: Sequence[Record]) -> list[str]:
    """A row a matrix, a column a number of rows."""
    cells: dict[str, dict[int, Record]] = {}
    for r in found:
        row = cells.setdefault(_matrix(r), {})
        m = r["case"]["M"]
        if m not in row or r["us"] < row[m]["us"]:
            row[m] = r
    rows = sorted({m for row in cells.values() for m in row})
    body = [[matrix, *(_cell(row[m]) if m in row else "–" for m in rows)] for matrix, row in cells.items()]
    return _lines(["matrix", *(f"M = {m}" for m in rows)], body, left=1)


def _cell(r: Record) -> str:
    """`48.2 (2.21, 3.71)`."""
    dense = r["peers"].get("cublas", r["peers"].get("torch"))
    times = [f"{us / r['us']:.2f}" if us else "–" for us in (r["peers"].get("bitsandbytes"), dense)]
    return f"{digits(r['us'])} ({', '.join(times)})"


def _matrix(r: Record) -> str:
    return f"{r['case']['N']} × {r['case']['K']}{', double quant.' if r['case'].get('double_quant') else ''}"


def _short_rows(found: Sequence[Record]) -> list[str]:
    """Each way of timing beside bitsandbytes."""
    columns = ["matrix", "backend", "timing", "µs", "% of floor", "bitsandbytes µs", "×"]
    rows = [
        [
            _matrix(r),
            r["backend"],
            timing(r),
            digits(r["us"]),
            f"{100 * r['floor_share']:.1f}",
            digits(theirs) if (theirs := r["peers"].get("bitsandbytes")) else "–",
            f"{theirs / r['us']:.2f}" if theirs else "–",
        ]
        for r in found
    ]
    return _lines(columns, rows, left=3)


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table in markdown, the first `left` columns flush left."""
    rule = "| " + " | ".join("---" if i < left else "---:" for i in range(len(columns))) + " |"
    head, *body = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return [head, rule, *body]


_HEADER = """# Results

Generated by `python -m fastops bench --report` from `bench/results`; the plots show the share of the floor that we and
each peer reach. The floor of a case is the longer of its bytes over the copy bandwidth and its flops over the matrix
peak, both measured in the same run (`bench/peaks`). Caches are cold: `graph` is the median inside a CUDA graph over
rotating inputs, `eager` that of single calls. On a CPU, whose cores others may share, it is the lower quartile, and the
peaks are the best seen; it may pass 100 %, because its cache holds part of an output back until after the clock stops.
`× peer` is the peer's time over ours. `error` is the largest error of an element as a multiple of the best possible
rounding error (for `nf4_quantize`, how many codes are not exactly right). Products are plotted as time by the number
of rows. A method's table has its figures: `ms per token` is of a whole model, or of the part that the case names."""


def _section(table: Table) -> str:
    image = f"{table.op}_{table.device}.png"
    shown = "time by rows" if table.op in plots.BY_ROWS else "share of the floor"
    picture = [f"![{shown}: {table.title}]({image})"] if (DOCS / image).exists() else []
    return "\n\n".join([table.markdown(), *picture])
