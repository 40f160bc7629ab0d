"""The page of nf4_gemv, nf4_linear and nf4_linear_dx: products with 4-bit weights that are never expanded in memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension
from .._checks import check_dtype, check_float_dtype, check_same_device, fail
from .._registry import Op
from ..reference import nf4_gemv as reference
from .nf4_dequant import DQ, check_packed

_FORWARD = "(Tensor x, Tensor packed, Tensor absmax, SymInt out_features, int blocksize=64, *, Tensor? bias=None, "
GEMV_SCHEMA = f"nf4_gemv{_FORWARD}{DQ}) -> Tensor"
LINEAR_SCHEMA = f"nf4_linear{_FORWARD}{DQ}) -> Tensor"
DX_SCHEMA = (
    f"nf4_linear_dx(Tensor dy, Tensor packed, Tensor absmax, SymInt in_features, int blocksize=64, *, {DQ}) -> Tensor"
)


def _check_product(
    op: str,
    left: str,
    activations: Tensor,
    other: str,
    other_features: int,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
) -> None:
    """Activations, the size that they do not tell, and the weight; csrc/common/nf4.h checks the same in this order."""
    check_float_dtype(op, left, activations.dtype)
    if activations.dim() < 1:
        fail(op, f"{left} must have at least 1 dimension, got 0")
    if op == "nf4_gemv" and math.prod(activations.shape[:-1]) != 1:
        fail(op, f"{left} must hold one row, got {list(activations.shape)}")
    if other_features < 0:
        fail(op, f"{other} must not be negative, got {other_features}")
    check_same_device(op, "packed", packed, left, activations)
    features = activations.shape[-1]
    if isinstance(features, int) and isinstance(other_features, int) and features * other_features >= 2**63:
        fail(op, f"{other} must give a weight of fewer than 2^63 elements, got {other_features}")
    check_packed(
        op, packed, absmax, features * other_features, blocksize,
        code, absmax_code, absmax_scale, absmax_offset, absmax_blocksize,
    )  # fmt: skip


def _check(
    op: str,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    **scales: Any,
) -> None:
    _check_product(op, "x", x, "out_features", out_features, packed, absmax, blocksize, **scales)
    if bias is None:
        return
    check_same_device(op, "bias", bias, "x", x)
    check_dtype(op, "bias", bias, x.dtype)
    if bias.numel() != out_features:
        fail(op, f"bias must have out_features = {out_features} elements, got {bias.numel()}")


def _check_dx(dy: Tensor, packed: Tensor, absmax: Tensor, in_features: int, blocksize: int = 64, **scales: Any) -> None:
    _check_product("nf4_linear_dx", "dy", dy, "in_features", in_features, packed, absmax, blocksize, **scales)


def _fake(x: Tensor, packed: Tensor, absmax: Tensor, out_features: int, *args: object, **kwargs: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_dx(dy: Tensor, packed: Tensor, absmax: Tensor, in_features: int, *args: object, **kwargs: object) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


def _describe(op: str, backend: str, x: Tensor, packed: Tensor, absmax: Tensor, other: int, *a: Any, **kw: Any) -> str:
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    if backend != "cuda" or _extension.C is None:
        return ""
    if op == "nf4_linear_dx":
        return "expand: nf4_dequant and cuBLAS"
    blocksize = a[0] if a else kw.get("blocksize", 64)
    plan: str = _extension.C.describe_product(
        x.device.index, math.prod(x.shape[:-1]), other, x.shape[-1], x.element_size(), blocksize,
        kw.get("absmax_code") is not None, packed.data_ptr() % 16 == 0,
    )  # fmt: skip
    return plan


GEMV = Op(
    GEMV_SCHEMA,
    check=functools.partial(_check, "nf4_gemv"),
    fake=_fake,
    reference=reference.nf4_gemv,
    triton="nf4_gemv",
    describe=functools.partial(_describe, "nf4_gemv"),
)
LINEAR = Op(
    LINEAR_SCHEMA,
    check=functools.partial(_check, "nf4_linear"),
    fake=_fake,
    reference=reference.nf4_linear,
    triton="nf4_gemv",
    describe=functools.partial(_describe, "nf4_linear"),
    family="nf4_gemv",
)
DX = Op(
    DX_SCHEMA,
    check=_check_dx,
    fake=_fake_dx,
    reference=reference.nf4_linear_dx,
    triton="nf4_gemv",
    describe=functools.partial(_describe, "nf4_linear_dx"),
    family="nf4_gemv",
)


class _Product(torch.autograd.Function):
    """nf4_gemv or nf4_linear with a gradient for x and bias; the weight is a constant."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor | None,
        absmax_code: Tensor | None,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        out_features: int,
        blocksize: int,
        absmax_blocksize: int,
        one_row: bool,
        backend: str | None,
    ) -> Tensor:
        return (GEMV if one_row else LINEAR)(  # type: ignore[no-any-return]
            backend, x, packed, absmax, out_features, blocksize, bias=bias,
            code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
            absmax_blocksize=absmax_blocksize,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, *weight, _, ctx.blocksize, ctx.absmax_blocksize, _, ctx.backend = inputs
        ctx.save_for_backward(*weight)  # not x: its gradient needs the weight alone
        ctx.in_features = x.shape[-1]
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax, code, absmax_code, absmax_scale, absmax_offset = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = DX(
                ctx.backend, dy, packed, absmax, ctx.in_features, ctx.blocksize,
                code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
                absmax_blocksize=ctx.absmax_blocksize,
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            dbias = (dy.sum(tuple(range(dy.dim() - 1))) if dy.dim() > 1 else dy).reshape(ctx.bias_shape)
        return (dx, dbias, *(None,) * 11)


def _wants_grad(x: Tensor, bias: Tensor | None) -> bool:
    return (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled()


def nf4_gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
    backend: str | None = None,
) -> Tensor:
    """One row times 4-bit weights: y = x @ W.T + bias, reading W [N, K] in its 4 bits.

    The step of a decoder at batch 1. nf4_linear takes any number of rows, this one too.

    Args:
        x: fp32, fp16 or bf16 of any strides, one row of K elements: [K], [1, K], [1, 1, K], …
        packed: uint8, ceil(N K / 2) elements in any shape: W row-major, the high nibble first, on x's device.
        absmax: fp32, ceil(N K / blocksize) elements: the scale of each block of consecutive weights (blocks run across
            rows where K is no multiple of blocksize). Double-quantised: uint8, with absmax_code and absmax_scale.
        out_features: N.
        blocksize: weights a block, a power of two from 32 to 4096.
        bias: N elements of x's dtype, or None.
        code: fp32 [16], the value of each nibble; NF4 when None.
        absmax_code: fp32 [256], the value of each quantised absmax.
        absmax_scale: fp32, ceil(n_blocks / absmax_blocksize) elements, the scale of each block of absmax.
        absmax_offset: fp32, one element added to every absmax after scaling; 0 when None.
        absmax_blocksize: absmax a block of absmax_scale, a power of two from 32 to 4096.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        [..., N], the leading sizes, dtype and device of x, contiguous.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Weights are code * absmax in fp32, perhaps rounded once to x's dtype (its range must hold them); products are added
    up in fp32, also under torch.autocast, which changes nothing here.

    Gradient: for x and bias when grad mode is on and one of them asks for it, from nf4_linear_dx on the same backend;
    the weight is a constant, and there is no second derivative. torch.ops.fastops.nf4_gemv has none: its result is a
    constant of the graph.

    Source: QLoRA, arXiv:2305.14314, section 3. Cost: N K (0.5 + 4 / blocksize) + (N + K) itemsize bytes, 2 N K flops.
    Deterministic.
    """
    if _wants_grad(x, bias):
        return _Product.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, bias, packed, absmax, code, absmax_code, absmax_scale, absmax_offset, out_features, blocksize,
            absmax_blocksize, True, backend,
        )  # fmt: skip
    return GEMV(  # type: ignore[no-any-return]
        backend, x, packed, absmax, out_features, blocksize, bias=bias,
        code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
        absmax_blocksize=absmax_blocksize,
    )  # fmt: skip


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Linear layer on 4-bit weights: y = x @ W.T + bias, for any number of rows.

    The same as torch.nn.functional.linear(x, nf4_dequant(...), bias), and W stays in its 4 bits.

    >>> packed, absmax = fastops.nf4_quantize(weight)
    >>> y = fastops.nf4_linear(x, packed, absmax, weight.shape[0], bias=bias)

    Args:
        x: [..., K] fp32, fp16 or bf16, any leading sizes (M rows in all, also 0) and strides.
        packed: uint8, ceil(N K / 2) elements in any shape: W row-major, the high nibble first, on x's device.
        absmax: fp32, ceil(N K / blocksize) elements: the scale of each block of consecutive weights (blocks run across
            rows where K is no multiple of blocksize). Double-quantised: uint8, with absmax_code and absmax_scale.
        out_features: N.
        blocksize: weights a block, a power of two from 32 to 4096.
        bias: N elements of x's dtype, or None.
        code: fp32 [16], the value of each nibble; NF4 when None.
        absmax_code: fp32 [256], the value of each quantised absmax.
        absmax_scale: fp32, ceil(n_blocks / absmax_blocksize) elements, the scale of each block of absmax.
        absmax_offset: fp32, one element added to every absmax after scaling; 0 when None.
        absmax_blocksize: absmax a block of absmax_scale, a power of two from 32 to 4096.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        [..., N], the leading sizes, dtype and device of x, contiguous.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Weights are code * absmax in fp32, perhaps rounded once to x's dtype (its range must hold them); products are added
    up in fp32, also under torch.autocast, which changes nothing here.

    Gradient: for x and bias when grad mode is on and one of them asks for it, from nf4_linear_dx on the same backend;
    the weight is a constant, and there is no second derivative. torch.ops.fastops.nf4_linear has none: its result is a
    constant of the graph.

    Source: QLoRA, arXiv:2305.14314, section 3. Cost: N K (0.5 + 4 / blocksize) + M (N + K) itemsize bytes,
    2 M N K flops. Deterministic; rows do not influence each other.
    """
    if _wants_grad(x, bias):
        return _Product.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, bias, packed, absmax, code, absmax_code, absmax_scale, absmax_offset, out_features, blocksize,
            absmax_blocksize, False, backend,
        )  # fmt: skip
    return LINEAR(  # type: ignore[no-any-return]
        backend, x, packed, absmax, out_features, blocksize, bias=bias,
        code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
        absmax_blocksize=absmax_blocksize,
    )  # fmt: skip


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    in_features: int,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Gradient of nf4_linear for x: dx = dy @ W, any number of rows.

    Args:
        dy: [..., N] fp32, fp16 or bf16, any leading sizes (M rows in all, also 0) and strides.
        packed: uint8, ceil(N K / 2) elements in any shape: W row-major, the high nibble first, on dy's device.
        absmax: fp32, ceil(N K / blocksize) elements: the scale of each block of consecutive weights (blocks run across
            rows where K is no multiple of blocksize). Double-quantised: uint8, with absmax_code and absmax_scale.
        in_features: K.
        blocksize: weights a block, a power of two from 32 to 4096.
        code: fp32 [16], the value of each nibble; NF4 when None.
        absmax_code: fp32 [256], the value of each quantised absmax.
        absmax_scale: fp32, ceil(n_blocks / absmax_blocksize) elements, the scale of each block of absmax.
        absmax_offset: fp32, one element added to every absmax after scaling; 0 when None.
        absmax_blocksize: absmax a block of absmax_scale, a power of two from 32 to 4096.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        [..., K], the leading sizes, dtype and device of dy, contiguous.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Weights are code * absmax in fp32, perhaps rounded once to dy's dtype (its range must hold them); products are added
    up in fp32, also under torch.autocast, which changes nothing here.

    Source: QLoRA, arXiv:2305.14314, section 3. Cost: N K (0.5 + 4 / blocksize) + M (N + K) itemsize bytes,
    2 M N K flops. No gradient: the result is a constant of the graph. Deterministic; rows do not influence each other.
    """
    return DX(  # type: ignore[no-any-return]
        backend, dy, packed, absmax, in_features, blocksize,
        code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
        absmax_blocksize=absmax_blocksize,
    )  # fmt: skip
