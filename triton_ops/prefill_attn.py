"""prefill_attn in Triton: causal attention of the new rows of many sequences, packed, over their KV caches.

Two numbers at 4096 new rows over 8192 cached, 32/8 heads of 128, bf16: 687 Gflop, 0.96 ms at 716 TFLOP/s; 118 MB.
A program takes one KV head and BLOCK_M rows, all query heads of the group beside each other, so that keys are read once
a group and few of a tile's keys need the causal mask. Tiles of the same keys are neighbours, the longest first. How
many rows a sequence has is read on the device: the grid is that of max_q_len, and what it has too many of ends at once.
A few programs more see to it that rows of no sequence come out as 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned
from ._attention import (
    TYPES,
    alignment,
    attend,
    caches,
    finish,
    fit,
    log2,
    multiprocessors,
    pieces,
    scales,
    store_rows,
    whole_table,
)

FREE_ROWS = 128  # that a program looks for sequences of

DEFAULT = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
SPACE = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in (
        (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 8, 3), (64, 64, 8, 4), (64, 128, 8, 2),
        (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4),
    )
]  # fmt: skip

_SCALARS = (
    "stride_qn", "stride_qh", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh", "stride_vs", "stride_tb",
    "N", "batch", "kv_heads", "tiles", "max_q_len", "capacity", "pages", "window",
)  # fmt: skip


@triton.jit
def _rows_of(starts_ptr, b, there, N, max_q_len):
    """(first row, new rows) of sequences b; one whose rows are not where they can be has none."""
    first, end = tl.load(starts_ptr + b, mask=there, other=0), tl.load(starts_ptr + b + 1, mask=there, other=0)
    new = end - first
    return first, tl.where((first >= 0) & (end <= N) & (new > 0) & (new <= max_q_len), new, 0)


@triton.jit
def _empty(
    starts_ptr, out_ptr, lse_ptr, tile, N, batch, max_q_len, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """0 and -inf to those of rows tile * ROWS … that no sequence has."""
    row = tile * ROWS + tl.arange(0, ROWS)
    free = (row < N).to(tl.int32)
    for b in range(0, batch, 32):
        some = b + tl.arange(0, 32)
        first, new = _rows_of(starts_ptr, some, some < batch, N, max_q_len)
        owned = (row[:, None] >= first[None, :]) & (row[:, None] < (first + new)[None, :])
        free = free & (1 - tl.max(owned.to(tl.int32), 1))
    if tl.max(free, 0) > 0:
        mask = (free > 0)[:, None]
        d = tl.arange(0, 32)
        for head in range(0, HEADS):
            at = row.to(tl.int64) * HEADS + head
            tl.store(lse_ptr + at, tl.full((ROWS,), float("-inf"), tl.float32), mask=free > 0)
            for c in range(0, D, 32):
                zeros = tl.zeros((ROWS, 32), out_ptr.dtype.element_ty)
                tl.store(out_ptr + at[:, None] * D + (c + d)[None, :], zeros, mask=mask & (c + d < D)[None, :])


@triton.jit(do_not_specialize=_SCALARS)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, lengths_ptr, table_ptr, out_ptr, lse_ptr, scale, cap_in, cap_out,
    stride_qn, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_tb,
    N, batch, kv_heads, tiles, max_q_len, capacity, pages, window,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr,
    ALIGN: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, FREE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    looking = (N + FREE_ROWS - 1) // FREE_ROWS
    if pid < looking:
        _empty(starts_ptr, out_ptr, lse_ptr, pid, N, batch, max_q_len, HEADS, D, FREE_ROWS)
        return
    pid -= looking
    tile, pid = tiles - 1 - pid % tiles, pid // tiles
    head, b = (pid % kv_heads).to(tl.int64), (pid // kv_heads).to(tl.int64)
    start, new = _rows_of(starts_ptr, b, b < batch, N, max_q_len)
    if tile * BLOCK_M >= new * GROUP:
        return
    length = tl.load(lengths_ptr + b)
    length = tl.where((length >= 0) & (length <= capacity), length, 0)
    prefix = length - new
    earliest = prefix + tile * BLOCK_M // GROUP + 1  # how many keys the first row sees, and the last one
    latest = prefix + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, new - 1) + 1
    first, whole = 0, 0
    if WINDOW:
        first = tl.maximum(earliest - window, 0) // BLOCK_N
        whole = (tl.maximum(latest - window, 0) + BLOCK_N - 1) // BLOCK_N
    if PAGE > 0:
        k_ptr += head * stride_kh * ALIGN
        v_ptr += head * stride_vh * ALIGN
        table_ptr += b * stride_tb
    else:
        k_ptr += (b * stride_kb + head * stride_kh) * ALIGN
        v_ptr += (b * stride_vb + head * stride_vh) * ALIGN
    start = start.to(tl.int64)
    acc0, acc1, m, total = attend(
        q_ptr + (start * stride_qn + head * GROUP * stride_qh) * ALIGN, k_ptr, v_ptr, table_ptr, None,
        stride_qn, stride_qh, stride_ks, stride_kb, stride_vs, stride_vb,
        tile * BLOCK_M, new, prefix, length, window, pages, 0, scale, cap_in, cap_out,
        first, whole, tl.maximum(earliest, 0) // BLOCK_N, (tl.maximum(latest, 0) + BLOCK_N - 1) // BLOCK_N,
        False, WINDOW, SOFTCAP, NEGATIVE, PAGE, False, ALIKE, ALIGN, GROUP, D, D0, D1, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < new * GROUP
    out0, out1, lse = finish(acc0, acc1, m, total, there)
    row = (start + row // GROUP) * HEADS + head * GROUP + row % GROUP
    store_rows(out_ptr, row * D, out0, out1, there, D, D0, D1)
    tl.store(lse_ptr + row, lse, mask=there)


def config_for(q: Tensor, max_q_len: int) -> dict[str, Any]:
    """The tuned configuration for q [N, Hq, D] with sequences of up to max_q_len new rows; fp16 has bf16's."""
    key = (("dtype", "float32" if q.dtype == torch.float32 else "bfloat16"), ("D", q.shape[2]))
    return _tuned.lookup("prefill_attn", q.device, key, log2(max_q_len), tuple(DEFAULT.items()))


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as the op has them, already checked."""
    n, heads, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((n, heads), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    align = alignment(q, k_cache, v_cache)
    strides, kv_heads, capacity, page = caches(k_cache, v_cache, block_table, align)
    batch, group, table = lengths.shape[0], heads // kv_heads, whole_table(block_table)
    rows = min(max_q_len, n) * group
    few = batch * kv_heads * rows < 128 * multiprocessors(q.device)
    config = config or config_for(q, max_q_len)
    sizes = fit(config, 64 if few else 128, d, q.element_size(), table is not None, align > 1)
    tiles = triton.cdiv(rows, sizes["BLOCK_M"])
    with torch.cuda.device_of(q):
        _prefill_kernel[(triton.cdiv(n, FREE_ROWS) + batch * kv_heads * tiles,)](
            q, k_cache, v_cache, cu_q_lens.contiguous(), lengths.contiguous(), table, out, lse,
            stride_qn=q.stride(0) // align, stride_qh=q.stride(1) // align, **strides,
            stride_tb=0 if table is None else table.stride(0), N=n, batch=batch, kv_heads=kv_heads, tiles=tiles,
            max_q_len=max_q_len, capacity=capacity, pages=k_cache.shape[0], window=window or 0,
            WINDOW=window is not None, PAGE=page, ALIKE=k_cache.stride() == v_cache.stride(), ALIGN=align, HEADS=heads,
            GROUP=group, D=d, FREE_ROWS=FREE_ROWS, **scales(scale, softcap, d), **sizes,
        )  # fmt: skip
    return out, lse


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration, and the default with every head size, type and option."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("prefill_attn", gpu) if e["backend"] == "triton"]
    cases: list[tuple[dict[str, Any], torch.dtype, int, str]] = [
        *((config, bf16, 128, "") for config in _aot.configurations(SPACE, DEFAULT, [])),
        *((DEFAULT, bf16, d, "") for d in (64, 80, 96, 256)),
        (DEFAULT, bf16, 128, "paged"), (DEFAULT, fp16, 128, "paged window softcap"), (DEFAULT, fp16, 256, "window"),
        (DEFAULT, bf16, 33, "odd"), (DEFAULT, bf16, 200, "odd"),
        *((DEFAULT, fp32, d, options) for d, options in ((64, ""), (128, "window"), (256, "paged"))),
        *((e["config"], getattr(torch, e["key"]["dtype"]), e["key"]["D"], "") for e in shipped),
    ]  # fmt: skip
    named: dict[str, _aot.Specialization] = {}
    for config, dtype, d, options in cases:
        sizes = fit(config, 128, d, dtype.itemsize, "paged" in options, "odd" not in options)
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{TYPES[dtype]}")
        types |= {"starts_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32"} | dict.fromkeys(_SCALARS, "i32")
        types |= dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32")
        if "paged" in options:
            types["table_ptr"] = "*i32"
        constants = {
            "WINDOW": "window" in options, "SOFTCAP": "softcap" in options, "NEGATIVE": False,
            "PAGE": 16 if "paged" in options else 0, "ALIKE": True,
            "ALIGN": 1 if "odd" in options else 16 // dtype.itemsize, "HEADS": 32, "GROUP": 4,
            "D": d, "D0": pieces(d)[0], "D1": pieces(d)[1], "FREE_ROWS": FREE_ROWS,
        }  # fmt: skip
        name = "-".join([TYPES[dtype], f"D{d}", *options.split(), *(f"{v}" for v in sizes.values())])
        named[name] = _aot.Specialization(name, _prefill_kernel, types, constants, sizes)
    yield from named.values()
