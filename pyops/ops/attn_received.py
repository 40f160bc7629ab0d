"""The page of attn_received: the attention that each key receives from a few queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import check_dtype, check_same_device, dtype_name, fail
from .._registry import Op, TuningCase
from ..reference import attn_received as reference
from .split_attn import check_keys, check_query

SCHEMA = "attn_received(Tensor q, Tensor k, *, Tensor? mask=None, float? scale=None) -> Tensor"


def _check(q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> None:
    op = "attn_received"
    check_query(op, q, "[B, H, G, D]")
    check_keys(op, "k", k, q, "S")
    if mask is None:
        return
    check_same_device(op, "mask", mask, "q", q)
    check_dtype(op, "mask", mask, torch.bool)
    b, s = k.shape[0], k.shape[2]
    fits = mask.dim() <= 2 and all(have in (1, want) for have, want in zip(reversed(mask.shape), (s, b), strict=False))
    if not fits:
        fail(op, f"mask must broadcast to [B, S] = [{b}, {s}], got {list(mask.shape)}")


def _fake(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    """MAR's decoder: the tokens of a step over all 320."""
    for dtype in (torch.bfloat16, torch.float16):
        for d in (64, 80, 128):
            for batch in (16, 128):
                q, k = (torch.randn(batch, 16, rows, d, device=device, dtype=dtype) for rows in (7, 320))
                yield TuningCase({"dtype": dtype_name(dtype), "D": d}, batch * 16 * 320, (q, k), {})


RECEIVED = Op(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference=reference.attn_received,
    triton="attn_received",
    tuning=_tuning,
)


def attn_received(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """How much softmax attention each key receives from the queries, summed over heads and queries.

    A measure of which tokens matter to a few others; values never enter it.

        refresh = fastops.attn_received(q, k).topk(48).indices

    Args:
        q: [B, H, G, D] fp32, fp16 or bf16, D from 1 to 256, any strides but for a contiguous last dimension.
        k: [B, H, S, D] of q's dtype, strides as q's.
        mask: bool that broadcasts to [B, S], True where the key takes part; all do when None. A key left out is not
            read and receives 0.
        scale: of the scores; 1 / sqrt(D) when None.
        backend: None to choose, or "triton" | "reference".

    Returns:
        [B, S] fp32, contiguous; a row sums to H G, or to 0 where no key takes part.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Source: MARché, arXiv:2506.12035. Cost: B H (G + S) D itemsize + 4 B S + mask bytes, 2 B H G S D flops. No gradient:
    the result is a constant of the graph. Deterministic.
    """
    return RECEIVED(backend, q, k, mask=mask, scale=scale)  # type: ignore[no-any-return]
