"""How many rows of an offloaded KV cache are recomputed, and what a decode step then takes.

A row is one token of every sequence. Of the `tokens` rows in host memory the first `split` are sent as the inputs X of
their layer, from which the GPU makes K and V again; the others are sent as K and V. X is half as many bytes where there
is no grouping of heads, so that a split trades copying, the bottleneck, for arithmetic.

Schedules: *row* (KVPR's, for latency: a layer's X, then its K and V while X is recomputed), *column* (for throughput:
several batches share each load of a layer's weights) and *pipeline* (X in chunks, each recomputed while the next
arrives, and copies that run on into the next layer). Source: KVPR, arXiv:2411.17089, section 3; the column and pipeline
schedules' times are our own derivation.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

WHO = "OffloadedCache"
NF4_BLOCK = 64
PACKED = 0.5 + 4 / NF4_BLOCK  # bytes an element: a nibble, and a part of the block's fp32 scale
COMPRESSED = {None: "", "kv": "kv", "x": "x", "all": "kvx"}  # what each choice of `compress` keeps in 4 bits
MEBI = 1 << 20
# Bytes of a chunk of X. Copies run ahead of the layers, so that a large one costs little; a small one costs its launch.
CHUNKS = tuple(n * MEBI for n in (2, 4, 8, 16, 32, 64))


@dataclass(frozen=True)
class Shape:
    """What a row of a layer weighs.

    Args:
        batch: sequences.
        hidden: H, elements of X a token.
        kv_width: Hkv D, elements of K a token, and of V.
        itemsize: bytes an element.
        compress: what is stored in 4 bits: None, "kv", "x" or "all".
    """

    batch: int
    hidden: int
    kv_width: int
    itemsize: float = 2.0
    compress: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "hidden", "kv_width", "itemsize"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{WHO}: {name} must be greater than 0, got {getattr(self, name)}")
        if self.compress not in COMPRESSED:
            raise ValueError(f"{WHO}: compress must be one of None, 'kv', 'x', 'all', got {self.compress!r}")

    @property
    def x_bytes(self) -> float:
        """Bytes of a row of X."""
        return self.batch * self.hidden * (PACKED if "x" in COMPRESSED[self.compress] else self.itemsize)

    @property
    def kv_bytes(self) -> float:
        """Bytes of a row of K and V."""
        return 2 * self.batch * self.kv_width * (PACKED if "kv" in COMPRESSED[self.compress] else self.itemsize)

    @property
    def flops(self) -> float:
        """To make K and V of a row from X."""
        return 4.0 * self.batch * self.hidden * self.kv_width

    @property
    def worth_it(self) -> bool:
        """Whether X is less to send than K and V; if not, no split helps: grouped heads, 4 bits for K and V alone."""
        return self.x_bytes < self.kv_bytes

    def copied(self, tokens: int, split: int) -> float:
        """Bytes that a layer and step must send."""
        return split * self.x_bytes + (tokens - split) * self.kv_bytes


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        copy: bytes from host to device, in large copies, while it computes.
        flops: of recomputation, while it copies.
        other: seconds of a layer and step beside recomputation: attention, the products of one row.
        launch: seconds the host takes for a chunk, which a chunk cannot be faster than.
        by_size: bytes of one copy -> bytes a second, where small copies are slower; `copy` for all if empty.
    """

    copy: float
    flops: float
    other: float = 0.0
    launch: float = 0.0
    by_size: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("copy", "flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{WHO}: {name} must be greater than 0, got {getattr(self, name)}")

    def copy_seconds(self, size: float) -> float:
        """One copy; between two measured sizes their seconds are joined by a line."""
        if size <= 0:
            return 0.0
        known = sorted(self.by_size)
        if len(known) < 2:
            return size / self.copy
        seconds = [n / self.by_size[n] for n in known]
        if size >= known[-1]:
            return seconds[-1] + (size - known[-1]) / self.copy
        i = max(1, bisect.bisect_left(known, size))
        slope = max(0.0, (seconds[i] - seconds[i - 1]) / (known[i] - known[i - 1]))
        return max(seconds[i - 1] + (size - known[i - 1]) * slope, size / max(self.copy, self.by_size[known[-1]]))


@dataclass(frozen=True)
class Plan:
    """A choice, and what it is predicted to take.

    Args:
        schedule: "full", "single" (one chunk), "pipeline", or "column".
        split: rows that are recomputed.
        chunk: rows of X in one copy.
        seconds: of a layer and step.
        copied: bytes sent for a layer and step.
    """

    schedule: str
    split: int
    chunk: int
    seconds: float
    copied: float


def split_point(
    tokens: int,
    batch: int,
    hidden: int,
    *,
    copy: float,
    flops: float,
    kv_width: int | None = None,
    itemsize: float = 2.0,
    compress: str | None = None,
    schedule: str = "row",
    limit: int | None = None,
    other: float = 0.0,
    weights: float = 0.0,
    batches: int = 1,
) -> int:
    """Rows to recompute so that a decode step is fastest.

    Args:
        tokens: rows in host memory, s'.
        batch: sequences.
        hidden: H.
        copy: host-to-device bytes a second.
        flops: floating-point operations a second of recomputation.
        kv_width: Hkv D; H, one KV head for each query head, when None.
        itemsize: bytes an element.
        compress: what is stored in 4 bits: None, "kv", "x" or "all".
        schedule: "row" or "column".
        limit: at most so many rows, those whose X is known; `tokens` when None.
        other: seconds of a layer's step beside recomputation (column).
        weights: bytes of a layer's weights, sent once for `batches` batches (column).
        batches: batches that share the weights (column).

    Raises:
        ValueError: naming the argument, what it must be and what it is.
    """
    if schedule not in ("row", "column"):
        raise ValueError(f"{WHO}: schedule must be 'row' or 'column', got {schedule!r}")
    if tokens < 0 or batches < 1:
        name, value, least = ("tokens", tokens, 0) if tokens < 0 else ("batches", batches, 1)
        raise ValueError(f"{WHO}: {name} must be {least} or more, got {value}")
    shape = Shape(batch, hidden, kv_width or hidden, itemsize, compress)
    rates = Rates(copy, flops, other)
    most = tokens if limit is None else max(0, min(limit, tokens))
    if schedule == "row":
        return row_split(shape, rates, tokens, most)
    return column_split(shape, rates, tokens, most, weights / batches)


def row_seconds(shape: Shape, rates: Rates, tokens: int, split: int) -> float:
    """KVPR's latency: X arrives; then recomputation beside the arrival of K and V, whichever is longer."""
    kv = (tokens - split) * shape.kv_bytes / rates.copy
    return split * shape.x_bytes / rates.copy + max(split * shape.flops / rates.flops, kv)


def row_split(shape: Shape, rates: Rates, tokens: int, limit: int) -> int:
    """Where row_seconds is least: the crossing of its two sides, if X is less to send than K and V, else 0."""
    if not shape.worth_it:
        return 0
    kv = shape.kv_bytes / rates.copy
    crossing = tokens * kv / (shape.flops / rates.flops + kv)
    return _better(crossing, limit, lambda split: row_seconds(shape, rates, tokens, split))


def column_seconds(shape: Shape, rates: Rates, tokens: int, split: int, weights: float = 0.0) -> float:
    """A batch of many in steady state: the link and the GPU both work all the time, and the slower decides.

    `weights` are the bytes of the layer's weights, divided by the batches that share a load of them.
    """
    return max(split * shape.flops / rates.flops + rates.other, (shape.copied(tokens, split) + weights) / rates.copy)


def column_split(shape: Shape, rates: Rates, tokens: int, limit: int, weights: float = 0.0) -> int:
    """Where column_seconds is least."""
    if not shape.worth_it:
        return 0
    idle = tokens * shape.kv_bytes + weights - rates.other * rates.copy  # bytes the link needs beyond `other`
    crossing = idle / (shape.flops * rates.copy / rates.flops + shape.kv_bytes - shape.x_bytes)
    return _better(crossing, limit, lambda split: column_seconds(shape, rates, tokens, split, weights))


def _better(crossing: float, limit: int, seconds: object) -> int:
    """The whole number beside the crossing that takes less, the smaller of two equals, within [0, limit]."""
    assert callable(seconds)
    low = max(0, min(limit, math.floor(crossing)))
    high = min(limit, low + 1)
    return high if seconds(high) < seconds(low) else low


def chunk_rows(shape: Shape, size: float) -> int:
    """Rows of X in a chunk of about `size` bytes."""
    return max(1, round(size / shape.x_bytes))


def step_seconds(
    shape: Shape, rates: Rates, tokens: int, split: int, chunk: int = 0, layers: int = 6, steps: int = 2
) -> float:
    """Seconds of a layer in the runtime's own order of work, in which copies run ahead by up to two layers.

    The copies of a layer (X chunk by chunk, then K and V) begin when those of the layer before are done and attention
    has left the buffers of the layer before that; a chunk is recomputed when it is there; attention waits for K and V.
    The last of `steps` steps counts, since the first begins with no copy under way.
    """
    sizes = _chunks(split, chunk)
    copies = [rates.copy_seconds(n * shape.x_bytes) for n in sizes]
    made = [max(n * shape.flops / rates.flops, rates.launch) for n in sizes]
    kv = rates.copy_seconds((tokens - split) * shape.kv_bytes)
    link = gpu = begin = 0.0
    free = [0.0, 0.0]
    for step in range(steps):
        if step == steps - 1:
            begin = gpu
        for layer in range(layers):
            link = max(link, free[layer % 2])
            for copy, work in zip(copies, made, strict=True):
                link += copy
                gpu = max(gpu, link) + work
            link += kv
            gpu = max(gpu, link) + rates.other
            free[layer % 2] = gpu
    return (gpu - begin) / layers


def _chunks(split: int, chunk: int) -> list[int]:
    """Rows of each chunk; one where chunk is 0."""
    chunk = chunk or max(split, 1)
    return [min(chunk, split - at) for at in range(0, split, chunk)]


def best_plan(
    shape: Shape,
    rates: Rates,
    tokens: int,
    schedule: str = "auto",
    *,
    limit: int | None = None,
    sizes: tuple[int, ...] = CHUNKS,
    layers: int = 6,
) -> Plan:
    """The fastest of a schedule by step_seconds.

    Args:
        shape, rates: what is sent, and how fast.
        tokens: rows in host memory.
        schedule: "full" (nothing is recomputed), "single" (KVPR's split, one chunk), "pipeline" or "auto".
        limit: at most so many rows are recomputed.
        sizes: bytes of a chunk of X, of which the best is taken.
        layers: of the model; more than six change nothing.
    """
    most = tokens if limit is None else max(0, min(limit, tokens))
    layers = max(1, min(layers, 6))

    def plan(name: str, split: int, chunk: int) -> Plan:
        seconds = step_seconds(shape, rates, tokens, split, chunk, layers)
        return Plan(name, split, chunk or split, seconds, shape.copied(tokens, split))

    full = plan("full", 0, 0)
    single = plan("single", row_split(shape, rates, tokens, most), 0)
    if schedule in ("full", "single") or most == 0 or not shape.worth_it:
        return single if schedule == "single" and single.split else full
    plans = [
        plan("pipeline", split, min(split, chunk_rows(shape, size)))
        for split in _candidates(shape, rates, tokens, most)
        for size in sizes
    ]
    best = min(plans, key=lambda p: (p.seconds, p.split, -p.chunk))
    if schedule == "pipeline":
        return best
    return min((full, single, best), key=lambda p: p.seconds)  # of equals the simplest


def _candidates(shape: Shape, rates: Rates, tokens: int, most: int) -> list[int]:
    """Splits round the one where the link and the GPU are equally busy, and that of a row."""
    middle = column_split(shape, rates, tokens, most)
    near = {round(middle * f) for f in (0.9, 0.94, 0.97, 1.0, 1.03, 1.06)}
    return sorted({max(1, min(most, n)) for n in near | {row_split(shape, rates, tokens, most), most}})
