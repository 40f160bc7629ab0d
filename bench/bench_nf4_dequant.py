"""nf4_dequant: matrices of Gemma 27B, Qwen3 32B and Llama 70B, two squares, every dtype, the ends of blocksize."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .harness import Bench, Call, Case

ABSMAX_BLOCKSIZE = 256
# Weights a piece: float64 truth and its intermediate tensors take about 100 bytes each.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MATRICES = ((21504, 5376), (25600, 5120), (28672, 8192), (8192, 8192), (4096, 4096))


def case(n: int, k: int, dtype: torch.dtype, *, device: str = "cuda", blocksize: int = 64, dq: bool = False) -> Case:
    sizes = {"N": n, "K": k, "blocksize": blocksize}
    return Case({**sizes, "double_quant": True} if dq else sizes, dtype, device)


CASES = [
    *(case(n, k, BF16, dq=dq) for n, k in MATRICES for dq in (False, True)),
    *(case(8192, 8192, dtype) for dtype in (FP16, FP32)),
    *(case(8192, 8192, BF16, blocksize=blocksize) for blocksize in (32, 4096)),
    *(case(4096, 4096, dtype, device="cpu", dq=dq) for dtype in (BF16, FP16, FP32) for dq in (False, True)),
]


def random_weight(n: int, blocksize: int, dq: bool, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(packed, absmax, double quantisation) of n weights.

    Nibbles are uniform, since quantiles of the data are what the codes are, and scales random near 1.
    """
    blocks = math.ceil(n / blocksize)
    packed = torch.empty(math.ceil(n / 2), dtype=torch.uint8, device=device).random_(0, 256)
    if not dq:
        return packed, torch.rand(blocks, device=device).add_(0.5), {}
    absmax = torch.empty(blocks, dtype=torch.uint8, device=device).random_(0, 256)
    scales = {
        "absmax_code": torch.linspace(-1, 1, 256, device=device),
        "absmax_scale": torch.rand(math.ceil(blocks / ABSMAX_BLOCKSIZE), device=device).mul_(0.5).add_(0.1),
        "absmax_offset": torch.full((), 1.25, device=device),
    }
    return packed, absmax, scales


def make(case: Case, device: torch.device) -> Call:
    n, k, blocksize = (case.sizes[name] for name in ("N", "K", "blocksize"))
    packed, absmax, scales = random_weight(n * k, blocksize, bool(case.sizes.get("double_quant")), device)
    return Call((packed, absmax, [n, k], case.dtype, blocksize), scales)


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of the output, in pieces that end where blocks of scales do."""
    packed, absmax, shape, dtype, blocksize = call.args
    n, flat, step = math.prod(shape), output.reshape(-1), CHUNK[packed.device.type]
    for start in range(0, n, step):
        end = min(start + step, n)
        kwargs = dict(call.kwargs)
        if "absmax_scale" in kwargs:
            per_scale = blocksize * ABSMAX_BLOCKSIZE
            kwargs["absmax_scale"] = kwargs["absmax_scale"][start // per_scale : math.ceil(end / per_scale)]
        some_packed = packed[start // 2 : math.ceil(end / 2)]
        some_absmax = absmax[start // blocksize : math.ceil(end / blocksize)]
        yield flat[start:end], Call((some_packed, some_absmax, [end - start], dtype, blocksize), kwargs)


BENCH = Bench("nf4_dequant", CASES, make, chunks)
