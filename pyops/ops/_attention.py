"""Argument checks that the attention pages share; csrc/common/attention.h checks the same in the same order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from .._checks import (
    check_dtype,
    check_float_dtype,
    check_same_device,
    dtype_name,
    fail,
)

MAX_HEAD = 256  # of D
MAX_ROWS = 64  # of T: the bits of a tree mask


def check_sizes(op: str, name: str, tensor: Tensor, wanted: str, dims: int) -> None:
    """So many dimensions, of which `wanted` tells the names."""
    if tensor.dim() != dims:
        fail(op, f"{name} must be {wanted}, got {list(tensor.shape)}")


def check_last_dim(op: str, name: str, tensor: Tensor) -> None:
    """Rows are read in whole vectors."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(op, f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}")


def check_per_sequence(op: str, name: str, tensor: Tensor | None, q: Tensor, batch: int) -> None:
    """[B] int32."""
    if tensor is None:
        return
    check_same_device(op, name, tensor, "q", q)
    check_dtype(op, name, tensor, torch.int32)
    if tensor.dim() != 1 or tensor.shape[0] != batch:
        fail(op, f"{name} must be [B] = [{batch}], got {list(tensor.shape)}")


def check_attention(
    op: str,
    q: Tensor,
    heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    batch: int,
    softcap: float | None,
    window: int | None,
) -> None:
    """q ([..., D], `heads` of them) against caches of `batch` sequences, contiguous or in pages; reads no values."""
    check_last_dim(op, "q", q)
    wanted = "[B, Hkv, S_cap, D]" if block_table is None else "[n_blocks, block, Hkv, D]"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_same_device(op, name, cache, "q", q)
        if cache.dtype != q.dtype:
            fail(op, f"{name} must be {dtype_name(q.dtype)} like q, got {dtype_name(cache.dtype)}")
        check_sizes(op, name, cache, wanted, 4)
        check_last_dim(op, name, cache)
    if v_cache.shape != k_cache.shape:
        fail(op, f"v_cache must be {list(k_cache.shape)} like k_cache, got {list(v_cache.shape)}")
    if k_cache.shape[3] != q.shape[-1]:
        fail(op, f"k_cache must have the head size of q, {q.shape[-1]}, got {k_cache.shape[3]}")
    kv_heads = k_cache.shape[1 if block_table is None else 2]
    if heads if kv_heads == 0 else heads % kv_heads:
        fail(op, f"q must have a multiple of k_cache's {kv_heads} heads, got {heads}")
    if block_table is None:
        if k_cache.shape[0] != batch:
            fail(op, f"k_cache must have B = {batch} sequences, got {k_cache.shape[0]}")
    else:
        check_same_device(op, "block_table", block_table, "q", q)
        check_dtype(op, "block_table", block_table, torch.int32)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            fail(op, f"block_table must be [B, max_blocks] = [{batch}, max_blocks], got {list(block_table.shape)}")
    if softcap is not None and not softcap > 0:
        fail(op, f"softcap must be greater than 0, got {softcap}")
    if window is not None and window < 1:
        fail(op, f"window must be at least 1, got {window}")


def check_query(op: str, q: Tensor, wanted: str, dims: int) -> None:
    """A float tensor of `dims` dimensions whose heads are not too wide."""
    check_float_dtype(op, "q", q.dtype)
    check_sizes(op, "q", q, wanted, dims)
    if not 1 <= q.shape[-1] <= MAX_HEAD:
        fail(op, f"q must have a head size from 1 to {MAX_HEAD}, got {q.shape[-1]}")


def capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Rows that a sequence can have."""
    return k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]


def check_cache_values(op: str, k_cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Lengths within the capacity, and pages that exist for all of them."""
    most = capacity(k_cache, block_table)
    check_range(op, "lengths", lengths, 0, most)
    if block_table is None or not block_table.numel():
        return
    pages, block = k_cache.shape[0], k_cache.shape[1]
    used = torch.arange(block_table.shape[1], device=lengths.device) * block < lengths[:, None]
    check_range(op, "block_table", torch.where(used, block_table, 0), 0, max(pages - 1, 0))


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """All of them from `low` to `high`."""
    wrong = values[(values < low) | (values > high)]
    if wrong.numel():
        fail(op, f"{name} must be from {low} to {high}, got {int(wrong[0])}")


def describe_cpu(backend: str, *args: object, **kwargs: object) -> str:
    """The instruction set and the threads of the compiled CPU kernel."""
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    return ""
