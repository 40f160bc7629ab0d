"""The page of split_attn: attention over active and cached keys at once, without joining them in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _extension
from .._checks import check_dtype, check_float_dtype, check_same_device, dtype_name, fail
from .._registry import Op, TuningCase
from ..reference import split_attn as reference

SCHEMA = (
    "split_attn(Tensor q, Tensor k_active, Tensor v_active, Tensor k_cached, Tensor v_cached, *, "
    "Tensor? cached_mask=None, float? scale=None) -> (Tensor out, Tensor lse)"
)
MAX_HEAD_DIM = 256


def check_query(op: str, q: Tensor, sizes: str) -> None:
    """A float [B, H, rows, D] tensor with rows of consecutive elements."""
    check_float_dtype(op, "q", q.dtype)
    if q.dim() != 4:
        fail(op, f"q must be {sizes}, got {list(q.shape)}")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        fail(op, f"q must have a last dimension from 1 to {MAX_HEAD_DIM}, got {q.shape[3]}")
    check_rows(op, "q", q)


def check_keys(op: str, name: str, keys: Tensor, q: Tensor, rows: int | str) -> None:
    """[B, H, rows, D] like q; a string for `rows` lets it be any number and names it."""
    check_same_device(op, name, keys, "q", q)
    if keys.dtype != q.dtype:
        fail(op, f"{name} must be {dtype_name(q.dtype)} like q, got {dtype_name(keys.dtype)}")
    b, h, d = q.shape[0], q.shape[1], q.shape[3]
    fits = keys.dim() == 4 and keys.shape[0] == b and keys.shape[1] == h and keys.shape[3] == d
    if not fits or (not isinstance(rows, str) and keys.shape[2] != rows):
        fail(op, f"{name} must be [{b}, {h}, {rows}, {d}], got {list(keys.shape)}")
    check_rows(op, name, keys)


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """The last dimension must be contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(op, f"{name} must have a contiguous last dimension, got stride {tensor.stride(-1)}")


def _check(
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """csrc/cpu/split_attn.cpp checks the same in this order."""
    op = "split_attn"
    check_query(op, q, "[B, H, A, D]")
    check_keys(op, "k_active", k_active, q, "A'")
    check_keys(op, "v_active", v_active, q, k_active.shape[2])
    check_keys(op, "k_cached", k_cached, q, "C")
    check_keys(op, "v_cached", v_cached, q, k_cached.shape[2])
    if cached_mask is None:
        return
    check_same_device(op, "cached_mask", cached_mask, "q", q)
    check_dtype(op, "cached_mask", cached_mask, torch.bool)
    b, h, c = k_cached.shape[0], k_cached.shape[1], k_cached.shape[2]
    of_batch = cached_mask.dim() == 2 and cached_mask.shape[0] == b and cached_mask.shape[1] == c
    if of_batch:
        return
    of_heads = cached_mask.dim() == 3 and cached_mask.shape[0] == b and cached_mask.shape[1] == h
    if not of_heads or cached_mask.shape[2] != c:
        fail(op, f"cached_mask must be [{b}, {c}] or [{b}, {h}, {c}], got {list(cached_mask.shape)}")


def _fake(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    b, h, a, d = q.shape
    return q.new_empty(b, a, h, d).transpose(1, 2), q.new_empty(b, h, a, dtype=torch.float32)


def _describe(backend: str, *args: object, **kwargs: object) -> str:
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    return ""


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    """MAR's decoder: 64 tokens computed again beside 256 cached ones."""
    for dtype in (torch.bfloat16, torch.float16):
        for d in (64, 80, 128):
            for batch in (16, 128):
                q, k, v = (torch.randn(batch, 16, 64, d, device=device, dtype=dtype) for _ in range(3))
                cached = [torch.randn(batch, 16, 256, d, device=device, dtype=dtype) for _ in range(2)]
                yield TuningCase({"dtype": dtype_name(dtype), "D": d}, batch * 16 * 320, (q, k, v, *cached), {})


SPLIT = Op(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference=reference.split_attn,
    triton="split_attn",
    describe=_describe,
    tuning=_tuning,
)


def split_attn(
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over active and cached keys at once, without joining them: one softmax over the union.

    Bidirectional: every query sees every active key and every cached one that the mask lets through. Keys that were
    computed again are the active ones; the mask leaves their stale slots of the cache out, and such a slot is not read.

        out, lse = fastops.split_attn(q, k_new, v_new, k_cache, v_cache, cached_mask=fresh)

    Args:
        q: [B, H, A, D] fp32, fp16 or bf16, D from 1 to 256, any strides but for a contiguous last dimension.
        k_active: [B, H, A', D] of q's dtype, strides as q's; A' may differ from A and be 0.
        v_active: as k_active.
        k_cached: [B, H, C, D] of q's dtype, strides as q's; C may be 0.
        v_cached: as k_cached.
        cached_mask: bool [B, C] or [B, H, C], True where the cached key takes part; all do when None.
        scale: of the scores; 1 / sqrt(D) when None.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        out: [B, H, A, D] of q's dtype; its memory is [B, A, H, D], so that out.transpose(1, 2).flatten(2) is a view.
        lse: [B, H, A] fp32, the natural logarithm of the sum of exp(score). A query that sees no key has out 0 and
            lse -inf.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Scores and sums are fp32, probabilities perhaps rounded once to q's dtype, also under torch.autocast.

    Source: MARché, arXiv:2506.12035. Cost: B H (2 A + 2 A' + 2 C) D itemsize + 4 B H A + mask bytes,
    4 B H A (A' + C) D flops. No gradient: the results are constants of the graph. Deterministic.
    """
    return SPLIT(  # type: ignore[no-any-return]
        backend, q, k_active, v_active, k_cached, v_cached, cached_mask=cached_mask, scale=scale
    )
