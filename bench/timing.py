"""The time of one call with cold caches, in microseconds: the same three functions for us and for every peer.

Eager: events round each call, after a pass over a buffer that no cache holds. Graphed: a CUDA graph of calls that
rotate over so many input sets that each finds L2 filled by others. CPU: the host clock, after the same kind of pass.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA_FLUSH_BYTES = 512 << 20
LONG_US = 1e5  # a call that takes longer is timed three times
FLUSH_US = 170.0  # what the pass takes at 3 TB/s: longer than any host takes to launch what comes next
ROTATION_L2 = 4  # input sets of a graph fill L2 this many times
GRAPH_US = 3000.0  # work of one graph, so that its launch weighs less than 0.2 %
MAX_GRAPH_CALLS = 256

Runner = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long each measurement may take, in milliseconds; on a CPU, of measured time."""

    cuda_ms: float
    cpu_ms: float

    def at_most(self, other: Effort) -> Effort:
        """The less of each."""
        return Effort(min(self.cuda_ms, other.cuda_ms), min(self.cpu_ms, other.cpu_ms))


FULL = Effort(cuda_ms=120.0, cpu_ms=1500.0)
QUICK = Effort(cuda_ms=15.0, cpu_ms=100.0)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in `value`."""
    return sum(t.numel() * t.element_size() for t in tensors_of(value))


def free_memory() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def repeats(one_us: float, budget_ms: float, low: int, high: int) -> int:
    """How many calls of `one_us` fill the budget, within [low, high]."""
    return max(low, min(high, int(budget_ms * 1e3 / max(one_us, 1e-3))))


def rotation(device: torch.device, footprint: int) -> int:
    """How many input sets of `footprint` bytes (outputs included) exceed ROTATION_L2 times the L2 cache."""
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(2, ROTATION_L2 * l2 // max(footprint, 1) + 1)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def _spans_us(starts: Sequence[torch.cuda.Event], ends: Sequence[torch.cuda.Event]) -> list[float]:
    """Waits for the device, then the time between each pair."""
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]


def _flushed_us(call: Runner, flush: Tensor, count: int) -> list[float]:
    """The pass over `flush` also keeps the device busy while the host prepares the call, so launches are hidden."""
    starts, ends = _events(count), _events(count)
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    return _spans_us(starts, ends)


def cuda_eager_us(call: Runner, effort: Effort = FULL) -> float:
    """Median GPU time of an eager call."""
    flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    long_us = _flushed_us(call, flush, 3)[-1]  # compiles, tunes, fills the allocator
    if long_us > LONG_US:  # seconds in all: whoever disturbs it disturbs little of it
        return statistics.median(_flushed_us(call, flush, 3))
    one_us = statistics.median(_flushed_us(call, flush, 5))
    return statistics.median(_flushed_us(call, flush, repeats(one_us + FLUSH_US, effort.cuda_ms, 15, 1000)))


def cuda_graph_us(calls: Sequence[Runner], effort: Effort = FULL) -> float:
    """Median GPU time of a call inside a CUDA graph; each of `calls` has its own inputs (see `rotation`)."""
    one_us = _warm_up_us(calls)
    rounds = math.ceil(min(MAX_GRAPH_CALLS, max(1.0, GRAPH_US / one_us)) / len(calls))
    graph = torch.cuda.CUDAGraph()
    outputs: list[Any] = [None] * len(calls)  # alive until the set's next turn, so that consecutive calls write apart
    try:
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    outputs[i] = call()
        graph.replay()
        count = repeats(one_us * rounds * len(calls), effort.cuda_ms, 10, 200)
        starts, ends = _events(count), _events(count)
        for start, end in zip(starts, ends, strict=True):
            start.record()
            graph.replay()
            end.record()
        return statistics.median(_spans_us(starts, ends)) / (rounds * len(calls))
    finally:
        outputs.clear()
        graph.reset()


def _warm_up_us(calls: Sequence[Runner]) -> float:
    """Run each call twice on a side stream, as capture wants it; a rough time of one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    starts, ends = _events(1), _events(1)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        starts[0].record()
        for call in calls:
            call()
        ends[0].record()
    torch.cuda.current_stream().wait_stream(stream)
    return max(_spans_us(starts, ends)[0] / len(calls), 0.5)


@functools.cache
def _cpu_flush() -> Tensor:
    """Twice the largest cache, and at least 64 MB."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return torch.zeros(2 * max(sizes), dtype=torch.int8)


def _cpu_span_us(call: Runner) -> float:
    """One call out of cold caches; letting go of its output is not counted."""
    _cpu_flush().add_(1)
    start = time.perf_counter()
    output = call()
    span = time.perf_counter() - start
    del output
    return span * 1e6


def cpu_spans_us(call: Runner, effort: Effort = FULL) -> list[float]:
    """Host time of each of many calls on the CPU, with torch's threads as they are."""
    _cpu_span_us(call)
    one_us = statistics.median(_cpu_span_us(call) for _ in range(3))
    return [_cpu_span_us(call) for _ in range(repeats(one_us, effort.cpu_ms, 7, 100))]


def cpu_us(call: Runner, effort: Effort = FULL) -> float:
    """Lower quartile of the host time of a call.

    On a machine of its own that is the median less a few per cent; beside others the median is how long they ran.
    """
    return statistics.quantiles(cpu_spans_us(call, effort), n=4)[0]
