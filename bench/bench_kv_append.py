"""kv_append, kv_compact, kv_scatter: decode steps and draft trees of Llama 8B and Qwen2 1.5B, MAR's refreshed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .harness import Bench, Call, Case
from .timing import Effort

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LLAMA, QWEN, SMOLLM = (8, 128), (2, 128), (3, 64)  # Hkv, D
PAGE = 16
EFFORT = Effort(cuda_ms=40.0, cpu_ms=400.0)


def case(
    b: int, t: int, s: int, heads: tuple[int, int], dtype: torch.dtype = BF16, *, device: str = "cuda", **more: Any
) -> Case:
    """S rows in the caches of each of B sequences, T more come; `more`: page_size, rope."""
    sizes = {"B": b, "T": t, "S": s, "Hkv": heads[0], "D": heads[1]}
    return Case(sizes | more, dtype, device)


APPEND_CASES = [
    *(case(b, t, 1024, LLAMA, **page) for page in ({}, {"page_size": PAGE}) for b, t in ((1, 1), (64, 1), (64, 16))),
    case(64, 1, 1024, QWEN),
    case(64, 1, 1024, LLAMA, rope=True),
    case(64, 16, 1024, LLAMA, page_size=PAGE, rope=True),
    case(8, 64, 2048, (32, 128)),
    case(1, 2048, 2048, LLAMA),
    case(64, 1, 1024, LLAMA, FP16),
    *(case(b, t, 1024, SMOLLM, d, device="cpu") for b, t in ((1, 1), (8, 1), (8, 16)) for d in (FP32, BF16)),
    case(8, 1, 1024, SMOLLM, FP32, device="cpu", page_size=PAGE),
    case(8, 16, 1024, SMOLLM, FP32, device="cpu", rope=True),
    case(8, 512, 512, LLAMA, BF16, device="cpu"),
]
COMPACT_CASES = [
    *(case(b, t, 1024, LLAMA, **page) for page in ({}, {"page_size": PAGE}) for b, t in ((1, 16), (64, 16), (64, 64))),
    case(64, 16, 1024, QWEN),
    *(case(8, 16, 1024, SMOLLM, dtype, device="cpu") for dtype in (FP32, BF16)),
]
SCATTER_CASES = [
    *(case(b, 64, 320, (heads, d)) for b, heads, d in ((16, 12, 64), (128, 16, 64), (128, 16, 80))),
    case(64, 1, 1024, LLAMA),
    *(case(4, 64, 320, (12, 64), dtype, device="cpu") for dtype in (FP32, BF16)),
]


def _values(device: torch.device) -> torch.device:
    """Where small integer tensors live: costs depend on what they hold, which the meta device cannot say."""
    return torch.device("cpu") if device.type == "meta" else device


def _caches(case: Case, device: torch.device) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Caches with room for the new rows and a page more, pages in random order."""
    b, t, s, heads, dim = (case.sizes[name] for name in ("B", "T", "S", "Hkv", "D"))
    page = case.sizes.get("page_size", 0)
    capacity = -(-(s + t) // PAGE) * PAGE + PAGE
    if not page:
        shape: tuple[int, ...] = (b, heads, capacity, dim)
        return [torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2)], {}
    table = torch.randperm(b * capacity // page).reshape(b, -1).to(_values(device), torch.int32)
    shape = (b * capacity // page, page, heads, dim)
    return [torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2)], {"block_table": table}


def _rows(case: Case, device: torch.device) -> list[torch.Tensor]:
    """New k and v as a projection makes them: [B, T, Hkv, D] in memory."""
    b, t, heads, dim = (case.sizes[name] for name in ("B", "T", "Hkv", "D"))
    return [torch.randn(b, t, heads, dim, device=device, dtype=case.dtype).transpose(1, 2) for _ in range(2)]


def make(case: Case, device: torch.device) -> Call:
    """All sequences S rows long: what a static cache of other libraries requires too."""
    caches, kwargs = _caches(case, device)
    lengths = torch.full((case.sizes["B"],), case.sizes["S"], dtype=torch.int32, device=_values(device))
    if case.sizes.get("rope"):
        angle = torch.rand(case.sizes["S"] + case.sizes["T"], case.sizes["D"] // 2, device=device) * 6.3
        kwargs |= {"cos": angle.cos(), "sin": angle.sin()}
    return Call((*caches, *_rows(case, device), lengths), kwargs)


def make_compact(case: Case, device: torch.device) -> Call:
    """Of each tree the root and every third node after it is accepted, at most 6 rows: 5 of them move."""
    caches, kwargs = _caches(case, device)
    b, t = case.sizes["B"], case.sizes["T"]
    path = torch.arange(0, t, 3)[:6]
    index = torch.full((b, t), -1, dtype=torch.int32)
    index[:, : len(path)] = path.to(torch.int32)
    here = _values(device)
    lengths, counts = (torch.full((b,), n, dtype=torch.int32, device=here) for n in (case.sizes["S"], len(path)))
    return Call((*caches, lengths, index.to(here), counts), kwargs)


def make_scatter(case: Case, device: torch.device) -> Call:
    """T of S positions, another choice for each sequence."""
    b, t, s, heads, dim = (case.sizes[name] for name in ("B", "T", "S", "Hkv", "D"))
    caches = [torch.randn(b, heads, s, dim, device=device, dtype=case.dtype) for _ in range(2)]
    index = torch.rand(b, s).argsort(1)[:, :t].to(_values(device), torch.int32)
    return Call((*caches, *_rows(case, device), index))


def whole(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """Both caches at once."""
    yield output, call


APPEND = Bench("kv_append", APPEND_CASES, make, whole, effort=EFFORT)
COMPACT = Bench("kv_compact", COMPACT_CASES, make_compact, whole, "kv_append", EFFORT)
SCATTER = Bench("kv_scatter", SCATTER_CASES, make_scatter, whole, "kv_append", EFFORT)
BENCHES = (APPEND, COMPACT, SCATTER)
