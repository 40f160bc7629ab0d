"""Tables and plots of bench/results, and which of the results are older than their kernels.

`tables` is the one source of what is shown: the terminal, docs/results.md and the README take their rows from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import harness, records
from .records import Record

DOCS = records.ROOT / "docs"
PEER_ORDER = ("bitsandbytes",)  # named first; the others follow by name


def lines(outcome: harness.Outcome) -> list[str]:
    """A line for each way of timing: `N=4096 … graph | cuda 19.8 µs, 71.0 % of floor, error 0.99 | torch 91 µs`."""
    shown = []
    for how in ("eager", "graph"):
        found = [r for r in outcome.records if timing(r) == how]
        if not found:
            continue
        ours = [
            f"{r['backend']} {digits(r['us'])} µs, {100 * r['floor_share']:.1f} % of floor, error {r['error_ratio']:g}"
            for r in found
        ]
        theirs = [f"{name} {digits(us)} µs" for name, us in found[0]["peers"].items()]
        shown.append(" | ".join([f"{outcome.case} {how}", *ours, *theirs]))
    return shown


@dataclass(frozen=True)
class Table:
    """One op on one device."""

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
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, *self.rows)]
        rule = "|" + "".join(" --- |" if i < 3 else " ---: |" for i in range(len(self.columns)))
        return "\n".join([f"## {self.title}", "", self.note, "", lines[0], rule, *lines[1:]])


def tables(ops: Sequence[str] | None = None) -> list[Table]:
    """A table for each device and op that has results."""
    return [
        _table(op, device, found)
        for device, by_op in records.all_results().items()
        for op, found in by_op.items()
        if found and (not ops or op in ops)
    ]


def _table(op: str, device: str, found: Sequence[Record]) -> Table:
    peers = peer_names(found)
    columns = ("case", "backend", "timing", "µs", "% of floor", "GB/s", *(f"× {p}" for p in peers), "error")
    return Table(op, device, columns, [_row(r, peers) for r in found], _note(found))


def peer_names(found: Iterable[Record]) -> list[str]:
    """Every peer of these records, the chief one first."""
    names = {name for r in found for name in r["peers"]}
    return sorted(names, key=lambda name: (name not in PEER_ORDER, name))


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


def timing(r: Record) -> str:
    """How a record was timed."""
    return "graph" if r["graphed"] else "eager"


def _gbps(r: Record) -> str:
    moved = _bytes(r)
    return digits(moved / r["us"] / 1e3) if moved else "–"


def _bytes(r: Record) -> int | None:
    """What the record's case must move, where its bench page is still here and says so."""
    return harness.page(r["op"]).bytes_of(r) if r["op"] in harness.page_names() else None


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
    drawn = [_plot(t.op, t.device) for t in tables(ops)]
    page = DOCS / "results.md"
    page.write_text("\n\n".join([_HEADER, *map(_section, tables())]) + "\n")
    readme = records.ROOT / "README.md"
    readme.write_text(_README_BLOCK.sub(lambda match: match[1] + readme_tables() + match[2], readme.read_text()))
    return [*(p for p in drawn if p), page, readme]


_README_BLOCK = re.compile(r"(<!-- begin: results -->\n).*?(<!-- end: results -->)", re.DOTALL)


def readme_tables() -> str:
    """A short table a device and op: bf16 at the usual blocksize, each way of timing beside bitsandbytes."""
    parts = []
    for device, by_op in sorted(records.all_results().items(), reverse=True):
        for op, found in by_op.items():
            usual = [r for r in found if r["dtype"] == "bfloat16" and r["case"].get("blocksize") == 64]
            if usual:
                parts += [f"**{op} on {device}**, bf16, blocksize 64. {_note(usual)}", "", *_short_rows(usual), ""]
    return "\n".join(parts)


def _short_rows(found: Sequence[Record]) -> list[str]:
    columns = ["matrix", "backend", "timing", "µs", "% of floor", "bitsandbytes µs", "×"]
    rows = [
        [
            f"{r['case']['N']} × {r['case']['K']}{', double quant.' if r['case'].get('double_quant') else ''}",
            r["backend"],
            timing(r),
            digits(r["us"]),
            f"{100 * r['floor_share']:.1f}",
            digits(theirs) if (theirs := r["peers"].get("bitsandbytes")) else "–",
            f"{theirs / r['us']:.2f}" if theirs else "–",
        ]
        for r in found
    ]
    rule = "| " + " | ".join("---" if i < 3 else "---:" for i in range(len(columns))) + " |"
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return [lines[0], rule, *lines[1:]]


_HEADER = """# Results

Generated by `python -m fastops bench --report` from `bench/results`; the plots show the share of the floor that we and
each peer reach. The floor of a case is the longer of its bytes over the copy bandwidth and its flops over the matrix
peak, both measured in the same run (`bench/peaks`). Caches are cold: `graph` is the median inside a CUDA graph over
rotating inputs, `eager` that of single calls. On a CPU, whose cores others may share, it is the lower quartile, and the
peaks are the best seen; it may pass 100 %, because its cache holds part of an output back until after the clock stops.
`× peer` is the peer's time over ours. `error` is the largest error of an element as a multiple of the best possible
rounding error (for `nf4_quantize`, how many codes are not exactly right)."""


def _section(table: Table) -> str:
    image = f"{table.op}_{table.device}.png"
    picture = [f"![share of the floor: {table.title}]({image})"] if (DOCS / image).exists() else []
    return "\n\n".join([table.markdown(), *picture])


def _plot(op: str, device: str) -> Path | None:
    """Share of the floor by case, a bar for each backend and peer; None without matplotlib, or where no bytes move."""
    found = records.load(device, op)
    found = [r for r in found if r["graphed"]] or found
    if not any(map(_bytes, found)):
        return None
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = floor_shares(found)
    names = list(dict.fromkeys(name for bars in shares.values() for name in bars))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(shares) * (len(names) + 1)), layout="constrained")
    _draw(axes, shares, names)
    axes.set_title(f"{op} on {device}, {timing(found[0])}: share of the floor")
    path = DOCS / f"{op}_{device}.png"
    DOCS.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def floor_shares(found: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{case: {backend or peer: its share of the floor}}."""
    shares: dict[str, dict[str, float]] = {}
    for r in found:
        bars = shares.setdefault(harness.case_label(r), {})
        bars[f"fastops {r['backend']}"] = r["floor_share"]
    for r in found:
        for peer in peer_names([r]):
            shares[harness.case_label(r)].setdefault(peer, r["floor_us"] / r["peers"][peer])
    return shares


def _draw(axes: Any, shares: dict[str, dict[str, float]], names: Sequence[str]) -> None:
    """Horizontal bars in groups, the first case on top."""
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        have = [(row, bars[name]) for row, bars in enumerate(shares.values()) if name in bars]
        offset = (i - (len(names) - 1) / 2) * height
        bars = axes.barh([row + offset for row, _ in have], [share for _, share in have], height, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, *(share for bars in shares.values() for share in bars.values())) * 1.06)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("floor / time (1 = as fast as the device can)")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=len(names))
