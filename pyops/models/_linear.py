"""The linear layers of a decoder: one product where a Hugging Face model has several of the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.nf4_gemv import LINEAR
from ..ops.nf4_quantize import nf4_quantize
from ._architecture import WHO

KINDS = ("dense", "nf4")


ROWS = 8  # of x, for which oneDNN lays a weight out; it serves one row and thousands as well


class Dense(nn.Module):
    """x @ weight.T + bias.

    On a CPU the weight is kept as oneDNN lays it out, which for few rows is two to five times as fast as what
    functional.linear does (it lays out anew in every call); `weight` is then a copy.
    """

    bias: Tensor | None
    _weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weights = weight.numel()
        self._laid_out: Tensor | None = None
        self.register_buffer("_weight", weight, persistent=False)  # empty where it is laid out
        self.register_buffer("bias", bias)
        self._lay_out()

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        return self._weight if self._laid_out is None else self._laid_out.to_dense()

    def is_held(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the weight, not a copy."""
        return self._laid_out is None and self._weight.data_ptr() == tensor.data_ptr()

    @property
    def weight_bytes(self) -> int:
        """What a step must read."""
        return self.weights * self._weight.element_size()

    def _lay_out(self) -> None:
        w, types = self._weight, (torch.float32, torch.bfloat16)
        if w.device.type != "cpu" or w.dtype not in types or not w.numel() or not torch.backends.mkldnn.is_available():
            return
        self._laid_out = torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), ROWS)
        self._weight = w.new_empty(0)

    def _restore(self) -> None:
        if self._laid_out is not None:
            self._weight, self._laid_out = self._laid_out.to_dense(), None

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K]."""
        if self._laid_out is None:
            return functional.linear(x, self._weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._laid_out, self.bias, "none", [], "")
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Dense:
        self._restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: with the plain weight, since what oneDNN lays out cannot be copied."""
        buffers = {**self._buffers, "_weight": self.weight}
        return {**self.__dict__, "_laid_out": None, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out()


class Nf4(nn.Module):
    """x @ W.T + bias, W in 4 bits."""

    packed: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, absmax: Tensor, out_features: int, blocksize: int, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", bias)
        self.out_features, self.blocksize, self.weights = out_features, blocksize, 2 * packed.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K]."""
        out: Tensor = LINEAR(None, x, self.packed, self.absmax, self.out_features, self.blocksize, bias=self.bias)
        return out

    @property
    def weight_bytes(self) -> int:
        """What a step must read."""
        return self.packed.numel() + self.absmax.numel() * self.absmax.element_size()


def stack(
    layers: Sequence[nn.Module], kind: str, blocksize: int, device: torch.device, dtype: torch.dtype
) -> Dense | Nf4:
    """One layer whose outputs are those of `layers`, one after the other.

    Args:
        layers: nn.Linear, all of one input.
        kind: "dense" or "nf4".
        blocksize: weights a block of NF4.
        device, dtype: of the new layer.
    """
    for layer in layers:
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.dim() != 2:
            raise ValueError(f"{WHO}: model's linear layers must be dense nn.Linear, got {describe(layer)}")
    weights = [layer.weight.detach().to(device, dtype) for layer in layers if isinstance(layer, nn.Linear)]
    biases: list[Any] = [layer.bias for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        filled = [
            w.new_zeros(w.shape[0]) if b is None else b.detach().to(device, dtype)
            for w, b in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(filled)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if kind == "dense":
        return Dense(weight, bias)
    packed, absmax = nf4_quantize(weight.contiguous(), blocksize)
    return Nf4(packed, absmax, weight.shape[0], blocksize, bias)


def describe(layer: nn.Module) -> str:
    """What a layer is, and what to do about it."""
    name = type(layer).__name__
    if name == "Linear4bit":
        return "bitsandbytes' Linear4bit: load the model without quantisation and give weights='nf4'"
    return name
