"""decode_attn: one row a sequence at the shapes of serving and of long contexts, paged caches, and trees (T > 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastops.reference import tree_build

from . import peers_attention
from .harness import Bench, Call, Case
from .peers import PEERS
from .timing import Effort

BF16, FP32 = torch.bfloat16, torch.float32
EFFORT = Effort(cuda_ms=60.0, cpu_ms=1000.0)
PEERS["decode_attn"] = peers_attention.DECODE


def case(
    b: int,
    s: int,
    hq: int,
    hkv: int,
    *,
    t: int = 1,
    d: int = 128,
    page: int = 0,
    dtype: torch.dtype = BF16,
    device: str = "cuda",
) -> Case:
    sizes = {"B": b, "T": t, "S": s, "Hq": hq, "Hkv": hkv, "D": d}
    return Case({**sizes, "page_size": page} if page else sizes, dtype, device)


ROWS = ((64, 18432, 12, 2), (32, 18432, 32, 8), (32, 1024, 32, 8), (64, 1024, 12, 2), (8, 8192, 32, 8))
CASES = [
    *(case(*shape, page=page) for shape in ROWS for page in (0, 16)),
    case(8, 8192, 32, 8, d=80),
    case(1, 8192, 32, 8, t=64),
    case(8, 8192, 32, 8, t=64),
    case(8, 8192, 32, 8, t=16),
    case(8, 8192, 32, 8, t=16, page=16),
    case(8, 2048, 32, 32, t=64),
    *(case(8, 1024, 9, 3, d=64, dtype=dtype, device="cpu") for dtype in (FP32, BF16)),
]


def make(case: Case, device: torch.device) -> Call:
    """Full caches, pages in random order; T > 1 rows are random trees."""
    b, t, s, hq, hkv, d = (case.sizes[name] for name in ("B", "T", "S", "Hq", "Hkv", "D"))
    page = case.sizes.get("page_size", 0)
    shape = (b * s // page, page, hkv, d) if page else (b, hkv, s, d)
    q = torch.randn(b, hq, t, d, device=device, dtype=case.dtype)
    k, v = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2))
    kwargs = {}
    if page:
        kwargs["block_table"] = torch.randperm(b * s // page).int().reshape(b, s // page).to(device)
    if t > 1:
        kwargs["tree_mask"] = tree_build.tree_build(tree_build.random_parents(b, t))[0].to(device)
    return Call((q, k, v, torch.full((b,), s, dtype=torch.int32).to(device)), kwargs)


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """A sequence at a time: its caches in float64 take at most 0.3 GB, its scores (T = 64) 0.13 GB."""
    q, k, v, lengths = call.args
    for b in range(q.shape[0]):
        one = slice(b, b + 1)
        cache = slice(None) if "block_table" in call.kwargs else one
        kwargs = {name: tensor[one] for name, tensor in call.kwargs.items()}
        yield tuple(o[one] for o in output), Call((q[one], k[cache], v[cache], lengths[one]), kwargs)


BENCH = Bench("decode_attn", CASES, make, chunks, effort=EFFORT)
