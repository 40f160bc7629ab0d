"""How many spare rows a growing KV cache should have: the model of copies against padding.

A text has a prompt of P rows and N new ones, `accepted` of them a step of which each writes `width`. The cache starts
with P + r rows and grows by r whenever they are full, which copies what it holds. All times are seconds of all layers
together. Source: arXiv:2511.12031, of which the abstract was at hand; the formulas are derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHARE = 0.01  # of the time: what length-aware attention may lose to copies
TILE = 16  # rows; spare ones are a multiple of it where they are more


@dataclass(frozen=True)
class Costs:
    """What growing and padding cost a cache, in seconds.

    Args:
        growth: of growing once, however few rows there are.
        row_copied: and for each row that is moved to the new memory.
        row_padded: of a step's attention to one row that holds nothing.
    """

    growth: float
    row_copied: float
    row_padded: float

    def __post_init__(self) -> None:
        for name in ("growth", "row_copied", "row_padded"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"bmc: {name} must be 0 seconds or more, got {getattr(self, name)}")


def overhead(
    costs: Costs, r: int, prompt: int, new: int, width: int = 1, accepted: float = 1.0, limit: int | None = None
) -> float:
    """Seconds that a text spends in copies and in padding: the schedule played through, not a formula.

    Args:
        costs: of this device and model.
        r: rows that the cache grows by.
        prompt, new: rows of the prompt, and new ones.
        width: rows that a step writes.
        accepted: of them, how many stay.
        limit: rows that the cache never exceeds; prompt + new when None.

    Raises:
        ValueError: r < width, or a count that is negative.
    """
    _check(r, prompt, new, width, accepted)
    most = prompt + new + width - 1 if limit is None else limit
    capacity, held, seconds = min(prompt + r, most), float(prompt), 0.0
    while held < prompt + new:
        if held + width > capacity:
            seconds += costs.growth + costs.row_copied * held
            capacity = max(min(int(held) + r, most), int(held) + width)
        seconds += costs.row_padded * max(0.0, capacity - held - width)
        held += accepted
    return seconds


def best_r(costs: Costs, prompt: int, new: int, width: int = 1, accepted: float = 1.0) -> int:
    """The r where copies and padding balance, for attention that runs over the whole capacity.

    r* = sqrt(q^2 + m (a (N + 2 P) + 2 A) / c) with q = width and m = accepted; without speculation q^2 falls away. It
    is rounded so that the chunks hold the new rows evenly, to whole tiles. With new = 0 it is the best r from here on,
    whatever comes.

    Raises:
        ValueError: a count that is negative.
    """
    _check(width, prompt, new, width, accepted)
    most = max(width, new + width - 1)
    if costs.row_padded <= 0:
        return max(most, TILE)
    balance = accepted * (costs.row_copied * (new + 2 * prompt) + 2 * costs.growth) / costs.row_padded
    ideal = max(1.0, math.sqrt((width * width if width > 1 else 0) + balance))
    if not new:
        return max(width, _tiled(ideal))
    if ideal >= most:
        return most
    near = max(1, round(new / ideal))
    even = [math.ceil(new / n) + width - 1 for n in range(max(1, near - 2), near + 3)]  # chunks that hold all evenly
    choices = {min(most, max(width, r)) for n in (*even, math.floor(ideal)) for r in (n, _tiled(n))}
    return min(sorted(choices), key=lambda r: overhead(costs, r, prompt, new, width, accepted))


def smallest_r(costs: Costs, rows: int, step: float, extra: float = 0.0, accepted: float = 1.0) -> int:
    """The smallest r at which copies take at most a hundredth of the time, for attention that skips padding.

    Args:
        costs: of this device and model.
        rows: that the cache holds when it grows.
        step: seconds of a step.
        extra: seconds that each growth costs beside the copies: captured CUDA graphs that are captured again.
        accepted: rows that a step adds.
    """
    if step <= 0:
        raise ValueError(f"bmc: step must be more than 0 seconds, got {step}")
    seconds = costs.growth + costs.row_copied * rows + extra
    return max(1, _tiled(accepted * seconds / (SHARE * step)))


def _tiled(r: float) -> int:
    """r rounded up, to a multiple of a tile from one on."""
    return math.ceil(r) if r < TILE else TILE * math.ceil(r / TILE)


def _check(r: int, prompt: int, new: int, width: int, accepted: float) -> None:
    for name, value, least in (("width", width, 1), ("r", r, width), ("prompt", prompt, 0), ("new", new, 0)):
        if value < least:
            raise ValueError(f"bmc: {name} must be at least {least}, got {value}")
    if not 0 < accepted <= width:
        raise ValueError(f"bmc: accepted must be more than 0 and at most width, {width}, got {accepted}")
