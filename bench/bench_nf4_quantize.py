"""nf4_quantize: normal weights, as trained matrices nearly are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .harness import Bench, Call, Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The reference runs on the CPU: it checks this many weights at each of so many places, spread from end to end.
PIECE, PLACES = 1 << 22, 4


def case(n: int, k: int, dtype: torch.dtype, device: str = "cuda") -> Case:
    return Case({"N": n, "K": k, "blocksize": 64}, dtype, device)


CASES = [
    *(case(n, k, BF16) for n, k in ((28672, 8192), (8192, 8192), (4096, 4096))),
    *(case(8192, 8192, dtype) for dtype in (FP16, FP32)),
    *(case(4096, 4096, dtype, "cpu") for dtype in (BF16, FP16, FP32)),
]


def make(case: Case, device: torch.device) -> Call:
    n, k = case.sizes["N"], case.sizes["K"]
    return Call((torch.randn(n, k, device=device, dtype=case.dtype), case.sizes["blocksize"]))


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """Pieces of whole blocks: everything up to PIECE * PLACES weights, else the first, the last and some between."""
    w, blocksize = call.args
    packed, absmax = output
    flat, last = w.reshape(-1), max(w.numel() - PIECE, 0)
    for start in sorted({last * place // (PLACES - 1) // blocksize * blocksize for place in range(PLACES)}):
        end = min(start + PIECE, w.numel())
        piece = packed[start // 2 : (end + 1) // 2], absmax[start // blocksize : -(-end // blocksize)]
        yield piece, Call((flat[start:end], blocksize))


BENCH = Bench("nf4_quantize", CASES, make, chunks)
