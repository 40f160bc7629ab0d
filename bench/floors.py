"""What was possible: copy bandwidth and matrix peak of this device, measured in the run whose results they judge.

A CPU can pass its floor by a little: what its last-level cache holds is written back after the clock stops, and that is
a larger part of a 32 MB output than of this copy.
"""

from __future__ import annotations

import functools
import mmap
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from .timing import FULL, Effort, Runner, cpu_spans_us, cuda_eager_us, cuda_graph_us, free_memory

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}  # its usual dtype


@dataclass(frozen=True)
class Peaks:
    """Copy bandwidth (read plus written), matrix peak in the device's usual dtype and in bf16."""

    copy_gbps: float
    matmul_tflops: float
    matmul_bf16_tflops: float = 0.0

    def or_better(self, other: Peaks) -> Peaks:
        """The higher of each."""
        return Peaks(*map(max, astuple(self), astuple(other)))

    def floor_us(self, cost: Any, dtype: torch.dtype) -> float:
        """The least time of a Cost(bytes, flops): bytes over bandwidth or flops over peak, whichever is longer."""
        half = self.matmul_bf16_tflops if dtype.itemsize == 2 else 0.0
        return float(max(cost.bytes / (self.copy_gbps * 1e3), cost.flops / (max(self.matmul_tflops, half) * 1e6)))


def measure_peaks(device: torch.device, effort: Effort = FULL) -> Peaks:
    """Copy a buffer far larger than any cache, and multiply two random matrices (zeros would draw less power)."""
    n, usual = MATMUL[device.type]
    rates = [_matmul_tflops(device, n, dtype, effort) for dtype in dict.fromkeys((usual, torch.bfloat16))]
    peaks = Peaks(round(_copy_gbps(device, effort), 1), round(rates[0], 3), round(rates[-1], 3))
    free_memory()
    return peaks


def _clock(device: torch.device, call: Runner, effort: Effort) -> float:
    """A GPU's median; a CPU's best, since what others leave of it changes from one second to the next."""
    return cuda_eager_us(call, effort) if device.type == "cuda" else min(cpu_spans_us(call, effort))


def _buffer(device: torch.device) -> Tensor:
    """COPY_BYTES of memory; on a CPU in huge pages, or the copy would be held up by address translation."""
    size = COPY_BYTES[device.type]
    if device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.int64)
    return torch.empty(size // 8, dtype=torch.int64, device=device)


def _copy_gbps(device: torch.device, effort: Effort) -> float:
    source, target = (_buffer(device).random_() for _ in range(2))
    return 2 * COPY_BYTES[device.type] / _clock(device, lambda: target.copy_(source), effort) / 1e3


@functools.cache
def cached_gbps(device: torch.device, size: int, effort: Effort = FULL) -> float:
    """Bandwidth (read plus written) of whatever level of memory holds `size` bytes: of copies within so many, hot."""
    source = torch.zeros(size // 16, dtype=torch.int64, device=device)
    target, times = torch.empty_like(source), max(1, (64 << 20) // size)

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    if device.type == "cpu":
        return 2 * 8 * source.numel() * times / min(cpu_spans_us(copies, effort)) / 1e3
    return 2 * 8 * source.numel() * times / cuda_graph_us([copies], effort) / 1e3


def _matmul_tflops(device: torch.device, n: int, dtype: torch.dtype, effort: Effort) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _clock(device, lambda: torch.mm(a, b, out=out), effort) / 1e6
