"""merge_state: the queries of MAR's active set, and of a large decode batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .harness import Bench, Call, Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(b: int, heads: int, rows: int, d: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Case:
    return Case({"B": b, "Hq": heads, "T": rows, "D": d}, dtype, device)


CASES = [
    *(case(b, 16, 64, d) for b in (16, 128) for d in (64, 80)),
    case(256, 16, 1, 64),
    case(256, 32, 1, 128),
    case(128, 16, 64, 64, FP16),
    *(case(4, 16, 64, 64, dtype, "cpu") for dtype in (FP32, BF16)),
]


def make(case: Case, device: torch.device) -> Call:
    shape = tuple(case.sizes[name] for name in ("B", "Hq", "T"))
    o_a, o_b = (torch.randn(*shape, case.sizes["D"], device=device, dtype=case.dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape, device=device) for _ in range(2))
    return Call((o_a, lse_a, o_b, lse_b))


def whole(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of it: a few times 8 M elements in float64."""
    yield output, call


BENCH = Bench("merge_state", CASES, make, whole)
