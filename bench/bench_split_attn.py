"""split_attn: MAR's decoder, 64 tokens computed again beside 256 cached ones, at D 64 (B, L) and 80 (H)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .harness import Bench, Call, Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PIECE = 16  # batches that the reference takes at a time: 16 x 16 heads x 64 x 320 scores are 42 MB of float64


def case(
    b: int, d: int, dtype: torch.dtype = BF16, *, heads: int = 16, device: str = "cuda", masked: bool = False
) -> Case:
    sizes = {"B": b, "Hq": heads, "A": 64, "C": 320 if masked else 256, "D": d}
    return Case({**sizes, "masked": True} if masked else sizes, dtype, device)


CASES = [
    *(case(b, d) for d in (64, 80, 128) for b in (16, 32, 128)),
    *(case(b, d, masked=True) for d in (64, 80) for b in (16, 128)),
    case(128, 64, FP16),
    *(case(2, d, dtype, device="cpu") for d in (64, 80) for dtype in (FP32, BF16)),
    case(2, 64, FP32, device="cpu", masked=True),
]


def make(case: Case, device: torch.device) -> Call:
    """`masked`: all 320 slots of a cache, of which 64 are stale and left out."""
    b, h, a, c, d = (case.sizes[name] for name in ("B", "Hq", "A", "C", "D"))
    q, k, v = (torch.randn(b, h, a, d, device=device, dtype=case.dtype) for _ in range(3))
    cached = [torch.randn(b, h, c, d, device=device, dtype=case.dtype) for _ in range(2)]
    if "masked" not in case.sizes:
        return Call((q, k, v, *cached))
    stale = torch.rand(b, c, device=device).argsort(dim=1) < a
    return Call((q, k, v, *cached), {"cached_mask": ~stale})


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """A few batches at a time."""
    for start in range(0, call.args[0].shape[0], PIECE):
        some = slice(start, start + PIECE)
        piece = tuple(t[some] for t in output)
        yield piece, Call(tuple(t[some] for t in call.args), {k: v[some] for k, v in call.kwargs.items()})


BENCH = Bench("split_attn", CASES, make, chunks)
