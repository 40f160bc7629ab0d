"""The linear layers of a decoder: one product where a Hugging Face model has several of the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.dense_linear import DENSE, dense_panels, dense_weight
from ..ops.nf4_gemv import LINEAR
from ..ops.nf4_quantize import nf4_quantize
from ._architecture import WHO

KINDS = ("dense", "nf4")


class Dense(nn.Module):
    """x @ weight.T + bias. Where dense_linear has a kernel the weight is in its panels; `weight` is then a copy."""

    bias: Tensor | None
    _weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.weights = weight.shape[0], weight.numel()
        self.register_buffer("_weight", weight, persistent=False)  # [N, K], or the panels
        self.register_buffer("bias", bias)
        self._lay_out()

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        return dense_weight(self._weight, self.out_features) if self._in_panels else self._weight

    @property
    def _in_panels(self) -> bool:
        return self._weight.dim() == 3

    def is_held(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the weight, not a copy."""
        return self._weight.data_ptr() == tensor.data_ptr()

    @property
    def weight_bytes(self) -> int:
        """What a step must read."""
        return self.weights * self._weight.element_size()

    def _lay_out(self) -> None:
        types = (torch.float32, torch.float16, torch.bfloat16)
        if not DENSE.unavailable("cpu", self._weight.device) and self._weight.dtype in types:
            self._weight = dense_panels(self._weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K]."""
        if not self._in_panels:
            return functional.linear(x, self._weight, self.bias)
        out: Tensor = DENSE(None, x, self._weight, self.out_features, bias=self.bias)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Dense:
        self._weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self


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
