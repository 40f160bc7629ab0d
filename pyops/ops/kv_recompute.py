"""The page of kv_recompute: keys and values made again from the inputs of their layer, straight into the caches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .._checks import check_dtype, check_same_device, fail
from .._kv_cache import CacheShape, check_last_dim, check_rotary, check_writable_caches, pages_of, refuse_pages, values
from .._registry import Op, TuningCase
from ..reference import kv_recompute as reference

SCHEMA = (
    "kv_recompute(Tensor x, Tensor w_k, Tensor w_v, Tensor? b_k, Tensor? b_v, Tensor? cos, Tensor? sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start, *, Tensor? k_norm_weight=None, float k_norm_eps=1e-06, "
    "bool rope_interleaved=False, Tensor? block_table=None) -> ()"
)
NAME = "kv_recompute"


def _check_vector(name: str, tensor: Tensor, k_cache: Tensor, form: str, size: int) -> None:
    check_same_device(NAME, name, tensor, "k_cache", k_cache)
    check_dtype(NAME, name, tensor, k_cache.dtype)
    if tensor.dim() != 1 or tensor.shape[0] != size:
        fail(NAME, f"{name} must be {form} = [{size}], got {list(tensor.shape)}")
    check_last_dim(NAME, name, tensor)


def _check_inputs(x: Tensor, weights: dict[str, Tensor], k_cache: Tensor, caches: CacheShape) -> None:
    check_same_device(NAME, "x", x, "k_cache", k_cache)
    check_dtype(NAME, "x", x, k_cache.dtype)
    if x.dim() != 3 or x.shape[0] != caches.batch:
        fail(NAME, f"x must be [B, L, H] = [{caches.batch}, L, H], got {list(x.shape)}")
    check_last_dim(NAME, "x", x)
    sizes = x.shape[:2]
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= 2**31:
        fail(NAME, f"x must have fewer than 2^31 rows in all, got {list(x.shape)}")
    wanted = [caches.heads * caches.dim, x.shape[2]]
    for name, w in weights.items():
        check_same_device(NAME, name, w, "k_cache", k_cache)
        check_dtype(NAME, name, w, k_cache.dtype)
        if list(w.shape) != wanted:
            fail(NAME, f"{name} must be [Hkv D, H] = {wanted}, got {list(w.shape)}")
        check_last_dim(NAME, name, w)


def _check(
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    k_norm_weight: Tensor | None = None,
    k_norm_eps: float = 1e-6,
    rope_interleaved: bool = False,
    block_table: Tensor | None = None,
) -> None:
    """csrc/cpu/kv_recompute.cpp checks the same in the same order."""
    caches = check_writable_caches(NAME, k_cache, v_cache, block_table)
    _check_inputs(x, {"w_k": w_k, "w_v": w_v}, k_cache, caches)
    for name, bias in (("b_k", b_k), ("b_v", b_v)):
        if bias is not None:
            _check_vector(name, bias, k_cache, "[Hkv D]", caches.heads * caches.dim)
    rows, capacity = x.shape[1], caches.capacity
    if start < 0 or start + rows > capacity:
        room = f"{capacity - rows} (capacity {capacity}, {rows} rows)"
        fail(NAME, f"start must be from 0 to {room}, got {start}")
    if k_norm_weight is not None:
        _check_vector("k_norm_weight", k_norm_weight, k_cache, "[D]", caches.dim)
    if not k_norm_eps >= 0:
        fail(NAME, f"k_norm_eps must not be negative, got {k_norm_eps:g}")
    check_rotary(NAME, k_cache, caches.dim, cos, sin, rope_interleaved, rows=rows)


def _check_values(
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    block_table: Tensor | None = None,
    **options: object,
) -> None:
    if block_table is None:
        return
    first = torch.full((x.shape[0],), start)
    touched = pages_of(first, first + x.shape[1], block_table.shape[1], k_cache.shape[1])
    refuse_pages(NAME, values(block_table), touched, k_cache.shape[0])


def _fake(*args: object, **kwargs: object) -> None:
    """The op returns nothing."""


def _describe(backend: str, x: Tensor, *args: Any, **kwargs: Any) -> str:
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    if backend != "triton":
        return ""
    from ..triton_ops import kv_recompute as triton_page

    k_cache = args[6] if len(args) > 6 else kwargs["k_cache"]
    return str(triton_page.config_for(x, k_cache.shape[3]))


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    """Chunks of a KVPR step up to whole splits, of Llama-2-7B, OPT-13B, OPT-30B and a small MHA model."""
    for rows, heads, dim in ((1024, 32, 128), (4096, 32, 128), (16384, 32, 128), (16384, 56, 128), (16384, 16, 64)):
        hidden = heads * dim
        x = torch.randn(1, rows, hidden, device=device, dtype=torch.bfloat16)
        w_k, w_v = (torch.randn(hidden, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
        angle = torch.rand(rows, dim // 2, device=device) * 6.3
        caches = (torch.empty(1, heads, rows, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        args = (x, w_k, w_v, None, None, angle.cos(), angle.sin(), *caches, 0)
        yield TuningCase({"dtype": "bfloat16", "D": dim}, rows, args, {})


OP = Op(
    SCHEMA,
    check=_check,
    check_values=_check_values,
    fake=_fake,
    reference=reference.kv_recompute,
    triton="kv_recompute",
    describe=_describe,
    tuning=_tuning,
)


def kv_recompute(
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    k_norm_weight: Tensor | None = None,
    k_norm_eps: float = 1e-6,
    rope_interleaved: bool = False,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Make keys and values again from the inputs of their layer and write them into the caches, in one launch.

    K = x w_k^T + b_k and V = x w_v^T + b_v become rows start … start + L - 1 of every sequence; no other row changes,
    and neither product is ever a tensor of its own. K may get an RMS norm of each head and then a rotary embedding.

    Args:
        x: fp32, fp16 or bf16 [B, L, H], what the layer's projections had as input (after its norm); any strides with a
            contiguous last dim; apart from the caches' memory.
        w_k: [Hkv D, H] of x's dtype, as torch.nn.Linear holds it; any strides with a contiguous last dim.
        w_v: likewise.
        b_k: [Hkv D] of x's dtype, or None.
        b_v: likewise.
        cos: fp32 or of x's dtype [L, R / 2], R <= D: the angles of these L rows, for the first R elements of a head;
            None for no rotation.
        sin: as cos.
        k_cache: of x's dtype [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D]; any strides with a contiguous last
            dim, elements apart from each other.
        v_cache: the same shape and dtype, strides of its own.
        start: the position of the first row, from 0 to the capacity less L.
        k_norm_weight: [D] of x's dtype: an RMS norm of each head of K, before the rotation. None for none.
        k_norm_eps: what the norm adds to the mean of squares.
        rope_interleaved: pairs are (0, 1), (2, 3), …; by default (0, R / 2), (1, R / 2 + 1), …
        block_table: int32 [B, max_blocks], the pages of each sequence in order; None for contiguous caches.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
            pages out of range. Nothing has been written then.

    On a GPU a row whose page is out of range is skipped. Products are added up in fp32, where bias, norm and rotation
    happen too, and rounded once; torch.autocast changes nothing here.

    Source: KVPR, arXiv:2411.17089. Cost: (B L H + 2 Hkv D H + 2 B L Hkv D) itemsize bytes, 4 B L H Hkv D flops. No
    gradient. Deterministic, unless a block_table gives two sequences the same page.
    """
    more = {"k_norm_weight": k_norm_weight, "block_table": block_table}
    given: dict[str, Any] = {name: value for name, value in more.items() if value is not None}  # each costs 0.5 us
    if k_norm_weight is not None:
        given["k_norm_eps"] = k_norm_eps
    if rope_interleaved:
        given["rope_interleaved"] = True
    OP(backend, x, w_k, w_v, b_k, b_v, cos, sin, k_cache, v_cache, start, **given)
