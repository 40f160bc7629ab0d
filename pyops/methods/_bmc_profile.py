"""What copies and padding cost on this device, measured once for each shape of cache and remembered."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import dtype_name
from ..ops.kv_append import kv_append
from ._bmc_model import Costs, smallest_r
from ._measured import machine, remembered

MOST_BYTES = 1 << 30  # of the caches that are measured; layers beyond it are taken to cost what the others do
REPEATS = 5
FIRST_ROWS, FIRST_SHARE = 64, 32  # to grow by, or one in so many, while it is not known how long a step takes


class Shape(NamedTuple):
    """The sizes of a cache."""

    batch: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype


class Pace:
    """Seconds of a step, and what one takes longer in which the cache grew, by the host's clock.

    A step ends where `done` is told, which a host that works itself knows, and else where the next begins: on a GPU the
    host runs a step ahead at most, so that its steps come as fast as the device's.
    """

    def __init__(self) -> None:
        self.extra = 0.0
        self._last: tuple[float, bool] | None = None
        self._end: float | None = None
        self._steps: deque[float] = deque(maxlen=32)

    def tick(self, grows: bool) -> None:
        """A step begins; the cache grows before it where `grows`."""
        now = time.perf_counter()
        if self._last is not None:
            before, grew = self._last
            took = (now if self._end is None else self._end) - before
            if not grew:
                self._steps.append(took)
            elif self.step is not None:
                self.extra = took - self.step
        self._last, self._end = (now, grows), None

    def done(self) -> None:
        """The step's work is over: what comes before the next is not its own."""
        self._end = time.perf_counter()

    @property
    def step(self) -> float | None:
        """The median of the last ones; None while there is none."""
        return statistics.median(self._steps) if self._steps else None


def costs_of(shape: Shape, rows: int, width: int = 1) -> Costs:
    """The costs of a cache of about `rows` rows; from the file where it was measured before on this machine.

    Args:
        shape: of the cache.
        rows: that it holds; taken up to the next power of two.
        width: new rows that attend in a step.
    """
    rows = 1 << max(6, (rows - 1).bit_length())
    sizes = {name: value for name, value in shape._asdict().items() if name != "device"}
    about = dict(machine(shape.device), **{**sizes, "dtype": dtype_name(shape.dtype)}, rows=rows, width=width)
    return remembered("bmc", about, lambda: measure(shape, rows, width), dataclasses.asdict, lambda f: Costs(**f))


def length_aware_r(shape: Shape, rows: int, pace: Pace, width: int = 1, accepted: float = 1.0) -> int:
    """smallest_r for a cache of `rows` rows, at the pace of its steps so far."""
    if pace.step is None:
        return max(FIRST_ROWS, rows // FIRST_SHARE)
    costs = costs_of(shape, rows, width)
    beside = max(0.0, pace.extra - costs.growth - costs.row_copied * rows)
    return smallest_r(costs, rows, pace.step, beside, accepted)


def measure(shape: Shape, rows: int, width: int = 1) -> Costs:
    """Time growth at two sizes and padded attention at two capacities: what a row costs is the slope.

    All layers take part as far as memory allows, so that each finds its rows out of the processor's caches, as it does
    in a step.
    """
    bytes_a_row = 2 * shape.batch * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    layers = max(1, min(shape.layers, MOST_BYTES // (bytes_a_row * rows * 2)))
    few, scale = rows // 2, shape.layers / layers
    sizes = shape.batch, shape.kv_heads, rows, shape.head_dim
    caches = [
        tuple(torch.zeros(sizes, device=shape.device, dtype=shape.dtype) for _ in range(2)) for _ in range(layers)
    ]
    growth = [_least(functools.partial(_grow, caches, n), shape.device) for n in (few, rows)]
    q = torch.zeros(shape.batch, shape.kv_heads, shape.heads // shape.kv_heads * width, shape.head_dim,
                    device=shape.device, dtype=shape.dtype)  # fmt: skip
    attention = [_least(functools.partial(_attend, q, caches, n, few), shape.device) for n in (few, rows)]
    row_copied = max(0.0, growth[1] - growth[0]) / (rows - few)
    return Costs(
        max(0.0, growth[0] - row_copied * few) * scale,
        row_copied * scale,
        max(0.0, attention[1] - attention[0]) / (rows - few) * scale,
    )


def _grow(caches: list[tuple[Tensor, ...]], rows: int) -> None:
    """Every layer's `rows` rows into new memory, as GrowingCache moves them."""
    start = torch.zeros(caches[0][0].shape[0], device=caches[0][0].device, dtype=torch.int32)
    for k, v in caches:
        sizes = (*k.shape[:2], rows + 1, k.shape[3])
        kv_append(k.new_zeros(sizes), v.new_zeros(sizes), k[:, :, :rows], v[:, :, :rows], start)


def _attend(q: Tensor, caches: list[tuple[Tensor, ...]], capacity: int, length: int) -> None:
    """PaddedAttention's product over `capacity` rows of every layer."""
    seen = (torch.arange(capacity, device=q.device) < length).expand(q.shape[0], 1, q.shape[2], capacity)
    for k, v in caches:
        F.scaled_dot_product_attention(q, k[:, :, :capacity], v[:, :, :capacity], attn_mask=seen)


def _least(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of `work` on the device, the least of a few: what disturbs it only adds."""
    times = []
    for i in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if i:  # the first warms up
            times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
