"""Nf4Linear, the layer of fastops.methods.nf4: its weight, its way to and from bitsandbytes, its state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_float_dtype, dtype_name
from ..ops.nf4_dequant import check_blocksize, check_code, nf4_dequant
from ..ops.nf4_quantize import ABSMAX_BLOCKSIZE, nf4_quantize
from . import _bitsandbytes
from ._product import product

DQ_BUFFERS = ("absmax_code", "absmax_scale", "absmax_offset")
BUFFERS = ("packed", "absmax", "code", *DQ_BUFFERS)


class Nf4Linear(nn.Module):
    """A linear layer whose weight is stored in 4 bits: y = x @ nf4_dequant(packed).T + bias.

    The weight is a constant: gradients flow to x and to the bias. A new layer has a zero weight until a state dict is
    loaded; `from_linear` and `from_bitsandbytes` make one from a dense or a bitsandbytes layer.

    A call computes in the dtype of x, or in that of torch.autocast within its block, and returns it; sums are fp32.
    With `compute_dtype` it is as in bitsandbytes: x is cast to that, the result back to the dtype of x, and autocast
    changes nothing.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is one.
        blocksize: weights a block, a power of two from 32 to 4096.
        double_quant: whether the scales are themselves stored in 8 bits.
        code: fp32 [16], the value of each nibble, which is copied; NF4 when None.
        absmax_blocksize: scales a block of double quantisation, a power of two from 32 to 4096.
        compute_dtype: fp32, fp16 or bf16 to compute in, whatever x is; None for the dtype of x.
        device: of every tensor.
        dtype: of the bias, and of the dense weight that `to_linear` makes; scales are always fp32.

    Its state dict holds `packed` (uint8 [ceil(n / 2)], n = in_features * out_features), `absmax`, and where there are
    such, `code`, `absmax_code`, `absmax_scale`, `absmax_offset` and `bias`, in the shapes of fastops.nf4_linear's
    arguments. It loads bitsandbytes' entries as well; bitsandbytes_state_dict writes them.

    Source: QLoRA, arXiv:2305.14314, section 3.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor | None
    bias: nn.Parameter | None
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
        code: Tensor | None = None,
        absmax_blocksize: int = ABSMAX_BLOCKSIZE,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_blocksize("Nf4Linear", "blocksize", blocksize)
        check_blocksize("Nf4Linear", "absmax_blocksize", absmax_blocksize)
        if code is not None:
            check_code("Nf4Linear", code, "code", code)
        if compute_dtype is not None:
            check_float_dtype("Nf4Linear", "compute_dtype", compute_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.double_quant, self.absmax_blocksize = blocksize, double_quant, absmax_blocksize
        self.compute_dtype, self.weight_dtype = compute_dtype, dtype or torch.get_default_dtype()
        n = in_features * out_features
        blocks = -(-n // blocksize)
        self.register_buffer("packed", torch.zeros(-(-n // 2), dtype=torch.uint8, device=device))
        scale_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=scale_dtype, device=device))
        self.register_buffer("code", None if code is None else code.to(device, copy=True))
        sizes = ((256,), (-(-blocks // absmax_blocksize),), ())
        for name, size in zip(DQ_BUFFERS, sizes, strict=True):
            self.register_buffer(name, torch.zeros(size, device=device) if double_quant else None)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = False, *, code: Tensor | None = None
    ) -> Nf4Linear:
        """Quantise a dense layer's weight, on the device where it is; the bias is kept, not copied.

        Args:
            linear: the dense layer.
            blocksize: weights a block, a power of two from 32 to 4096.
            double_quant: store the scales in 8 bits.
            code: fp32 [16] on the weight's device, the value of each nibble in any order; NF4 when None.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: its weight is on the meta device, so there is nothing to quantise.
            RuntimeError: from nf4_quantize, for a blocksize, a code or a weight dtype it does not take.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Nf4Linear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError("Nf4Linear.from_linear: linear's weight must hold values, got one on the meta device")
        # Quantised first: a bad argument raises before a layer is built, and the new layer's buffers are these.
        scales: dict[str, Any] = {}
        if double_quant:
            packed, absmax, scales = nf4_quantize(weight, blocksize, code=code, double_quant=True)
        else:
            packed, absmax = nf4_quantize(weight, blocksize, code=code)
        if code is not None:
            scales["code"] = code.clone()
        tensors = {"packed": packed, "absmax": absmax, "blocksize": blocksize, **scales}
        layer = cls._of(linear.in_features, linear.out_features, tensors, weight.dtype, linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_bitsandbytes(cls, layer: Any) -> Nf4Linear:
        """Take over a bitsandbytes layer's weight as it is: packed weights, scales and bias are shared, not copied.

        Only a weight in the layout of bitsandbytes' CPU kernel is converted, to new tensors; bitsandbytes has rounded
        its scales to bf16. The layer's compute_dtype becomes this layer's.

        Args:
            layer: a bitsandbytes.nn.Linear4bit, or a Params4bit (then there is no bias and no compute_dtype), NF4 or
                FP4, double-quantised or not.

        Raises:
            ModuleNotFoundError: bitsandbytes is not installed.
            TypeError: `layer` is something else.
            ValueError: it is not quantised yet, or neither NF4 nor FP4, or its shape is not the layer's.
            RuntimeError: a blocksize is not a power of two from 32 to 4096.
        """
        who = "Nf4Linear.from_bitsandbytes"
        kinds = _bitsandbytes.library(who).nn
        if not isinstance(layer, (kinds.Linear4bit, kinds.Params4bit)):
            raise TypeError(f"{who}: layer must be a Linear4bit or a Params4bit, got {type(layer).__name__}")
        whole = isinstance(layer, kinds.Linear4bit)
        weight = layer.weight if whole else layer
        state: Any = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
        tensors = _bitsandbytes.read_layer(who, "layer", weight, state)
        out_features, in_features = state.shape
        if not whole:
            return cls._of(in_features, out_features, tensors, state.dtype, None)
        if (out_features, in_features) != (layer.out_features, layer.in_features):
            wanted = [layer.out_features, layer.in_features]
            raise ValueError(f"{who}: layer's weight must be {wanted} as the layer is, got {list(state.shape)}")
        new = cls._of(in_features, out_features, tensors, state.dtype, layer.bias)
        new.compute_dtype = layer.compute_dtype
        return new.train(layer.training)

    @classmethod
    def _of(
        cls,
        in_features: int,
        out_features: int,
        weight: dict[str, Any],
        dtype: torch.dtype,
        bias: nn.Parameter | None,
    ) -> Nf4Linear:
        """A layer that holds these tensors, named as the operators' arguments."""
        layer = cls(
            in_features,
            out_features,
            bias=False,
            blocksize=weight["blocksize"],
            double_quant="absmax_code" in weight,
            absmax_blocksize=weight.get("absmax_blocksize", ABSMAX_BLOCKSIZE),
            device="meta",
            dtype=dtype,
        )
        for name in BUFFERS:
            setattr(layer, name, weight.get(name))
        layer.bias = bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], in the dtype of x (under autocast, in autocast's).

        Raises:
            RuntimeError: x has another number of features, or from nf4_linear, for a dtype or a device.
        """
        if x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"Nf4Linear: x must have {self.in_features} features in its last dimension, got {list(x.shape)}"
            )
        given = None
        if self.compute_dtype is not None:
            given = x.dtype
            x = x.to(self.compute_dtype)
        elif torch.is_autocast_enabled(kind := "cuda" if x.is_cuda else "cpu"):
            x = x.to(torch.get_autocast_dtype(kind))
        buffers: dict[str, Any] = self._buffers  # through __getattr__ each would cost half a microsecond
        bias: Tensor | None = self._parameters.get("bias")
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        scales = {}
        if self.double_quant:
            scales = {name: buffers[name] for name in DQ_BUFFERS}
            scales["absmax_blocksize"] = self.absmax_blocksize
        if buffers["code"] is not None:
            scales["code"] = buffers["code"]
        y = product(x, buffers["packed"], buffers["absmax"], self.out_features, self.blocksize, bias, scales)
        return y if given is None else y.to(given)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, in_features], rounded to `dtype`."""
        args, kwargs = self.dequant_arguments(dtype)
        return nf4_dequant(*args, **kwargs)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer of the dequantised weight, in `dtype` or that of the weight it was; the bias is shared."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.dequantize(dtype or self.weight_dtype))
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def to_bitsandbytes(self) -> Any:
        """The same layer as a bitsandbytes.nn.Linear4bit, which shares every tensor with this one.

        Raises:
            ModuleNotFoundError: bitsandbytes is not installed.
            ValueError: the code table is neither NF4's nor FP4's.
        """
        shape = (self.out_features, self.in_features)
        layer = _bitsandbytes.make_layer(
            "Nf4Linear.to_bitsandbytes", self._weight(), shape, self.weight_dtype, self.compute_dtype
        )
        layer.bias = self.bias
        return layer.train(self.training)

    def linear_arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of nf4_linear for this layer: `fastops.explain("nf4_linear", *args, **kwargs)` takes them."""
        kwargs = self._weight()
        packed, absmax, blocksize = (kwargs.pop(name) for name in ("packed", "absmax", "blocksize"))
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        return (x, packed, absmax, self.out_features, blocksize), kwargs | {"bias": bias}

    def dequant_arguments(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of nf4_dequant for this layer: `fastops.explain("nf4_dequant", *args, **kwargs)` takes them."""
        kwargs = self._weight()
        packed, absmax, blocksize = (kwargs.pop(name) for name in ("packed", "absmax", "blocksize"))
        return (packed, absmax, [self.out_features, self.in_features], dtype, blocksize), kwargs

    def _weight(self) -> dict[str, Any]:
        """What this layer holds of the operators' arguments."""
        found: dict[str, Any] = {n: b for n in BUFFERS if (b := self._buffers[n]) is not None}
        found["blocksize"] = self.blocksize
        if self.double_quant:
            found["absmax_blocksize"] = self.absmax_blocksize
        return found

    def memory_bytes(self) -> int:
        """Bytes this layer holds: packed weights, scales and bias."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        shown = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}"
        )
        if self.code is not None:
            shown += ", code=[16]"
        if self.compute_dtype is not None:
            shown += f", compute_dtype={dtype_name(self.compute_dtype)}"
        return shown

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        """Move the scales where `fn` moves them but never round them: model.half() must not touch the weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take bitsandbytes' entries as well as this layer's own."""
        own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        found = _bitsandbytes.from_entries(own)
        if found is not None:
            weight, facts = found
            state_dict = {prefix + n: t for n, t in own.items() if not n.startswith("weight")}
            state_dict |= {prefix + n: t for n, t in weight.items()}
            wanted = {"shape": [self.out_features, self.in_features], "blocksize": self.blocksize}
            wanted |= {"nested_blocksize": self.absmax_blocksize} if "nested_blocksize" in facts else {}
            got = {name: facts[name] for name in wanted}
            if got != wanted:
                args[-1].append(f"{prefix}weight of bitsandbytes must have {wanted}, got {got}.")
        super()._load_from_state_dict(state_dict, prefix, *args)
