"""The page of dense_linear: the product of a decoding step with plain weights, laid out in panels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_dtype, check_float_dtype, check_same_device, fail
from .._registry import Op
from ..reference import dense_linear as reference

SCHEMA = "dense_linear(Tensor x, Tensor panels, int out_features, *, Tensor? bias=None) -> Tensor"
PANEL = reference.PANEL


def _check(x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None) -> None:
    """csrc/cpu/dense_linear.cpp checks the same in this order."""
    op = "dense_linear"
    check_float_dtype(op, "x", x.dtype)
    if x.dim() < 1:
        fail(op, "x must have at least 1 dimension, got 0")
    if out_features < 0:
        fail(op, f"out_features must not be negative, got {out_features}")
    check_same_device(op, "panels", panels, "x", x)
    check_dtype(op, "panels", panels, x.dtype)
    want = [-(-out_features // PANEL), x.shape[-1], PANEL]
    if panels.dim() != 3 or list(panels.shape) != want:
        form = f"[ceil(out_features / {PANEL}), K, {PANEL}]"
        fail(op, f"panels must be {form} = {want}, got {list(panels.shape)}")
    if not panels.is_contiguous():
        fail(op, "panels must be contiguous")
    if bias is None:
        return
    check_same_device(op, "bias", bias, "x", x)
    check_dtype(op, "bias", bias, x.dtype)
    if bias.dim() != 1 or bias.shape[0] != out_features:
        fail(op, f"bias must be [{out_features}], got {list(bias.shape)}")


def _fake(x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


DENSE = Op(SCHEMA, check=_check, fake=_fake, reference=reference.dense_linear)


def dense_panels(weight: Tensor) -> Tensor:
    """The weight of a linear layer [N, K] as dense_linear reads it: panels [ceil(N / 32), K, 32], zeros after N.

        panels = fastops.dense_panels(layer.weight)

    Output 32 p + i of the layer has its weights in panels[p, :, i]. A copy, of the weight's dtype and device.

    Raises:
        RuntimeError: the weight has not two dimensions.
    """
    if weight.dim() != 2:
        fail("dense_panels", f"weight must be [N, K], got {list(weight.shape)}")
    n, k = weight.shape
    whole = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -n % PANEL))
    return whole.view(-(-n // PANEL), PANEL, k).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def dense_weight(panels: Tensor, out_features: int) -> Tensor:
    """The weight [N, K] that dense_panels laid out."""
    return reference.plain(panels, out_features)


def dense_linear(
    x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x @ W.T + bias, W laid out in panels once; on a CPU at the speed of memory for the rows of a decoding step.

        panels = fastops.dense_panels(layer.weight)
        y = fastops.dense_linear(x, panels, layer.out_features, bias=layer.bias)

    On a GPU, where torch's product of plain weights is the best there is, this restores them and calls it: there the
    layout is good for nothing but running the same program.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides.
        panels: [ceil(N / 32), K, 32] of x's dtype, contiguous: dense_panels(weight).
        out_features: N.
        bias: [N] of x's dtype, or None.
        backend: None to choose, or "cpu" | "reference".

    Returns:
        [..., N] of x's dtype; on a CPU contiguous, added up in fp32 and rounded once.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Source: the roofline, doi:10.1145/1498765.1498785: few rows are bound by the weight's bytes. Cost: N K +
    rows (N + K) elements and 2 rows N K flops. No gradient: the result is a constant of the graph. Deterministic; rows
    do not influence each other.
    """
    return DENSE(backend, x, panels, out_features, bias=bias)  # type: ignore[no-any-return]
