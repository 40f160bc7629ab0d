"""prefill_attn: chunks of 512 to 8192 new rows against 0 to 16384 cached ones (S counts both), two of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import peers_attention
from .harness import Bench, Call, Case
from .peers import PEERS
from .timing import Effort

BF16, FP32 = torch.bfloat16, torch.float32
EFFORT = Effort(cuda_ms=60.0, cpu_ms=1000.0)
PIECE = 1 << 25  # scores of one call of the reference: 0.3 GB in float64, of which it holds several
PEERS["prefill_attn"] = peers_attention.PREFILL


def case(
    t: int,
    cached: int,
    hq: int = 32,
    hkv: int = 8,
    *,
    b: int = 1,
    d: int = 128,
    page: int = 0,
    dtype: torch.dtype = BF16,
    device: str = "cuda",
) -> Case:
    sizes = {"B": b, "T": t, "S": t + cached, "Hq": hq, "Hkv": hkv, "D": d}
    return Case({**sizes, "page_size": page} if page else sizes, dtype, device)


CASES = [
    *(case(t, cached) for t in (512, 2048, 8192) for cached in (0, 4096, 16384)),
    case(2048, 4096, page=16),
    case(2048, 4096, d=80),
    case(2048, 4096, d=64),
    case(2048, 0, b=4),
    case(512, 512, 9, 3, d=64, dtype=FP32, device="cpu"),
    case(512, 512, 9, 3, d=64, device="cpu"),
]


def make(case: Case, device: torch.device) -> Call:
    """Every sequence has T new rows and S in all; pages in random order."""
    b, t, s, hq, hkv, d = (case.sizes[name] for name in ("B", "T", "S", "Hq", "Hkv", "D"))
    page = case.sizes.get("page_size", 0)
    shape = (b * s // page, page, hkv, d) if page else (b, hkv, s, d)
    q = torch.randn(b * t, hq, d, device=device, dtype=case.dtype)
    k, v = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2))
    starts = (torch.arange(b + 1, dtype=torch.int32) * t).to(device)
    table = torch.randperm(b * s // page).int().reshape(b, s // page).to(device) if page else None
    kwargs = {} if table is None else {"block_table": table}
    return Call((q, k, v, starts, torch.full((b,), s, dtype=torch.int32).to(device), t), kwargs)


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """Some rows of one KV head of a sequence at a time: rows i … j - 1 of n are the last ones of a shorter sequence."""
    q, k, v, starts, lengths, t = call.args
    paged = "block_table" in call.kwargs
    kv_heads = k.shape[2 if paged else 1]
    group, s = q.shape[1] // kv_heads, int(lengths[0])
    step = max(1, PIECE // (group * s))
    for b in range(lengths.shape[0]):
        kwargs = {name: table[b : b + 1] for name, table in call.kwargs.items()}
        for head in range(kv_heads):
            own, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
            some_k, some_v = (c[:, :, own] if paged else c[b : b + 1, own] for c in (k, v))
            for first in range(0, t, step):
                rows = slice(b * t + first, b * t + min(first + step, t))
                n = rows.stop - rows.start
                args = (
                    q[rows, heads],
                    some_k,
                    some_v,
                    starts.new_tensor([0, n]),
                    lengths.new_tensor([s - t + first + n]),
                )
                yield tuple(o[rows, heads] for o in output), Call((*args, n), kwargs)


BENCH = Bench("prefill_attn", CASES, make, chunks, effort=EFFORT)
