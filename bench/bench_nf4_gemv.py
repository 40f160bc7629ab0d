"""nf4_gemv, nf4_linear, nf4_linear_dx: matrices of Llama 70B, Qwen3 32B, Gemma 27B and Llama 8B, and two squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .bench_nf4_dequant import random_weight
from .harness import Bench, Call, Case
from .timing import Effort

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MATRICES = ((28672, 8192), (25600, 5120), (21504, 5376), (8192, 8192), (4096, 14336), (4096, 4096))
LARGE, SQUARE, SMALL = MATRICES[0], MATRICES[3], MATRICES[5]
FEW_ROWS, MANY_ROWS = (2, 4, 8, 16, 32, 64, 128), (256, 512, 2048)
EFFORT = Effort(cuda_ms=25.0, cpu_ms=1000.0)  # 68 cases with five peers within `make gpu`'s 200 s


def case(m: int, matrix: tuple[int, int], dtype: torch.dtype = BF16, *, device: str = "cuda", dq: bool = False) -> Case:
    sizes = {"M": m, "N": matrix[0], "K": matrix[1], "blocksize": 64}
    return Case({**sizes, "double_quant": True} if dq else sizes, dtype, device)


GEMV_CASES = [
    *(case(1, matrix) for matrix in MATRICES),
    *(case(1, matrix, dq=True) for matrix in (LARGE, SQUARE, SMALL)),
    case(1, SQUARE, FP16),
    *(case(1, matrix, dtype, device="cpu") for matrix in MATRICES[4:] for dtype in (FP32, BF16)),
]
LINEAR_CASES = [
    *(case(m, matrix) for matrix in MATRICES for m in FEW_ROWS),
    *(case(m, matrix) for matrix in (LARGE, SQUARE, SMALL) for m in MANY_ROWS),
    *(case(m, SQUARE, dq=True) for m in (8, 32)),
    *(case(m, SMALL, dtype, device="cpu") for m in (4, 16, 64, 512) for dtype in (FP32, BF16)),
]
DX_CASES = [
    *(case(m, matrix) for matrix in (SQUARE, LARGE) for m in (512, 2048)),
    case(16, SQUARE),
    case(64, SMALL, FP32, device="cpu"),
]


def _make(case: Case, device: torch.device, given: str, wanted: str) -> Call:
    """Normal activations with `given` features, and how many are wanted."""
    n, k, blocksize = (case.sizes[name] for name in ("N", "K", "blocksize"))
    packed, absmax, scales = random_weight(n * k, blocksize, bool(case.sizes.get("double_quant")), device)
    rows = torch.randn(case.sizes["M"], case.sizes[given], device=device, dtype=case.dtype)
    return Call((rows, packed, absmax, case.sizes[wanted], blocksize), scales)


def make(case: Case, device: torch.device) -> Call:
    return _make(case, device, "K", "N")


def make_dx(case: Case, device: torch.device) -> Call:
    return _make(case, device, "N", "K")


def whole(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of it: the reference's error() expands the weight piece by piece itself.

    At most 2048 x 28672 outputs against 2^28 weights: 6 GB of float64, 0.1 s on an H100.
    """
    yield output, call


GEMV = Bench("nf4_gemv", GEMV_CASES, make, whole, effort=EFFORT)
LINEAR = Bench("nf4_linear", LINEAR_CASES, make, whole, "nf4_gemv", EFFORT)
DX = Bench("nf4_linear_dx", DX_CASES, make_dx, whole, "nf4_gemv", EFFORT)
BENCHES = (GEMV, LINEAR, DX)
