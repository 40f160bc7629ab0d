"""NF4 weights for any model of nn.Linear layers: 4 bits a weight and one scale a block.

Products read the weights in their 4 bits, by fastops.nf4_linear. For models whose layers are bitsandbytes' already,
accelerate_bitsandbytes does the same without replacing them.

Source: QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .._checks import check_float_dtype
from ..ops.nf4_dequant import check_blocksize
from ._accelerate import accelerate_bitsandbytes, restore_bitsandbytes
from ._bitsandbytes import to_entries
from ._nf4_linear import BUFFERS, Nf4Linear

__all__ = [
    "Nf4Linear",
    "accelerate_bitsandbytes",
    "bitsandbytes_state_dict",
    "quantize_model",
    "restore_bitsandbytes",
]


def bitsandbytes_state_dict(model: nn.Module) -> dict[str, Any]:
    """model.state_dict() with the Nf4Linear layers as bitsandbytes writes its 4-bit layers; nothing is copied.

    The entries of such a layer are weight, weight.absmax, weight.quant_map, weight.nested_absmax,
    weight.nested_quant_map and weight.quant_state.bitsandbytes__nf4 (or __fp4): what transformers reads for a model
    with a BitsAndBytesConfig, and what Nf4Linear loads. bitsandbytes is not needed. The tensors may be saved with
    safetensors.

    Raises:
        ValueError: a layer's code table is neither NF4's nor FP4's.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Nf4Linear):
            prefix = f"{name}." if name else ""
            for buffer in BUFFERS:
                state.pop(prefix + buffer, None)
            shape = (layer.out_features, layer.in_features)
            entries = to_entries("bitsandbytes_state_dict", layer._weight(), shape, layer.weight_dtype)
            state |= {prefix + entry: tensor for entry, tensor in entries.items()}
    return state


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
