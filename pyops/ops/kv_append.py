"""The page of kv_append, kv_compact and kv_scatter: rows of keys and values into, or within, the caches, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import fail
from .._kv_cache import (
    check_ints,
    check_rotary,
    check_rows,
    check_writable_caches,
    first_of,
    pages_of,
    refuse_counts,
    refuse_lengths,
    refuse_pages,
    values,
)
from .._registry import Op
from ..reference import kv_append as reference

CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache"
APPEND_SCHEMA = (
    f"kv_append({CACHES}, Tensor k, Tensor v, Tensor lengths, *, Tensor? block_table=None, Tensor? q_lens=None, "
    "Tensor? cos=None, Tensor? sin=None, bool rope_interleaved=False, Tensor? positions=None) -> ()"
)
COMPACT_SCHEMA = (
    f"kv_compact({CACHES}, Tensor lengths, Tensor accept_index, Tensor accept_len, *, Tensor? block_table=None) -> ()"
)
SCATTER_SCHEMA = f"kv_scatter({CACHES}, Tensor k, Tensor v, Tensor index) -> ()"


def _check(
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
    caches = check_writable_caches("kv_append", k_cache, v_cache, block_table)
    new_rows = check_rows("kv_append", k_cache, k, v, caches, "T")
    check_ints("kv_append", "lengths", lengths, k_cache, "[B]", [caches.batch])
    if q_lens is not None:
        check_ints("kv_append", "q_lens", q_lens, k_cache, "[B]", [caches.batch])
    check_rotary("kv_append", k_cache, caches.dim, cos, sin, rope_interleaved, positions)
    if positions is not None:
        check_ints("kv_append", "positions", positions, k_cache, "[B, T]", [caches.batch, new_rows])


def _check_values(
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
    batch, _, most, _ = k.shape
    rows = torch.full((batch,), most) if q_lens is None else values(q_lens)
    refuse_counts("kv_append", "q_lens", rows, most)
    first = values(lengths)
    capacity = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    refuse_lengths("kv_append", first, rows, capacity)
    if block_table is not None:
        pages = pages_of(first, first + rows, block_table.shape[1], k_cache.shape[1])
        refuse_pages("kv_append", values(block_table), pages, k_cache.shape[0])
    if cos is None:
        return
    column = torch.arange(most)
    where = first[:, None] + column if positions is None else values(positions)
    if at := first_of((column < rows[:, None]) & ((where < 0) | (where >= cos.shape[0]))):
        name = "positions" if positions is not None else "lengths + t"
        last = cos.shape[0] - 1
        fail("kv_append", f"{name} must be from 0 to max_positions - 1 = {last}, got {int(where[at])} at {list(at)}")


def _check_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    batch = check_writable_caches("kv_compact", k_cache, v_cache, block_table).batch
    check_ints("kv_compact", "lengths", lengths, k_cache, "[B]", [batch])
    tree = accept_index.shape[-1] if accept_index.dim() else 0
    check_ints("kv_compact", "accept_index", accept_index, k_cache, "[B, T]", [batch, tree])
    check_ints("kv_compact", "accept_len", accept_len, k_cache, "[B]", [batch])


def _check_compact_values(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    tree, count, index, first = accept_index.shape[1], values(accept_len), values(accept_index), values(lengths)
    refuse_counts("kv_compact", "accept_len", count, tree)
    column = torch.arange(tree)
    taken = column < count[:, None]
    before = torch.cat([torch.full_like(index[:, :1], -1), index[:, :-1]], dim=1)
    if at := first_of(taken & ((index <= before) | (index >= tree))):
        fail("kv_compact", f"accept_index must ascend from 0 to T - 1 = {tree - 1}, got {int(index[at])} at {list(at)}")
    rows = torch.where(taken, index + 1, 0).amax(1) if tree else torch.zeros_like(first)
    capacity = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    refuse_lengths("kv_compact", first, rows, capacity)
    if block_table is None or not capacity:
        return
    moved = (taken & (index != column)).unsqueeze(2)
    page = (first[:, None, None] + torch.stack([column.expand_as(index), index], dim=2)) // k_cache.shape[1]
    touched = torch.zeros(block_table.shape, dtype=torch.bool)
    sequence = torch.arange(len(first))[:, None, None].expand_as(page)
    moved = moved.expand_as(page)
    touched[sequence[moved], page[moved]] = True
    refuse_pages("kv_compact", values(block_table), touched, k_cache.shape[0])


def _check_scatter(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    caches = check_writable_caches("kv_scatter", k_cache, v_cache, None)
    rows = check_rows("kv_scatter", k_cache, k, v, caches, "A")
    check_ints("kv_scatter", "index", index, k_cache, "[B, A]", [caches.batch, rows])


def _check_scatter_values(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    position, capacity = values(index), k_cache.shape[2]
    if at := first_of((position < -1) | (position >= capacity)):
        fail(
            "kv_scatter", f"index must be from -1 to S_cap - 1 = {capacity - 1}, got {int(position[at])} at {list(at)}"
        )


def _fake(*args: object, **kwargs: object) -> None:
    """The ops return nothing."""


APPEND = Op(
    APPEND_SCHEMA,
    check=_check,
    check_values=_check_values,
    fake=_fake,
    reference=reference.kv_append,
    triton="kv_append",
)
COMPACT = Op(
    COMPACT_SCHEMA,
    check=_check_compact,
    check_values=_check_compact_values,
    fake=_fake,
    reference=reference.kv_compact,
    triton="kv_append",
    family="kv_append",
)
SCATTER = Op(
    SCATTER_SCHEMA,
    check=_check_scatter,
    check_values=_check_scatter_values,
    fake=_fake,
    reference=reference.kv_scatter,
    triton="kv_append",
    family="kv_append",
)


def kv_append(
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
    backend: str | None = None,
) -> None:
    """Write new keys and values behind those that the caches hold, in place and in one launch.

    Row t of sequence b goes to position lengths[b] + t, for t < q_lens[b]; nothing else changes, lengths neither. With
    cos and sin the rows of k get their rotary embedding on the way.

    Args:
        k_cache: fp32, fp16 or bf16 [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D]; any strides with a
            contiguous last dim, elements apart from each other.
        v_cache: the same shape and dtype, strides of its own.
        k: [B, Hkv, T, D] of the caches' dtype, any strides with a contiguous last dim; apart from the caches' memory.
        v: likewise.
        lengths: int32 [B], the rows of each sequence before the new ones.
        block_table: int32 [B, max_blocks], the pages of each sequence in order; None for contiguous caches.
        q_lens: int32 [B], how many of the T rows a sequence has, from 0 to T; T when None.
        cos: fp32 or of the caches' dtype [max_positions, R / 2], R <= D: the first R elements of a row are rotated.
        sin: as cos.
        rope_interleaved: pairs are (0, 1), (2, 3), …; by default (0, R / 2), (1, R / 2 + 1), …
        positions: int32 [B, T], the row of cos and sin for each new row, where that is not lengths[b] + t (trees).
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
            values out of range. Nothing has been written then.

    On a GPU a row whose length, page or position is out of range is skipped. A rotation is computed in fp32 and rounded
    once; everything else is a copy, bit for bit.

    Source: arXiv:2511.12031 (rows into an over-allocated cache), arXiv:2104.09864 (rotary embedding). Cost:
    4 B Hkv T D itemsize bytes. No gradient. Deterministic, unless a block_table gives two sequences the same page.
    """
    more = {"block_table": block_table, "q_lens": q_lens, "cos": cos, "sin": sin, "positions": positions}
    given: dict[str, Any] = {name: value for name, value in more.items() if value is not None}  # each costs 0.5 us
    if rope_interleaved:
        given["rope_interleaved"] = True
    APPEND(backend, k_cache, v_cache, k, v, lengths, **given)


def kv_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Keep the accepted rows of a draft tree: move them to the front of it, in place and in one launch.

    The tree's T rows lie at positions lengths[b] … lengths[b] + T - 1. Row lengths[b] + accept_index[b, i] moves to
    lengths[b] + i, for i < accept_len[b]; other rows stay as they are. The new length, lengths + accept_len, is the
    caller's to set.

    Args:
        k_cache: fp32, fp16 or bf16 [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D]; any strides with a
            contiguous last dim, elements apart from each other.
        v_cache: the same shape and dtype, strides of its own.
        lengths: int32 [B], the rows of each sequence before its tree.
        accept_index: int32 [B, T], ascending, what comes after accept_len[b] ignored: as tree_verify returns it.
        accept_len: int32 [B], from 0 (nothing moves) to T.
        block_table: int32 [B, max_blocks], the pages of each sequence in order; None for contiguous caches.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
            values out of range. Nothing has been written then.

    On a GPU an index that does not ascend within the tree ends the moves of its sequence, and a row whose length or
    page is out of range is skipped.

    Source: SpecInfer, arXiv:2305.09781. Cost: 4 Hkv D itemsize bytes for each row that moves. No gradient.
    Deterministic, unless a block_table gives two sequences the same page.
    """
    if block_table is None:
        COMPACT(backend, k_cache, v_cache, lengths, accept_index, accept_len)
    else:
        COMPACT(backend, k_cache, v_cache, lengths, accept_index, accept_len, block_table=block_table)


def kv_scatter(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor, *, backend: str | None = None
) -> None:
    """Write rows of keys and values to given positions of the caches, in place and in one launch.

    Args:
        k_cache: fp32, fp16 or bf16 [B, Hkv, S_cap, D]; any strides with a contiguous last dim, elements apart from each
            other.
        v_cache: the same shape and dtype, strides of its own.
        k: [B, Hkv, A, D] of the caches' dtype, any strides with a contiguous last dim; apart from the caches' memory.
        v: likewise.
        index: int32 [B, A]: row a of sequence b goes to position index[b, a], or nowhere at -1.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
            an index out of range. Nothing has been written then.

    On a GPU an index out of range is skipped. Where a sequence names a position twice, the last row stays on the CPU;
    on a GPU any of them may, also in parts.

    Source: MARché, arXiv:2506.12035 (refreshed rows of a cache). Cost: 4 B Hkv A D itemsize bytes. No gradient.
    Deterministic where positions differ.
    """
    SCATTER(backend, k_cache, v_cache, k, v, index)
