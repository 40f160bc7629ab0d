"""dense_linear: the products of SmolLM2's decoding step and of its prefill, and a larger square."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastops

from .harness import Bench, Call, Case

MATRICES = ((960, 576), (576, 1536), (3072, 576), (49152, 576), (4096, 4096))


def case(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    return Case({"M": m, "N": n, "K": k}, dtype, "cpu")


CASES = [
    *(case(m, n, k, torch.float32) for n, k in MATRICES for m in (1, 8)),
    *(case(m, 3072, 576, torch.float32) for m in (2, 4, 16, 64, 512, 2048)),
    *(case(m, 4096, 4096, torch.bfloat16) for m in (1, 8, 512)),
]


def make(case: Case, device: torch.device) -> Call:
    m, n, k = (case.sizes[name] for name in "MNK")
    x, weight = (torch.randn(*shape, device=device, dtype=case.dtype) for shape in ((m, k), (n, k)))
    return Call((x, fastops.dense_panels(weight), n))


def whole(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of it: at most 49152 x 576 weights in float64."""
    yield output, call


BENCH = Bench("dense_linear", CASES, make, whole)
