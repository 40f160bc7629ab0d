"""kv_recompute: the K and V of a layer for KVPR's splits and chunks, of OPT and Llama shapes without grouped heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import peers_recompute
from .harness import Bench, Call, Case
from .peers import PEERS
from .timing import Effort

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EFFORT = Effort(cuda_ms=100.0, cpu_ms=800.0)
SMOLLM, SMALL, OPT_7B, OPT_13B, OPT_30B = (576, 3, 64), (2048, 8, 64), (4096, 32, 128), (5120, 40, 128), (7168, 56, 128)
PEERS["kv_recompute"] = peers_recompute.RECOMPUTE


def case(
    b: int, rows: int, model: tuple[int, int, int], dtype: torch.dtype = FP16, *, device: str = "cuda", **more: Any
) -> Case:
    """L rows of B sequences; `model`: H, Hkv, D; `more`: bias, rope, page_size."""
    sizes = {"B": b, "L": rows, "H": model[0], "Hkv": model[1], "D": model[2]}
    return Case(sizes | more, dtype, device)


CASES = [
    *(case(32, 512, model, bias=True) for model in (OPT_7B, OPT_13B, OPT_30B)),
    case(32, 512, OPT_7B, rope=True),  # Llama-2-7B
    case(32, 512, OPT_7B, BF16, rope=True),
    case(32, 512, OPT_7B, rope=True, page_size=16),
    *(case(32, rows, OPT_7B, rope=True) for rows in (16, 64)),  # chunks of 4 and 16 MiB
    *(case(1, rows, OPT_7B, rope=True) for rows in (64, 512)),
    *(case(1, 512, SMOLLM, dtype, device="cpu", rope=True) for dtype in (FP32, BF16)),
    *(case(4, 256, SMALL, dtype, device="cpu", **more) for dtype in (FP32, BF16) for more in ({}, {"rope": True})),
    case(4, 256, SMALL, FP16, device="cpu", rope=True),
]


def make(case: Case, device: torch.device) -> Call:
    """The caches have room for these rows and a page more; pages in random order."""
    b, rows, hidden, heads, dim = (case.sizes[name] for name in ("B", "L", "H", "Hkv", "D"))
    page = case.sizes.get("page_size", 0)
    capacity = rows + 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=case.dtype)

    x, w_k, w_v = normal(b, rows, hidden), *(normal(heads * dim, hidden) / hidden**0.5 for _ in range(2))
    biases = [normal(heads * dim) for _ in range(2)] if case.sizes.get("bias") else [None, None]
    angles: list[torch.Tensor | None] = [None, None]
    if case.sizes.get("rope"):
        angle = torch.rand(rows, dim // 2, device=device) * 6.3
        angles = [angle.cos(), angle.sin()]
    shape = (b * capacity // page, page, heads, dim) if page else (b, heads, capacity, dim)
    kwargs = {}
    if page:
        kwargs["block_table"] = torch.randperm(b * capacity // page).int().reshape(b, -1).to(device)
    return Call((x, w_k, w_v, *biases, *angles, normal(*shape), normal(*shape), 0), kwargs)


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """One sequence at a time: float64 weights alone are 0.8 GB at H 7168."""
    x, *weights, k_cache, v_cache, start = call.args
    if call.kwargs:
        yield output, call
        return
    for b in range(x.shape[0]):
        one = slice(b, b + 1)
        yield tuple(o[one] for o in output), Call((x[one], *weights, k_cache[one], v_cache[one], start), {})


BENCH = Bench("kv_recompute", CASES, make, chunks, effort=EFFORT)
