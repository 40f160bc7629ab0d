"""attn_received: the generated tokens of MAR's decoder over all 320, at D 64 (B, L) and 80 (H)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .harness import Bench, Call, Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(b: int, rows: int, d: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Case:
    return Case({"B": b, "Hq": 16, "T": rows, "S": 320, "D": d}, dtype, device)


CASES = [
    *(case(b, 7, d) for d in (64, 80) for b in (16, 32, 128)),
    case(128, 1, 64),
    case(128, 7, 64, FP16),
    *(case(4, 7, 64, dtype, "cpu") for dtype in (FP32, BF16)),
]


def make(case: Case, device: torch.device) -> Call:
    b, h, g, s, d = (case.sizes[name] for name in ("B", "Hq", "T", "S", "D"))
    return Call(tuple(torch.randn(b, h, rows, d, device=device, dtype=case.dtype) for rows in (g, s)))


def whole(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of it: 42 M elements of K in float64 at most."""
    yield output, call


BENCH = Bench("attn_received", CASES, make, whole)
