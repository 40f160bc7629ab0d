"""What a machine can do for an offloaded cache: copies, recomputation, and both at once; measured once, then on disk.

The file is _measured.py's, of all that the figures depend on. One that is not sound is measured again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import dtype_name
from ..ops.kv_recompute import kv_recompute
from ._kvpr_lanes import COMPUTE, COPY, Lanes
from ._kvpr_plan import WHO, Rates
from ._kvpr_store import empty_host
from ._measured import machine, remembered

VERSION = 1
SIZES = {"cuda": [1 << n for n in range(16, 27)], "cpu": [1 << n for n in range(16, 23)]}  # bytes of a copy
ROWS = {"cuda": 16384, "cpu": 256}  # of X in one recomputation
MEMORY_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}


@dataclass(frozen=True)
class Profile:
    """Rates of a device and a model's projections.

    Args:
        by_size: bytes of one copy to the device -> bytes a second, with nothing beside it.
        flops: operations a second of kv_recompute, with nothing beside it.
        memory: bytes a second that the device reads and writes.
        copy_beside: share of the copies' rate that is left while it recomputes.
        flops_beside: share of recomputation's rate that is left while it copies.
        launch: seconds the host takes to launch the copy and the recomputation of a chunk.
    """

    by_size: dict[int, float]
    flops: float
    memory: float
    copy_beside: float = 1.0
    flops_beside: float = 1.0
    launch: float = 0.0

    def __post_init__(self) -> None:
        rates = [*self.by_size.values(), self.flops, self.memory, self.copy_beside, self.flops_beside]
        if not self.by_size or not all(math.isfinite(r) and r > 0 for r in rates) or not 0 <= self.launch < 1:
            raise ValueError(f"{WHO}: profile must hold finite rates greater than 0, got {self}")

    def rates(self, other_bytes: float = 0.0) -> Rates:
        """For the schedules, with what a layer's step moves in the device's own memory beside recomputation."""
        by_size = {size: rate * self.copy_beside for size, rate in self.by_size.items()}
        copy = by_size[max(by_size)]
        return Rates(copy, self.flops * self.flops_beside, other_bytes / self.memory, self.launch, by_size)


def profile_of(
    device: torch.device, hidden: int, kv_width: int, dtype: torch.dtype, *, pin: bool, progress: bool = False
) -> Profile:
    """The profile on disk, or a new one that is then there. A folder that cannot be written costs no more than time."""
    about = dict(
        machine(device), version=VERSION, hidden=hidden, kv_width=kv_width, dtype=dtype_name(dtype), pin=pin
    )  # fmt: skip
    return remembered(
        "kvpr", about, lambda: measure(device, hidden, kv_width, dtype, pin=pin, progress=progress), asdict, _sound
    )


def _sound(fields: Any) -> Profile:
    return Profile(**{**fields, "by_size": {int(n): float(r) for n, r in fields["by_size"].items()}})


def measure(
    device: torch.device, hidden: int, kv_width: int, dtype: torch.dtype, *, pin: bool, progress: bool = False
) -> Profile:
    """Measure now; a second or two on a GPU."""
    sizes = SIZES[device.type]
    with torch.no_grad(), _bar(progress, len(sizes) + 3) as tick:
        host = empty_host((sizes[-1],), torch.uint8, pin).fill_(1)
        target = torch.empty(sizes[-1], dtype=torch.uint8, device=device)
        by_size = {}
        for size in sizes:
            by_size[size] = size / _copy_seconds(device, target, host, size)
            tick()
        recompute, flops = _recomputation(device, hidden, kv_width, dtype)
        seconds = _seconds(device, recompute)
        tick()
        beside = _beside(device, recompute, target, host) if device.type == "cuda" else (1.0, 1.0)
        tick()
        a, b = (torch.empty(MEMORY_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2))
        memory = 2 * a.numel() / _seconds(device, lambda: a.copy_(b))
        tick()
        launch = _launch_seconds(device, target, host)
    return Profile(by_size, flops / seconds, memory, *beside, launch)


def _recomputation(
    device: torch.device, hidden: int, kv_width: int, dtype: torch.dtype
) -> tuple[Callable[[], None], float]:
    """(a call of kv_recompute on random rows, its flops)."""
    rows = ROWS[device.type]
    x = torch.randn(rows, 1, hidden, device=device).to(dtype)
    w_k, w_v = ((torch.randn(kv_width, hidden, device=device) * hidden**-0.5).to(dtype) for _ in range(2))
    cache = torch.empty(rows, 1, 2, kv_width, device=device, dtype=dtype)
    dim = next(d for d in (128, 64, 32, 16, 8, 4, 2, 1) if kv_width % d == 0)
    k, v = (cache[:, :, i].unflatten(-1, (-1, dim)).permute(1, 2, 0, 3) for i in range(2))
    call = lambda: kv_recompute(x.transpose(0, 1), w_k, w_v, None, None, None, None, k, v, 0)  # noqa: E731
    return call, 4.0 * rows * hidden * kv_width


def _events(count: int) -> list[Any]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _seconds(device: torch.device, call: Callable[[], object], repeats: int = 7) -> float:
    """The median of a GPU, the best of a CPU, whose cores others use too."""
    call()
    if device.type != "cuda":
        spans = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
        return max(min(spans), 1e-9)
    torch.cuda.synchronize(device)
    moments = _events(repeats + 1)
    moments[0].record()
    for moment in moments[1:]:
        call()
        moment.record()
    torch.cuda.synchronize(device)
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(moments))) / 1e3


def _copy_seconds(device: torch.device, target: Tensor, host: Tensor, size: int) -> float:
    """Of one of several copies in a row, as the runtime sends them."""
    several = max(1, min(16, (32 << 20) // size))
    pieces = [slice(i * size, (i + 1) * size) for i in range(max(1, min(several, host.numel() // size)))]

    def call() -> None:
        for piece in pieces:
            target[piece].copy_(host[piece], non_blocking=True)

    return _seconds(device, call) / len(pieces)


def _launch_seconds(device: torch.device, target: Tensor, host: Tensor, count: int = 50) -> float:
    """The host's part of a chunk: a copy and an event to launch and to wait for, and an operator of ours."""
    if device.type != "cuda":
        return 0.0
    lanes = Lanes(device)
    x, w, cache = (
        torch.zeros(*shape, device=device, dtype=torch.float16) for shape in ((1, 1, 64), (64, 64), (1, 1, 1, 64))
    )
    kv_recompute(x, w, w, None, None, None, None, cache, cache.clone(), 0)
    other = cache.clone()
    lanes.synchronize()
    start = time.perf_counter()
    for _ in range(count):  # as the runtime does it
        with lanes.on(COPY, "", rows=1):
            target[:1024].copy_(host[:1024], non_blocking=True)
        lanes.wait(COMPUTE, lanes.mark(COPY))
        with lanes.on(COMPUTE, "", rows=1):
            kv_recompute(x[0:1].transpose(0, 1), w, w, None, None, None, None, cache, other, 0)
    took = (time.perf_counter() - start) / count
    lanes.synchronize()
    return took


def _beside(device: torch.device, recompute: Callable[[], None], target: Tensor, host: Tensor) -> tuple[float, float]:
    """(copies' rate, recomputation's rate) of each while the other runs, over its rate alone."""
    stream = torch.cuda.Stream(device)
    size = host.numel()
    alone = _copy_seconds(device, target, host, size), _seconds(device, recompute)
    times = 12
    copies = max(1, round(times * alone[1] / alone[0]))  # as long as the recomputations
    marks = _events(4)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        marks[0].record()
        for _ in range(copies):
            target.copy_(host, non_blocking=True)
        marks[1].record()
    marks[2].record()
    for _ in range(times):
        recompute()
    marks[3].record()
    torch.cuda.synchronize(device)
    took = marks[0].elapsed_time(marks[1]) / copies / 1e3, marks[2].elapsed_time(marks[3]) / times / 1e3
    return min(1.0, alone[0] / took[0]), min(1.0, alone[1] / took[1])


@contextlib.contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, where wanted and rich is there."""
    try:
        if not progress:
            raise ImportError
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("profiling", total=total)
        yield lambda: bar.advance(task)
