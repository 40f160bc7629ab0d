"""decode_attn in Triton: a few new rows a sequence over its KV cache, causal or along a tree.

Two numbers at B 64, S 18432, 12/2 heads of 128, T 1, bf16: 1.21 GB of keys and values, 400 us at 3.02 TB/s; 7.2 Gflop.
A tree of 64 rows over 8192 keys, 32/8 heads, B 8: 268 MB and 69 Gflop, 96 us at 716 TFLOP/s.

A program takes one KV head of one sequence and up to BLOCK_M of its query rows (all query heads of the group times T),
so keys are read once a tile. Few sequences are split over S: how many parts there can be follows from shapes, how many
a sequence uses and where they begin from its own length, read on the device. So nothing waits for the host, and what
else is in the batch changes no bit. Parts leave sums, maxima and weights in fp32, and a second kernel merges them.
"""

from __future__ import annotations

import functools
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
    power_of_two,
    scales,
    store_rows,
    whole_table,
)

PART_KEYS = 256  # a part of a split sequence has at least so many
MAX_PARTS = 128
MERGE = 16  # parts that the merging kernel holds at a time

# BLOCK_M: rows of a tile at most. PROGRAMS: wanted on each multiprocessor for tiles of 16 rows, fewer for larger ones.
DEFAULT = {"BLOCK_M": 128, "BLOCK_N": 64, "PROGRAMS": 8, "num_warps": 4, "num_stages": 3}
SPACE = [
    {"BLOCK_M": m, "BLOCK_N": n, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
    for m, n, programs, warps, stages in (
        (128, 64, 4, 4, 3), (128, 64, 16, 4, 3), (128, 64, 8, 4, 4), (128, 64, 16, 4, 4), (128, 64, 4, 8, 4),
        (128, 128, 8, 4, 2), (128, 128, 4, 8, 3), (128, 32, 16, 4, 4), (128, 32, 16, 2, 4), (128, 64, 2, 4, 4),
        (64, 64, 8, 4, 3), (64, 64, 4, 4, 4), (64, 128, 4, 4, 2), (64, 128, 8, 4, 3), (64, 32, 8, 4, 4),
        (64, 32, 16, 4, 3), (128, 64, 1, 4, 4), (128, 128, 1, 4, 3), (128, 128, 2, 4, 2), (128, 64, 3, 4, 4),
    )
]  # fmt: skip

_SCALARS = (
    "stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh",
    "stride_vs", "stride_tb", "T", "kv_heads", "tiles", "parts", "capacity", "pages", "window",
)  # fmt: skip


@triton.jit
def _shares(
    lengths_ptr, q_lens_ptr, b, capacity, parts, window, T,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, PART_KEYS: tl.constexpr,
):  # fmt: skip
    """(length, new rows, first block, blocks, parts used) of a sequence; one with values that cannot be has no rows."""
    length = tl.load(lengths_ptr + b)
    length = tl.where((length >= 0) & (length <= capacity), length, 0)
    new = T
    if q_lens_ptr is not None:
        new = tl.load(q_lens_ptr + b)
        new = tl.where((new >= 0) & (new <= T), new, 0)
    first = 0
    if WINDOW:
        first = tl.maximum(length - new + 1 - window, 0) // BLOCK_N
    blocks = tl.where(new > 0, (length + BLOCK_N - 1) // BLOCK_N - first, 0)
    used = tl.minimum(parts, (blocks * BLOCK_N + PART_KEYS - 1) // PART_KEYS)
    return length, new, first, blocks, used


@triton.jit(do_not_specialize=_SCALARS)
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, tree_ptr, table_ptr, q_lens_ptr, out_ptr, lse_ptr, work_ptr,
    scale, cap_in, cap_out,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_tb,
    T, kv_heads, tiles, parts, capacity, pages, window,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, PAGE: tl.constexpr,
    ALIKE: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, PART_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of the same keys are neighbours, then the heads of a page. SPLIT: each part to work_ptr."""
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    head, pid = (pid % kv_heads).to(tl.int64), pid // kv_heads
    part, b = pid % parts, (pid // parts).to(tl.int64)
    length, new, first, blocks, used = _shares(
        lengths_ptr, q_lens_ptr, b, capacity, parts, window, T, WINDOW, BLOCK_N, PART_KEYS
    )
    if SPLIT:
        if part >= used:
            return
        each, more = blocks // used, blocks % used
        first += part * each + tl.minimum(part, more)
        blocks = each + (part < more).to(tl.int32)

    prefix = length - new
    whole_end = length // BLOCK_N if T == 1 else tl.maximum(prefix, 0) // BLOCK_N
    if PAGE > 0:
        k_ptr += head * stride_kh * ALIGN
        v_ptr += head * stride_vh * ALIGN
        table_ptr += b * stride_tb
    else:
        k_ptr += (b * stride_kb + head * stride_kh) * ALIGN
        v_ptr += (b * stride_vb + head * stride_vh) * ALIGN
    if tree_ptr is not None:
        tree_ptr += b * T
    acc0, acc1, m, total = attend(
        q_ptr + (b * stride_qb + head * GROUP * stride_qh) * ALIGN, k_ptr, v_ptr, table_ptr, tree_ptr,
        stride_qt, stride_qh, stride_ks, stride_kb, stride_vs, stride_vb,
        tile * BLOCK_M, new, prefix, length, window, pages, T, scale, cap_in, cap_out,
        first, first, whole_end, first + blocks,
        tree_ptr is not None, WINDOW, SOFTCAP, NEGATIVE, PAGE, WINDOW or BLOCK_M <= 32, ALIKE, ALIGN, GROUP,
        D, D0, D1, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < T * GROUP
    if SPLIT:
        rows = (tl.num_programs(0) // tiles).to(tl.int64) * T * GROUP  # of all parts
        row = ((b * kv_heads + head) * parts + part) * T * GROUP + row
        store_rows(work_ptr, row * D, acc0, acc1, there, D, D0, D1)
        tl.store(work_ptr + rows * D + row, m, mask=there)
        tl.store(work_ptr + rows * (D + 1) + row, total, mask=there)
    else:
        out0, out1, lse = finish(acc0, acc1, m, total, row // GROUP < new)
        row = ((b * kv_heads + head) * GROUP + row % GROUP) * T + row // GROUP
        store_rows(out_ptr, row * D, out0, out1, there, D, D0, D1)
        tl.store(lse_ptr + row, lse, mask=there)


@triton.jit(do_not_specialize=["T", "kv_heads", "parts", "capacity", "window"])
def _merge_kernel(
    work_ptr, lengths_ptr, q_lens_ptr, out_ptr, lse_ptr, T, kv_heads, parts, capacity, window,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, PART_KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program a row of out; the parts in their order, CHUNK at a time. WIDTH, PARTS: powers of two."""
    rows = T * GROUP
    pid = tl.program_id(0)
    row, bh = pid % rows, (pid // rows).to(tl.int64)
    _, new, _, _, used = _shares(
        lengths_ptr, q_lens_ptr, bh // kv_heads, capacity, parts, window, T, WINDOW, BLOCK_N, PART_KEYS
    )
    t = row // GROUP
    used = tl.where(t < new, used, 0)
    all_rows = tl.num_programs(0).to(tl.int64) * parts
    m_ptr = work_ptr + all_rows * D + bh * parts * rows + row
    total_ptr = m_ptr + all_rows
    work_ptr += (bh * parts * rows + row) * D

    part = tl.arange(0, PARTS)
    m = tl.load(m_ptr + part * rows, mask=part < used, other=float("-inf"))
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(total_ptr + part * rows, mask=part < used, other=0.0) * tl.exp2(m - base), 0)
    d = tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, used, CHUNK):
        some = first + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(m_ptr + some * rows, mask=some < used, other=float("-inf")) - base)
        outs = tl.load(
            work_ptr + (some * rows * D)[:, None] + d[None, :],
            mask=(some < used)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(outs * weight[:, None], 0)
    empty = total == 0.0
    acc = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    at = (bh * GROUP + row % GROUP) * T + t
    tl.store(out_ptr + at * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + at, lse)


def config_for(q: Tensor, kv_heads: int, reach: int, paged: bool) -> dict[str, Any]:
    """The tuned configuration for q [B, Hq, T, D] over so many keys; fp16 has bf16's."""
    batch, heads, rows, d = q.shape
    key = (
        ("dtype", "float32" if q.dtype == torch.float32 else "bfloat16"),
        ("D", d),
        ("rows", max(16, min(256, power_of_two(rows * heads // kv_heads)))),
        ("paged", paged),
    )
    return _tuned.lookup("decode_attn", q.device, key, log2(batch * kv_heads * reach), tuple(DEFAULT.items()))


@functools.lru_cache(4096)
def _plan(
    config: tuple[tuple[str, Any], ...],
    shape: tuple[int, int, int, int],
    itemsize: int,
    device: torch.device,
    kv_heads: int,
    reach: int,
    paged: bool,
    vectors: bool,
    masks: bool,
) -> tuple[dict[str, Any], int, int]:
    (batch, heads, rows, d), wish = shape, dict(config)
    rows *= heads // kv_heads
    sizes = fit(wish, power_of_two(rows), d, itemsize, paged, vectors, masks)
    tiles = triton.cdiv(rows, sizes["BLOCK_M"])
    wanted = wish["PROGRAMS"] * 16 * multiprocessors(device) // sizes["BLOCK_M"]
    return sizes, tiles, max(1, min(wanted // (batch * kv_heads * tiles), reach // PART_KEYS, MAX_PARTS))


def plan(
    q: Tensor,
    kv_heads: int,
    reach: int,
    paged: bool,
    vectors: bool = True,
    masks: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], int, int]:
    """(sizes, tiles of a KV head, parts of a sequence), from shapes alone.

    reach: how many keys may be seen; vectors, masks: as fit() has them.
    """
    wish = tuple((config or config_for(q, kv_heads, reach, paged)).items())
    return _plan(wish, tuple(q.shape), q.element_size(), q.device, kv_heads, reach, paged, vectors, masks)


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels; arguments as the op has them, already checked."""
    batch, heads, rows, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    align = alignment(q, k_cache, v_cache)
    strides, kv_heads, capacity, page = caches(k_cache, v_cache, block_table, align)
    table = whole_table(block_table)
    reach = capacity if window is None else min(capacity, window + rows)
    masks = tree_mask is not None and window is not None
    sizes, tiles, parts = plan(q, kv_heads, reach, table is not None, align > 1, masks, config)
    work = q.new_empty(lse.numel() * parts * (d + 2), dtype=torch.float32) if parts > 1 else None
    lengths, q_lens = lengths.contiguous(), None if q_lens is None else q_lens.contiguous()
    shared = {"WINDOW": window is not None, "GROUP": heads // kv_heads, "D": d, "PART_KEYS": PART_KEYS}
    with torch.cuda.device_of(q):
        _decode_kernel[(batch * kv_heads * tiles * parts,)](
            q, k_cache, v_cache, lengths, None if tree_mask is None else tree_mask.contiguous(), table, q_lens,
            out, lse, work,
            stride_qb=q.stride(0) // align, stride_qh=q.stride(1) // align, stride_qt=q.stride(2) // align, **strides,
            stride_tb=0 if table is None else table.stride(0), T=rows, kv_heads=kv_heads, tiles=tiles, parts=parts,
            capacity=capacity, pages=k_cache.shape[0], window=window or 0, SPLIT=parts > 1, PAGE=page,
            ALIKE=k_cache.stride() == v_cache.stride(), ALIGN=align,
            **scales(scale, softcap, d), **shared, **sizes,
        )  # fmt: skip
        if parts > 1:
            _merge_kernel[(lse.numel(),)](
                work, lengths, q_lens, out, lse, rows, kv_heads, parts, capacity, window or 0,
                WIDTH=power_of_two(d), PARTS=power_of_two(parts), CHUNK=MERGE,
                BLOCK_N=sizes["BLOCK_N"], num_warps=2, **shared,
            )  # fmt: skip
    return out, lse


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration for one row and for a tree, and the default with every head size, type and option."""
    bf16 = torch.bfloat16
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("decode_attn", gpu) if e["backend"] == "triton"]
    cases: list[tuple[dict[str, Any], torch.dtype, int, int, str]] = []
    for config in _aot.configurations(SPACE, DEFAULT, []):
        cases += [(config, bf16, 128, rows, options) for rows, options in ((4, ""), (256, "tree split"))]
    for d in (64, 80, 96, 128, 256):
        cases += [(DEFAULT, bf16, d, rows, "split") for rows in (6, 32, 64, 256)]
    cases += [
        (DEFAULT, bf16, 128, 4, "paged split"), (DEFAULT, bf16, 128, 256, "paged tree"),
        (DEFAULT, torch.float16, 128, 8, "tree paged window softcap ragged split"),
        (DEFAULT, bf16, 256, 64, "paged tree"), (DEFAULT, bf16, 128, 256, "tree window softcap ragged"),
        (DEFAULT, torch.float16, 256, 128, "window softcap ragged"),
        *((DEFAULT, bf16, d, rows, "odd split") for d in (33, 200) for rows in (4, 256)),
        *((DEFAULT, torch.float32, d, rows, options)
          for d, rows, options in ((64, 4, ""), (128, 256, "tree split"), (256, 4, "paged"), (80, 8, "window"))),
        *((e["config"], getattr(torch, e["key"]["dtype"]), e["key"]["D"], e["key"]["rows"],
           "paged split" if e["key"]["paged"] else "split") for e in shipped),
    ]  # fmt: skip
    named: dict[str, _aot.Specialization] = {}
    for config, dtype, d, rows, options in cases:
        masks = "tree" in options and "window" in options
        sizes = fit(config, rows, d, dtype.itemsize, "paged" in options, "odd" not in options, masks)
        name = "-".join([TYPES[dtype], f"D{d}", *options.split(), *(f"{v}" for v in sizes.values())])
        named[name] = _aot.Specialization(name, _decode_kernel, *_signature(dtype, d, options), sizes)
        if "split" in options:
            constants = {
                "WINDOW": False, "GROUP": 4, "D": d, "WIDTH": power_of_two(d), "PARTS": MAX_PARTS,
                "CHUNK": MERGE, "PART_KEYS": PART_KEYS, "BLOCK_N": 64,
            }  # fmt: skip
            types = {"work_ptr": "*fp32", "lengths_ptr": "*i32", "out_ptr": f"*{TYPES[dtype]}", "lse_ptr": "*fp32"}
            types |= dict.fromkeys(("T", "kv_heads", "parts", "capacity", "window"), "i32")
            name = f"merge-{TYPES[dtype]}-D{d}"
            named[name] = _aot.Specialization(name, _merge_kernel, types, constants, {"num_warps": 2})
    yield from named.values()


def _signature(dtype: torch.dtype, d: int, options: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(types, constants) of _decode_kernel with 4 query heads a KV head."""
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{TYPES[dtype]}")
    types |= {"lengths_ptr": "*i32", "lse_ptr": "*fp32"} | dict.fromkeys(_SCALARS, "i32")
    types |= dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32")
    optional = {"tree": ("tree_ptr", "*i64"), "paged": ("table_ptr", "*i32"), "ragged": ("q_lens_ptr", "*i32"),
                "split": ("work_ptr", "*fp32")}  # fmt: skip
    types |= dict(optional[option] for option in options.split() if option in optional)
    d0, d1 = pieces(d)
    return types, {
        "SPLIT": "split" in options, "WINDOW": "window" in options, "SOFTCAP": "softcap" in options,
        "NEGATIVE": False, "PAGE": 16 if "paged" in options else 0, "ALIKE": "ragged" not in options,
        "ALIGN": 1 if "odd" in options else 16 // dtype.itemsize, "GROUP": 4,
        "D": d, "D0": d0, "D1": d1, "PART_KEYS": PART_KEYS,
    }  # fmt: skip
