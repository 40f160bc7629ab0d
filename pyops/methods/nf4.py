"""NF4 weights for any model of nn.Linear layers: 4 bits a weight and one scale a block.

The weight is expanded to the activations' dtype at every call, by nf4_dequant, and multiplied by torch: what a forward
computes is exactly the dense layer of the dequantised weights.

Source: QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_float_dtype
from ..ops.nf4_dequant import check_blocksize, nf4_dequant
from ..ops.nf4_quantize import ABSMAX_BLOCKSIZE, nf4_quantize

DQ_BUFFERS = ("absmax_code", "absmax_scale", "absmax_offset")


class Nf4Linear(nn.Module):
    """A linear layer whose weight is stored in NF4: y = x @ nf4_dequant(packed).T + bias.

    The weight is a constant: gradients flow to x and to the bias. A new layer has a zero weight until a state dict is
    loaded; `from_linear` makes one from a dense layer.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is one.
        blocksize: weights a block, a power of two from 32 to 4096.
        double_quant: whether the scales are themselves stored in 8 bits.
        device: of every tensor.
        dtype: of the bias; scales are always fp32, and a call computes in the dtype of x.
    """

    packed: Tensor
    absmax: Tensor
    absmax_code: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_blocksize("Nf4Linear", "blocksize", blocksize)
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.double_quant = blocksize, double_quant
        n = in_features * out_features
        blocks = -(-n // blocksize)
        self.register_buffer("packed", torch.zeros(-(-n // 2), dtype=torch.uint8, device=device))
        scale_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=scale_dtype, device=device))
        sizes = ((256,), (-(-blocks // ABSMAX_BLOCKSIZE),), ())
        for name, size in zip(DQ_BUFFERS, sizes, strict=True):
            self.register_buffer(name, torch.zeros(size, device=device) if double_quant else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = False) -> Nf4Linear:
        """Quantise a dense layer's weight, on the device where it is; the bias is kept, not copied.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: its weight is on the meta device, so there is nothing to quantise.
            RuntimeError: from nf4_quantize, for a blocksize or a weight dtype it does not take.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Nf4Linear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError("Nf4Linear.from_linear: linear's weight must hold values, got one on the meta device")
        # Quantised first: a bad argument raises before a layer is built, and the new layer's buffers are these.
        if double_quant:
            packed, absmax, dq = nf4_quantize(weight, blocksize, double_quant=True)
        else:
            packed, absmax = nf4_quantize(weight, blocksize)
            dq = {}
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            blocksize=blocksize,
            double_quant=double_quant,
            device="meta",
        )
        layer.packed, layer.absmax = packed, absmax
        for name in DQ_BUFFERS if double_quant else ():
            setattr(layer, name, dq[name])
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], in the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"Nf4Linear: x must have {self.in_features} features in its last dimension, got {list(x.shape)}"
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, in_features] that a call with this dtype multiplies by."""
        args, kwargs = self.dequant_arguments(dtype)
        return nf4_dequant(*args, **kwargs)

    def dequant_arguments(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of nf4_dequant for this layer: `fastops.explain("nf4_dequant", *args, **kwargs)` takes them."""
        kwargs: dict[str, Any] = {}
        if self.double_quant:
            kwargs = {name: getattr(self, name) for name in DQ_BUFFERS} | {"absmax_blocksize": ABSMAX_BLOCKSIZE}
        return (self.packed, self.absmax, [self.out_features, self.in_features], dtype, self.blocksize), kwargs

    def memory_bytes(self) -> int:
        """Bytes this layer holds: packed weights, scales and bias."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        """Move the scales where `fn` moves them but never round them: model.half() must not touch the weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def quantize_model(
    model: nn.Module,
    *,
    skip: Collection[str] = ("lm_head",),
    blocksize: int = 64,
    double_quant: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Replace the nn.Linear layers of `model` by Nf4Linear, in place, one after the other.

    Only layers of exactly the class nn.Linear are taken: a subclass (an adapter, another library's quantised layer, the
    output projection inside nn.MultiheadAttention) relies on its weight and stays as it is. A layer that is used in two
    places is quantised once and stays shared.

    Args:
        model: any module that holds linear layers; each is quantised on the device where it is.
        skip: names of layers to leave dense, or of modules to leave alone as a whole: a full dotted name, or one
            component of it ("lm_head", "o_proj", "model.layers.0").
        blocksize: weights a block, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        progress: called with (layers done, layers in all) after each layer.

    Returns:
        The same model.

    Raises (and leaves the model unchanged):
        TypeError: `model` is itself an nn.Linear, or `skip` is one string.
        ValueError: no layer is left to quantise, or one is on the meta device.
        RuntimeError: blocksize is not a power of two from 32 to 4096, or a weight is not fp32, fp16 or bf16.
    """
    if type(model) is nn.Linear:
        raise TypeError("quantize_model: model must contain linear layers, got an nn.Linear: use Nf4Linear.from_linear")
    if isinstance(skip, str):
        raise TypeError(f"quantize_model: skip must be a collection of names, got the string {skip!r}")
    check_blocksize("quantize_model", "blocksize", blocksize)
    places = _linears(model, frozenset(skip))
    if not places:
        raise ValueError(f"quantize_model: model must have an nn.Linear outside of skip={tuple(skip)}, got none")
    for linear, spots in places.items():
        if linear.weight.is_meta:
            raise ValueError(f"quantize_model: {spots[0][0]} must hold values, got a weight on the meta device")
        check_float_dtype("quantize_model", f"{spots[0][0]}.weight", linear.weight.dtype)
    total = len(places)
    while places:  # emptied as it goes, so that each dense weight is freed before the next is quantised
        linear, spots = places.popitem()
        layer = Nf4Linear.from_linear(linear, blocksize, double_quant)
        for _, parent, attribute in spots:
            setattr(parent, attribute, layer)
        if progress is not None:
            progress(total - len(places), total)
    return model


def _linears(model: nn.Module, skip: frozenset[str]) -> dict[nn.Linear, list[tuple[str, nn.Module, str]]]:
    """Every nn.Linear outside of `skip`, with (full name, parent, attribute) of each place that holds it."""
    found: dict[nn.Linear, list[tuple[str, nn.Module, str]]] = {}
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():  # named_children() would name a repeated layer only once
            name = f"{prefix}.{attribute}" if prefix else attribute
            if type(child) is nn.Linear and not _skipped(name, skip):
                found.setdefault(child, []).append((name, parent, attribute))
    return found


def _skipped(name: str, skip: frozenset[str]) -> bool:
    """Whether `skip` names this layer, a module it lies in, or a component of its name."""
    parts = name.split(".")
    return any(part in skip for part in parts) or any(".".join(parts[:i]) in skip for i in range(1, len(parts) + 1))
