"""The page of prefill_attn: causal attention of many new rows a sequence, packed, over their KV caches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import check_dtype, check_same_device, fail
from .._registry import Op, TuningCase
from ..reference import prefill_attn as reference
from ._attention import (
    check_attention,
    check_cache_values,
    check_per_sequence,
    check_query,
    check_range,
    check_sizes,
    describe_cpu,
)

SCHEMA = (
    "prefill_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_q_lens, Tensor lengths, SymInt max_q_len, *, "
    "float? scale=None, Tensor? block_table=None, float? softcap=None, int? window=None) -> (Tensor out, Tensor lse)"
)


def _check(
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
) -> None:
    check_query("prefill_attn", q, "[N, Hq, D]", 3)
    check_sizes("prefill_attn", "lengths", lengths, "[B]", 1)
    batch = lengths.shape[0]
    check_attention("prefill_attn", q, q.shape[1], k_cache, v_cache, block_table, batch, softcap, window)
    check_per_sequence("prefill_attn", "lengths", lengths, q, batch)
    check_same_device("prefill_attn", "cu_q_lens", cu_q_lens, "q", q)
    check_dtype("prefill_attn", "cu_q_lens", cu_q_lens, torch.int32)
    if cu_q_lens.dim() != 1 or cu_q_lens.shape[0] != batch + 1:
        fail("prefill_attn", f"cu_q_lens must be [B + 1] = [{batch + 1}], got {list(cu_q_lens.shape)}")
    if max_q_len < 0:
        fail("prefill_attn", f"max_q_len must not be negative, got {max_q_len}")


def _check_values(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    *,
    block_table: Tensor | None = None,
    **options: object,
) -> None:
    starts = cu_q_lens.tolist()
    if starts[0] != 0 or starts[-1] != q.shape[0] or any(a > b for a, b in itertools.pairwise(starts)):
        fail("prefill_attn", f"cu_q_lens must rise from 0 to N = {q.shape[0]}, got {starts}")
    check_range("prefill_attn", "the differences of cu_q_lens", cu_q_lens.diff(), 0, max_q_len)
    check_cache_values("prefill_attn", k_cache, lengths, block_table)


def _fake(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _describe(backend: str, q: Tensor, *args: object, **kwargs: object) -> str:
    if backend != "triton":
        return describe_cpu(backend)
    from ..triton_ops import prefill_attn as triton_page

    most = args[4] if len(args) > 4 else kwargs["max_q_len"]
    return str(triton_page.config_for(q, int(most)))  # type: ignore[call-overload]


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    for rows, s, d in ((512, 4608, 128), (2048, 6144, 128), (8192, 8192, 128), (2048, 6144, 64), (2048, 6144, 80)):
        q = torch.randn(rows, 32, d, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(1, 8, s, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
        lengths = torch.tensor([s], dtype=torch.int32, device=device)
        yield TuningCase({"dtype": "bfloat16", "D": d}, rows, (q, k, v, starts, lengths, rows), {})


OP = Op(
    SCHEMA,
    check=_check,
    check_values=_check_values,
    fake=_fake,
    reference=reference.prefill_attn,
    triton="prefill_attn",
    describe=_describe,
    tuning=_tuning,
)


def prefill_attn(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the new rows of many sequences, packed one after the other, over their KV caches.

    The caches hold the new rows already: of a sequence with n new rows, row t stands at lengths - n + t and sees itself
    and all rows before it. Whole prompts (n = lengths) and chunks of prompts (n < lengths) are the same to it.

    Args:
        q: [N, Hq, D] fp32, fp16 or bf16, the new rows of all sequences; D from 1 to 256.
        k_cache, v_cache: q's dtype, [B, Hkv, S_cap, D], or pages [n_blocks, block, Hkv, D] with a block_table; any
            strides with the last dimension contiguous. Hq is a multiple of Hkv.
        cu_q_lens: int32 [B + 1], where the rows of each sequence begin in q, and N.
        lengths: int32 [B], rows of each sequence, the new ones included. Rows beyond are never read.
        max_q_len: at least the new rows of the longest sequence: what the launch is sized by, without reading values.
        scale: of q.k before the softmax; D^-0.5 when None.
        block_table: int32 [B, max_blocks], the page of each block of a sequence.
        softcap: z becomes softcap * tanh(z / softcap).
        window: a row sees only the keys fewer than `window` places before it, itself included.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        (out, lse): [N, Hq, D] of q's dtype and [N, Hq] fp32, the natural logarithm of the softmax's sum. Rows that see
        no key: 0 and -inf.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
        values that cannot be. On a GPU a sequence or page with such values is skipped.

    Source: arXiv:1706.03762, arXiv:2307.08691. Cost: 2 S Hkv D itemsize bytes a sequence, 4 D flops a query head for
    each row and key that it sees. Deterministic; the result of a sequence does not depend on the others.
    """
    return OP(  # type: ignore[no-any-return]
        backend, q, k_cache, v_cache, cu_q_lens, lengths, max_q_len, scale=scale, block_table=block_table,
        softcap=softcap, window=window,
    )  # fmt: skip
