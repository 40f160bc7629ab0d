"""kv_append, kv_compact, kv_scatter in Triton: rows into, or within, KV caches, in place, one launch each.

Two numbers at B 64, Hkv 8, T 16, D 128, bf16: 67 MB (half read, half written), 22 us at 3.02 TB/s; at T 1 the launch.
A program of the append kernel carries ROWS rows of k and of v, whichever sequence and head they belong to; kv_scatter
is the same kernel with positions of the caller's. A program of the compact kernel has one head of one sequence: it
loads BATCH rows before it stores the first of them, and an accepted row never lies before its new place, so nothing is
overwritten unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot

ELEMENTS = 1024  # of k that a program carries
BATCH = 16
WARPS = 4


@triton.jit
def _row_offsets(
    table_ptr, sequence, head, position, found, n_blocks, capacity, table_row, table_column,
    outer, head_stride, row_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """(offset of each row, whether it exists); BLOCK is the rows of a page, 0 without pages."""
    found = found & (position >= 0) & (position < capacity)
    if BLOCK > 0:
        entry = table_ptr + sequence * table_row + position // BLOCK * table_column
        page = tl.load(entry, mask=found, other=-1).to(tl.int64)
        found = found & (page >= 0) & (page < n_blocks)
        return page * outer + head * head_stride + position % BLOCK * row_stride, found
    else:
        return sequence * outer + head * head_stride + position * row_stride, found


@triton.jit(do_not_specialize=["rows", "heads", "new_rows", "n_blocks", "capacity", "max_positions"])
def _append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr, q_lens_ptr, table_ptr, cos_ptr, sin_ptr, positions_ptr,
    rows, heads, new_rows, n_blocks, capacity, max_positions, half, dim,
    length_stride, length_column, q_len_stride, position_row, position_column, table_row, table_column,
    k_outer, k_head, k_row, v_outer, v_head, v_row,
    k_from_batch, k_from_head, k_from_row, v_from_batch, v_from_head, v_from_row, cos_row, sin_row,
    SCATTER: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """lengths_ptr holds a position for each row where SCATTER, else a length for each sequence."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = (row < rows) & (row >= 0)  # the last program's may pass 2^31
    rest = row // heads
    head = (row - rest * heads).to(tl.int64)
    sequence = rest // new_rows
    t = (rest - sequence * new_rows).to(tl.int64)
    sequence = sequence.to(tl.int64)
    if SCATTER:
        entry = lengths_ptr + sequence * length_stride + t * length_column
        position = tl.load(entry, mask=found, other=-1).to(tl.int64)
    else:
        length = tl.load(lengths_ptr + sequence * length_stride, mask=found, other=-1).to(tl.int64)
        found = found & (length >= 0)
        position = length + t
        if q_lens_ptr is not None:
            found = found & (t < tl.load(q_lens_ptr + sequence * q_len_stride, mask=found, other=0))
    angle = position
    if cos_ptr is not None:
        if positions_ptr is not None:
            entry = positions_ptr + sequence * position_row + t * position_column
            angle = tl.load(entry, mask=found, other=-1).to(tl.int64)
        found = found & (angle >= 0) & (angle < max_positions)
    k_to, found = _row_offsets(
        table_ptr, sequence, head, position, found, n_blocks, capacity, table_row, table_column,
        k_outer, k_head, k_row, BLOCK,
    )  # fmt: skip
    v_to, found = _row_offsets(
        table_ptr, sequence, head, position, found, n_blocks, capacity, table_row, table_column,
        v_outer, v_head, v_row, BLOCK,
    )  # fmt: skip

    column = tl.arange(0, DIM)[None, :]
    mask = found[:, None] & (column < dim)
    k_from = (sequence * k_from_batch + head * k_from_head + t * k_from_row)[:, None]
    v_from = (sequence * v_from_batch + head * v_from_head + t * v_from_row)[:, None]
    k = tl.load(k_ptr + k_from + column, mask=mask)
    v = tl.load(v_ptr + v_from + column, mask=mask)
    if cos_ptr is not None:
        if INTERLEAVED:
            second, other, pair = column % 2 == 1, column ^ 1, column // 2
        else:
            second = column >= half
            other = tl.where(second, column - half, column + half)
            pair = tl.where(second, column - half, column)
        turned = mask & (column < 2 * half)
        partner = tl.load(k_ptr + k_from + other, mask=turned, other=0).to(tl.float32)
        cos = tl.load(cos_ptr + (angle * cos_row)[:, None] + pair, mask=turned, other=0).to(tl.float32)
        sin = tl.load(sin_ptr + (angle * sin_row)[:, None] + pair, mask=turned, other=0).to(tl.float32)
        product = partner * sin
        rotated = k.to(tl.float32) * cos + tl.where(second, product, -product)
        k = tl.where(turned, rotated.to(k.dtype), k)
    tl.store(k_cache_ptr + k_to[:, None] + column, k, mask=mask)
    tl.store(v_cache_ptr + v_to[:, None] + column, v, mask=mask)


@triton.jit(do_not_specialize=["heads", "tree", "n_blocks", "capacity"])
def _compact_kernel(
    k_cache_ptr, v_cache_ptr, lengths_ptr, index_ptr, count_ptr, table_ptr,
    heads, tree, n_blocks, capacity, dim,
    length_stride, index_row, index_column, count_stride, table_row, table_column,
    k_outer, k_head, k_row, v_outer, v_head, v_row,
    BLOCK: tl.constexpr, BATCH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Heads of one sequence, BATCH accepted rows at a time."""
    program = tl.program_id(0).to(tl.int64)
    head, sequence = program % heads, program // heads
    length = tl.load(lengths_ptr + sequence * length_stride).to(tl.int64)
    count = tl.minimum(tl.load(count_ptr + sequence * count_stride), tree)
    if length < 0:
        count = tl.zeros_like(count)
    column = tl.arange(0, DIM)[None, :]
    index_ptr += sequence * index_row
    for first in range(0, count, BATCH):
        i = first + tl.arange(0, BATCH)
        taken = i < count
        index = tl.load(index_ptr + i * index_column, mask=taken, other=0)
        before = tl.load(index_ptr + (i - 1) * index_column, mask=taken & (i > 0), other=-1)
        bad = taken & ((index <= before) | (index >= tree))
        count = tl.minimum(count, tl.min(tl.where(bad, i, count)))  # from the first bad index on nothing moves
        moved = (i < count) & (index != i)
        k_from, found = _row_offsets(
            table_ptr, sequence, head, length + index, moved, n_blocks, capacity, table_row, table_column,
            k_outer, k_head, k_row, BLOCK,
        )  # fmt: skip
        k_to, found = _row_offsets(
            table_ptr, sequence, head, length + i, found, n_blocks, capacity, table_row, table_column,
            k_outer, k_head, k_row, BLOCK,
        )  # fmt: skip
        v_from, found = _row_offsets(
            table_ptr, sequence, head, length + index, found, n_blocks, capacity, table_row, table_column,
            v_outer, v_head, v_row, BLOCK,
        )  # fmt: skip
        v_to, found = _row_offsets(
            table_ptr, sequence, head, length + i, found, n_blocks, capacity, table_row, table_column,
            v_outer, v_head, v_row, BLOCK,
        )  # fmt: skip
        mask = found[:, None] & (column < dim)
        k = tl.load(k_cache_ptr + k_from[:, None] + column, mask=mask)
        v = tl.load(v_cache_ptr + v_from[:, None] + column, mask=mask)
        tl.debug_barrier()  # rows are loaded by other threads than those that store over them
        tl.store(k_cache_ptr + k_to[:, None] + column, k, mask=mask)
        tl.store(v_cache_ptr + v_to[:, None] + column, v, mask=mask)


def _strides(cache: Tensor, paged: bool) -> tuple[int, int, int]:
    """From one page or sequence, head and row to the next."""
    outer, second, third, _ = cache.stride()
    return (outer, third, second) if paged else (outer, second, third)


def _pages(k_cache: Tensor, block_table: Tensor | None) -> tuple[int, int, int, int, int]:
    """(pages, capacity, strides of the table, rows of a page or 0)."""
    if block_table is None:
        return k_cache.shape[0], k_cache.shape[2], 0, 0, 0
    block = k_cache.shape[1]
    table_row, table_column = block_table.stride()
    return k_cache.shape[0], block_table.shape[1] * block, table_row, table_column, block


def _launch(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    q_lens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    positions: Tensor | None = None,
    scatter: bool = False,
) -> None:
    batch, heads, new_rows, dim = k.shape
    rows = batch * heads * new_rows
    pages, capacity, table_row, table_column, block = _pages(k_cache, block_table)
    if rows == 0 or capacity == 0:
        return
    columns = triton.next_power_of_2(dim)
    each = max(1, ELEMENTS // columns)
    with torch.cuda.device_of(k_cache):
        _append_kernel[(triton.cdiv(rows, each),)](
            k_cache, v_cache, k, v, lengths, q_lens, block_table, cos, sin, positions,
            rows, heads, new_rows, pages, capacity, 0 if cos is None else cos.shape[0],
            0 if cos is None else cos.shape[1], dim,
            lengths.stride(0), lengths.stride(1) if scatter else 0, 0 if q_lens is None else q_lens.stride(0),
            *((0, 0) if positions is None else positions.stride()), table_row, table_column,
            *_strides(k_cache, block > 0), *_strides(v_cache, block > 0), *k.stride()[:3], *v.stride()[:3],
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
            SCATTER=scatter, INTERLEAVED=interleaved, BLOCK=block, ROWS=each, DIM=columns, num_warps=WARPS,
        )  # fmt: skip


def launch(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    positions: Tensor | None = None,
) -> None:
    """kv_append; arguments as the op has them, already checked."""
    _launch(
        k_cache, v_cache, k, v, lengths, block_table, q_lens, cos, sin, rope_interleaved, positions
    )  # fmt: skip


def kv_scatter_launch(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """kv_scatter; arguments as the op has them, already checked."""
    _launch(k_cache, v_cache, k, v, index, None, scatter=True)


def kv_compact_launch(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """kv_compact; arguments as the op has them, already checked."""
    pages, capacity, table_row, table_column, block = _pages(k_cache, block_table)
    heads, dim = k_cache.shape[2 if block_table is not None else 1], k_cache.shape[3]
    batch, tree = accept_index.shape
    if batch * heads * capacity == 0 or tree < 2:  # a root alone never moves
        return
    columns = triton.next_power_of_2(dim)
    with torch.cuda.device_of(k_cache):
        _compact_kernel[(batch * heads,)](
            k_cache, v_cache, lengths, accept_index, accept_len, block_table,
            heads, tree, pages, capacity, dim,
            lengths.stride(0), *accept_index.stride(), accept_len.stride(0), table_row, table_column,
            *_strides(k_cache, block > 0), *_strides(v_cache, block > 0),
            BLOCK=block, BATCH=max(1, min(BATCH, 4096 // columns)), DIM=columns, num_warps=WARPS,
        )  # fmt: skip


def specializations() -> Iterator[_aot.Specialization]:
    """Each kernel with and without pages, rotation and counts, for every size of an element and some sizes of a row."""
    sizes = ("rows", "heads", "new_rows", "tree", "n_blocks", "capacity", "max_positions", "half", "dim")
    for data, dim, block, rotary, scatter in (
        ("bf16", 128, 0, "", False), ("bf16", 128, 16, "half", False), ("fp16", 80, 16, "pairs", False),
        ("fp32", 256, 0, "half", False), ("fp16", 64, 0, "", True), ("fp32", 128, 1, "", False),
    ):  # fmt: skip
        columns = triton.next_power_of_2(dim)
        pointers = dict.fromkeys(("k_cache_ptr", "v_cache_ptr", "k_ptr", "v_ptr"), f"*{data}")
        pointers |= {"lengths_ptr": "*i32"}
        if block:
            pointers |= dict.fromkeys(("table_ptr", "q_lens_ptr"), "*i32")
        if rotary:
            pointers |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i32"}
        name = f"{data}-{dim}{f'-pages{block}' * (block > 0)}{f'-{rotary}' * bool(rotary)}{'-scatter' * scatter}"
        yield _specialization(
            f"append-{name}", _append_kernel, pointers, sizes,
            SCATTER=scatter, INTERLEAVED=rotary == "pairs", BLOCK=block, ROWS=max(1, ELEMENTS // columns), DIM=columns,
        )  # fmt: skip
        if scatter or rotary:
            continue
        pointers = {"k_cache_ptr": f"*{data}", "v_cache_ptr": f"*{data}"}
        pointers |= dict.fromkeys(("lengths_ptr", "index_ptr", "count_ptr"), "*i32")
        if block:
            pointers["table_ptr"] = "*i32"
        yield _specialization(
            f"compact-{name}", _compact_kernel, pointers, sizes,
            BLOCK=block, BATCH=max(1, min(BATCH, 4096 // columns)), DIM=columns,
        )  # fmt: skip


def _specialization(
    name: str, kernel: Any, pointers: dict[str, str], sizes: tuple[str, ...], **constants: Any
) -> _aot.Specialization:
    """Scalars are 32-bit sizes and 64-bit strides."""
    scalars = [n for n in kernel.arg_names if not n.endswith("_ptr") and n not in constants]
    types = pointers | {n: "i32" if n in sizes else "i64" for n in scalars}
    return _aot.Specialization(name, kernel, types, constants, {"num_warps": WARPS})
