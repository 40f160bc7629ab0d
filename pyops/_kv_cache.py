"""Argument checks of the operators on KV caches; csrc/common/kv_cache.h checks the same in the same order.

Caches are [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D] with block_table [B, max_blocks]. The check_*
functions read no values; the refuse_* functions read those of small tensors, so on a GPU they wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_dtype, check_float_dtype, check_same_device, dtype_name, fail

CONTIGUOUS, PAGED = "[B, Hkv, S_cap, D]", "[n_blocks, block, Hkv, D]"


class CacheShape(NamedTuple):
    """What a pair of caches holds; `capacity` is rows a sequence: S_cap, or max_blocks block."""

    batch: int
    heads: int
    capacity: int
    dim: int


def check_last_dim(op: str, name: str, tensor: Tensor) -> None:
    """Elements of the last dim lie side by side."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(op, f"{name} must have a contiguous last dim, got strides {list(tensor.stride())}")


def check_caches(op: str, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> CacheShape:
    """Both caches, alike but for their strides, and the table of a paged pair."""
    check_float_dtype(op, "k_cache", k_cache.dtype)
    check_same_device(op, "v_cache", v_cache, "k_cache", k_cache)
    check_dtype(op, "v_cache", v_cache, k_cache.dtype)
    if k_cache.dim() != 4 or k_cache.shape[3] < 1:
        fail(op, f"k_cache must be {CONTIGUOUS if block_table is None else PAGED}, got {list(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        fail(op, f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, got {list(v_cache.shape)}")
    check_last_dim(op, "k_cache", k_cache)
    check_last_dim(op, "v_cache", v_cache)
    if block_table is None:
        return CacheShape(*k_cache.shape)
    check_same_device(op, "block_table", block_table, "k_cache", k_cache)
    check_dtype(op, "block_table", block_table, torch.int32)
    if block_table.dim() != 2:
        fail(op, f"block_table must be [B, max_blocks], got {list(block_table.shape)}")
    _, block, heads, dim = k_cache.shape
    return CacheShape(block_table.shape[0], heads, block_table.shape[1] * block, dim)


def check_writable(op: str, name: str, cache: Tensor) -> None:
    """No element of a tensor that is written lies where another one does: an expanded cache is refused."""
    if any(size == 0 for size in cache.shape):
        return
    reach = 0  # the farthest that the dims with smaller strides go
    for stride, size in sorted(
        ((s, n) for s, n in zip(cache.stride(), cache.shape, strict=True) if n > 1), key=lambda dim: dim[0]
    ):
        if stride <= reach:
            fail(
                op,
                f"{name} must not overlap itself, got shape {list(cache.shape)} with strides {list(cache.stride())}",
            )
        reach += stride * (size - 1)


def check_writable_caches(op: str, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> CacheShape:
    """check_caches, of caches that are written."""
    shape = check_caches(op, k_cache, v_cache, block_table)
    check_writable(op, "k_cache", k_cache)
    check_writable(op, "v_cache", v_cache)
    return shape


def check_rows(op: str, k_cache: Tensor, k: Tensor, v: Tensor, caches: CacheShape, letter: str) -> int:
    """New rows k and v [B, Hkv, T, D] for the caches; `letter` is what the op calls T, the result is its value."""
    for name, rows in (("k", k), ("v", v)):
        check_same_device(op, name, rows, "k_cache", k_cache)
        check_dtype(op, name, rows, k_cache.dtype)
        if rows.dim() != 4 or (rows.shape[0], rows.shape[1], rows.shape[3]) != (
            caches.batch,
            caches.heads,
            caches.dim,
        ):
            fail(
                op,
                f"{name} must be [B, Hkv, {letter}, D] = [{caches.batch}, {caches.heads}, {letter}, {caches.dim}], "
                f"got {list(rows.shape)}",
            )
        if rows.shape[2] != k.shape[2]:
            fail(op, f"v must have the shape of k, {list(k.shape)}, got {list(rows.shape)}")
        check_last_dim(op, name, rows)
    sizes = k.shape[:3]
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= 2**31:
        fail(op, f"k must have fewer than 2^31 rows in all, got {list(k.shape)}")
    return k.shape[2]


def check_ints(op: str, name: str, tensor: Tensor, k_cache: Tensor, form: str, sizes: Sequence[int]) -> None:
    """An int32 tensor of `sizes`, which messages call `form`; any strides."""
    check_same_device(op, name, tensor, "k_cache", k_cache)
    check_dtype(op, name, tensor, torch.int32)
    if list(tensor.shape) != list(sizes):
        fail(op, f"{name} must be {form} = {list(sizes)}, got {list(tensor.shape)}")


def check_rotary(
    op: str,
    k_cache: Tensor,
    dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    positions: Tensor | None = None,
    rows: int | None = None,
) -> None:
    """The angles and what belongs to them: one row for each position, or one for each of `rows` new rows."""
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            fail(op, f"cos and sin must be given together, got only {'sin' if cos is None else 'cos'}")
        if interleaved:
            fail(op, "rope_interleaved must be False without cos and sin, got True")
        if positions is not None:
            fail(op, f"positions must be None without cos and sin, got {list(positions.shape)}")
        return
    check_same_device(op, "cos", cos, "k_cache", k_cache)
    if cos.dtype not in (torch.float32, k_cache.dtype):
        wanted = "float32" if k_cache.dtype == torch.float32 else f"float32 or {dtype_name(k_cache.dtype)}"
        fail(op, f"cos must be {wanted}, got {dtype_name(cos.dtype)}")
    if cos.dim() != 2 or 2 * cos.shape[1] > dim or (rows is not None and cos.shape[0] != rows):
        form = "[max_positions, R / 2]" if rows is None else f"[L, R / 2] = [{rows}, R / 2]"
        fail(op, f"cos must be {form} with R at most D = {dim}, got {list(cos.shape)}")
    check_same_device(op, "sin", sin, "k_cache", k_cache)
    check_dtype(op, "sin", sin, cos.dtype)
    if sin.shape != cos.shape:
        fail(op, f"sin must have the shape of cos, {list(cos.shape)}, got {list(sin.shape)}")
    check_last_dim(op, "cos", cos)
    check_last_dim(op, "sin", sin)


def first_of(bad: Tensor) -> tuple[int, ...] | None:
    """The first index, in row-major order, where `bad` is true."""
    where = bad.nonzero()
    return tuple(where[0].tolist()) if len(where) else None


def values(tensor: Tensor) -> Tensor:
    """As int64 on the CPU, so that sums do not wrap."""
    return tensor.detach().cpu().long()


def refuse_counts(op: str, name: str, counts: Tensor, most: int) -> None:
    """Counts (int64, CPU) of rows are 0 to T."""
    if at := first_of((counts < 0) | (counts > most)):
        fail(op, f"{name} must be from 0 to T = {most}, got {int(counts[at])} at {list(at)}")


def refuse_lengths(op: str, lengths: Tensor, rows: Tensor, capacity: int) -> None:
    """Rows 0 to lengths + rows (both int64, CPU) lie within the capacity."""
    if at := first_of((lengths < 0) | (lengths + rows > capacity)):
        new = int(rows[at])
        room = f"{capacity - new} (capacity {capacity}, {new} new rows)"
        fail(op, f"lengths must be from 0 to {room}, got {int(lengths[at])} at {list(at)}")


def refuse_pages(op: str, block_table: Tensor, touched: Tensor, n_blocks: int) -> None:
    """Entries of the table (int64, CPU) where `touched` is true are pages that exist."""
    if at := first_of(touched & ((block_table < 0) | (block_table >= n_blocks))):
        fail(
            op,
            f"block_table must hold pages from 0 to n_blocks - 1 = {n_blocks - 1} where rows are, "
            f"got {int(block_table[at])} at {list(at)}",
        )


def pages_of(first: Tensor, end: Tensor, max_blocks: int, block: int) -> Tensor:
    """[B, max_blocks] bool: the pages that hold rows first … end - 1 (int64 [B], CPU) of each sequence."""
    start = torch.arange(max_blocks) * block
    return (start < end[:, None]) & (start + block > first[:, None]) & (end > first)[:, None]
