"""Plots of bench/results: the share of the floor by case, and for products the time by the number of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import harness
from .plots_methods import METHODS
from .records import Record

PEER_ORDER = ("bitsandbytes",)  # named first; the others follow by name
# Drawn as time by rows instead of bars: the op, and the one that is its single row.
BY_ROWS = {"nf4_linear": "nf4_gemv"}
FLOOR = "floor"
IN_CURVES = (FLOOR, "bitsandbytes", "cublas", "dequant+cublas", "torch")


def timing(r: Record) -> str:
    """How a record was timed."""
    return "graph" if r["graphed"] else "eager"


def peer_names(found: Iterable[Record]) -> list[str]:
    """Every peer of these records, the chief one first."""
    names = {name for r in found for name in r["peers"]}
    return sorted(names, key=lambda name: (name not in PEER_ORDER, name))


def draw(path: Path, op: str, device: str, results: dict[str, list[Record]]) -> bool:
    """Draw the op's records of a device into a PNG; False without matplotlib, or where there is nothing to draw."""
    found = results[op]
    if op in METHODS:
        return METHODS[op](path, device, found)
    if op in BY_ROWS:
        found = [*results.get(BY_ROWS[op], []), *found]
    found = [r for r in found if r["graphed"]] or found
    panels = curves(found) if op in BY_ROWS else {}
    if not panels and not any(map(bytes_of, found)):
        return False
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = f"{op} on {device}, {timing(found[0])}: "
    if panels:
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(1 + 3.3 * columns, 1 + 2.6 * rows), squeeze=False, layout="constrained"
        )
        _draw_curves(figure, list(grid.flat), panels)
        figure.suptitle(title + f"time by rows (M = 1: {BY_ROWS[op]})", fontsize=11)
    else:
        shares = floor_shares(found)
        names = list(dict.fromkeys(name for bars in shares.values() for name in bars))
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(shares) * (len(names) + 1)), layout="constrained")
        _draw_bars(axes, shares, names)
        axes.set_title(title + "share of the floor")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def bytes_of(r: Record) -> int | None:
    """What the record's case must move, where its bench page is still here and says so."""
    return harness.page(r["op"]).bytes_of(r) if r["op"] in harness.page_names() else None


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


def curves(found: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """{matrix and dtype: {backend, peer or floor: {rows: µs}}} of plain scales, where there are three rows to join."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for r in found:
        sizes = r["case"]
        if set(sizes) != {"M", "N", "K", "blocksize"}:
            continue
        lines = panels.setdefault(f"{sizes['N']} × {sizes['K']} {r['dtype']}", {})
        times = {FLOOR: r["floor_us"], **r["peers"], f"fastops {r['backend']}": r["us"]}
        for name, us in times.items():
            if name in IN_CURVES or name.startswith("fastops"):
                lines.setdefault(name, {})[sizes["M"]] = us
    return {title: lines for title, lines in panels.items() if len(lines[FLOOR]) > 2}


def _draw_curves(figure: Any, grid: Sequence[Any], panels: dict[str, dict[str, dict[int, float]]]) -> None:
    """A panel a matrix, both axes logarithmic; a line keeps its colour in all of them."""
    from matplotlib.ticker import LogFormatter

    names = sorted({name for lines in panels.values() for name in lines}, key=_line_order)
    colours = {name: f"C{i}" for i, name in enumerate(n for n in names if n != FLOOR)} | {FLOOR: "black"}
    handles = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for name in (n for n in names if n in lines):
            points = sorted(lines[name].items())
            handles[name] = axes.plot(
                [m for m, _ in points], [us for _, us in points], label=name, color=colours[name], linewidth=1.2,
                linestyle="--" if name == FLOOR else "-", marker="" if name == FLOOR else ".",
            )[0]  # fmt: skip
        rows = sorted(lines[FLOOR])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(rows, [str(m) for m in rows], fontsize=7)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.3, 0.5)))
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(alpha=0.3)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("rows M", fontsize=8)
        axes.set_ylabel("µs", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.legend(handles=[handles[n] for n in names], fontsize=8, loc="outside lower center", ncols=len(names))


def _line_order(name: str) -> tuple[bool, int, str]:
    """Ours, the floor, the peers."""
    return not name.startswith("fastops"), IN_CURVES.index(name) if name in IN_CURVES else 0, name


def _draw_bars(axes: Any, shares: dict[str, dict[str, float]], names: Sequence[str]) -> None:
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
