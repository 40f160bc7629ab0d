"""The page of merge_state: two attentions over disjoint keys become one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_dtype, check_float_dtype, check_same_device, dtype_name, fail
from .._registry import Op, TuningCase
from ..reference import merge_state as reference
from .split_attn import check_rows

SCHEMA = "merge_state(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor o, Tensor lse)"


def _check(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_state"
    check_float_dtype(op, "o_a", o_a.dtype)
    if o_a.dim() < 1:
        fail(op, "o_a must have at least 1 dimension, got 0")
    check_rows(op, "o_a", o_a)
    check_same_device(op, "o_b", o_b, "o_a", o_a)
    if o_b.dtype != o_a.dtype:
        fail(op, f"o_b must be {dtype_name(o_a.dtype)} like o_a, got {dtype_name(o_b.dtype)}")
    if o_b.shape != o_a.shape:
        fail(op, f"o_b must be {list(o_a.shape)} like o_a, got {list(o_b.shape)}")
    check_rows(op, "o_b", o_b)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_same_device(op, name, lse, "o_a", o_a)
        check_dtype(op, name, lse, torch.float32)
        if lse.shape != o_a.shape[:-1]:
            fail(op, f"{name} must be {list(o_a.shape[:-1])}, got {list(lse.shape)}")


def _fake(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    for dtype in FLOAT_DTYPES:
        for batch in (16, 128):
            o_a, o_b = (torch.randn(batch, 16, 64, 64, device=device, dtype=dtype) for _ in range(2))
            lse_a, lse_b = (torch.randn(batch, 16, 64, device=device) for _ in range(2))
            yield TuningCase({"dtype": dtype_name(dtype)}, o_a.numel(), (o_a, lse_a, o_b, lse_b), {})


MERGE = Op(SCHEMA, check=_check, fake=_fake, reference=reference.merge_state, triton="merge_state", tuning=_tuning)


def merge_state(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over disjoint keys become the attention over all of those keys.

        o, lse = fastops.merge_state(*fastops.split_attn(q, k, v, none, none), *other)

    Args:
        o_a: [..., D] fp32, fp16 or bf16, any leading sizes, any strides but for a contiguous last dimension.
        lse_a: [...] fp32, the natural logarithm of the sum of exp(score); -inf means that no key was seen, and then o_a
            counts for nothing, whatever it holds.
        o_b: as o_a.
        lse_b: as lse_a.
        backend: None to choose, or "triton" | "reference".

    Returns:
        o: [..., D] of o_a's dtype, contiguous.
        lse: [...] fp32, contiguous. Where neither saw a key, o is 0 and lse -inf.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Source: arXiv:2501.01005, section 2.2. Cost: 3 D itemsize + 12 bytes and 3 D flops a row. No gradient: the results
    are constants of the graph. Deterministic; rows do not influence each other.
    """
    return MERGE(backend, o_a, lse_a, o_b, lse_b)  # type: ignore[no-any-return]
