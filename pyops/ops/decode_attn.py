"""The page of decode_attn: attention of a few new rows a sequence over its KV cache, causal or along a tree."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import check_dtype, check_same_device, fail
from .._registry import Op, TuningCase
from ..reference import decode_attn as reference
from ..reference import tree_build
from ._attention import (
    MAX_ROWS,
    capacity,
    check_attention,
    check_cache_values,
    check_per_sequence,
    check_query,
    check_range,
    describe_cpu,
)

SCHEMA = (
    "decode_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, *, float? scale=None, "
    "Tensor? tree_mask=None, Tensor? block_table=None, Tensor? q_lens=None, float? softcap=None, int? window=None) "
    "-> (Tensor out, Tensor lse)"
)


PAGE = 16  # rows a page when paged caches are tuned


def _check(
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
) -> None:
    check_query("decode_attn", q, "[B, Hq, T, D]", 4)
    batch, heads, rows, _ = q.shape
    if rows > MAX_ROWS:
        fail("decode_attn", f"q must have at most {MAX_ROWS} rows a sequence (prefill_attn takes more), got {rows}")
    check_attention("decode_attn", q, heads, k_cache, v_cache, block_table, batch, softcap, window)
    check_per_sequence("decode_attn", "lengths", lengths, q, batch)
    check_per_sequence("decode_attn", "q_lens", q_lens, q, batch)
    if tree_mask is None:
        return
    check_same_device("decode_attn", "tree_mask", tree_mask, "q", q)
    check_dtype("decode_attn", "tree_mask", tree_mask, torch.int64)
    if tree_mask.dim() != 2 or tree_mask.shape[0] != batch or tree_mask.shape[1] != rows:
        fail("decode_attn", f"tree_mask must be [B, T] = [{batch}, {rows}], got {list(tree_mask.shape)}")


def _check_values(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    **options: object,
) -> None:
    check_cache_values("decode_attn", k_cache, lengths, block_table)
    if q_lens is not None:
        check_range("decode_attn", "q_lens", q_lens, 0, q.shape[2])


def _fake(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _describe(
    backend: str, q: Tensor, k_cache: Tensor, *args: object, block_table: Tensor | None = None, **kwargs: object
) -> str:
    if backend != "triton" or not q.numel():
        return describe_cpu(backend)
    from ..triton_ops import decode_attn as triton_page

    paged = block_table is not None
    sizes, tiles, parts = triton_page.plan(q, k_cache.shape[2 if paged else 1], capacity(k_cache, block_table), paged)
    return f"{sizes}, {tiles} tiles a KV head, {parts} parts a sequence"


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    """One row at several sizes and head sizes, and trees; `key` as the kernels' config_for() makes it."""
    one = (
        (1, 1, 8192, 32, 8, 128), (32, 1, 1024, 32, 8, 128), (64, 1, 1024, 12, 2, 128), (8, 1, 8192, 32, 8, 128),
        (64, 1, 18432, 12, 2, 128), (32, 1, 18432, 32, 8, 128), (8, 16, 8192, 32, 8, 128), (8, 64, 8192, 32, 8, 128),
    )  # fmt: skip
    more = (
        (8, 1, 8192, 32, 8, 64), (8, 1, 8192, 32, 8, 80), (8, 1, 8192, 32, 8, 96), (8, 1, 8192, 16, 4, 256),
        (1, 64, 8192, 32, 8, 128),
    )  # fmt: skip
    cases = [*((False, *sizes) for sizes in (*one, *more)), *((True, *sizes) for sizes in one)]
    for paged, batch, rows, s, heads, kv_heads, d in cases:
        q = torch.randn(batch, heads, rows, d, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, kv_heads, s, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((batch,), s, dtype=torch.int32, device=device)
        chain = torch.arange(-1, rows - 1, dtype=torch.int32, device=device).expand(batch, rows)
        options = {} if rows == 1 else {"tree_mask": tree_build.tree_build(chain)[0]}
        if paged:
            k, v = (c.view(batch * s // PAGE, PAGE, kv_heads, d) for c in (k, v))
            order = torch.randperm(batch * s // PAGE, device=device)
            options["block_table"] = order.int().view(batch, s // PAGE)
        key = {"dtype": "bfloat16", "D": d, "rows": max(16, rows * heads // kv_heads), "paged": paged}
        yield TuningCase(key, batch * kv_heads * s, (q, k, v, lengths), options)


OP = Op(
    SCHEMA,
    check=_check,
    check_values=_check_values,
    fake=_fake,
    reference=reference.decode_attn,
    triton="decode_attn",
    describe=_describe,
    tuning=_tuning,
)


def decode_attn(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest rows of each sequence over its KV cache, which holds them already.

    The T rows of q are the last T of the sequence, so row t stands at lengths - T + t and sees itself and all rows
    before it. The cache is split among as many programs as fill the device, chosen there: no value is read back.

    Args:
        q: [B, Hq, T, D] fp32, fp16 or bf16, T from 0 to 64, D from 1 to 256.
        k_cache, v_cache: q's dtype, [B, Hkv, S_cap, D], or pages [n_blocks, block, Hkv, D] with a block_table; any
            strides with the last dimension contiguous. Hq is a multiple of Hkv: head h reads KV head h // (Hq / Hkv).
        lengths: int32 [B], rows of each sequence, the new ones included. Rows beyond are never read.
        scale: of q.k before the softmax; D^-0.5 when None.
        tree_mask: int64 [B, T], for rows that are nodes of a tree (tree_build makes it): bit j of element t says that
            row t sees row j. All rows see what lies before the new ones, and themselves.
        block_table: int32 [B, max_blocks], the page of each block of a sequence.
        q_lens: int32 [B], how many of the T rows a sequence has; all when None. The others give 0.
        softcap: z becomes softcap * tanh(z / softcap).
        window: a row sees only the keys fewer than `window` places before it, itself included; a node of a tree stands
            after as many new rows as it sees others.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        (out, lse): [B, Hq, T, D] of q's dtype and [B, Hq, T] fp32, the natural logarithm of the softmax's sum. Rows
        that see no key: 0 and -inf.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
        a length beyond the capacity or a page that does not exist. On a GPU such a sequence or page is skipped.

    Source: arXiv:1706.03762; grouped heads arXiv:2305.13245; trees arXiv:2305.09781. Cost: 2 S Hkv D itemsize bytes a
    sequence, 4 T S Hq D flops. Deterministic; the result of a sequence does not depend on the others.
    """
    return OP(  # type: ignore[no-any-return]
        backend, q, k_cache, v_cache, lengths, scale=scale, tree_mask=tree_mask, block_table=block_table, q_lens=q_lens,
        softcap=softcap, window=window,
    )  # fmt: skip
