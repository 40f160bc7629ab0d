"""bitsandbytes' Linear4bit layers on our operators, where they stand: the module, its weight and its hooks stay."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._bitsandbytes import check_state, from_cpu_layout, is_cpu_layout, library
from ._product import product

WHO = "accelerate_bitsandbytes"


def accelerate_bitsandbytes(model: nn.Module, *, progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """Let the bitsandbytes 4-bit layers of `model` compute by fastops.nf4_linear, on the weights that they hold.

    >>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    >>> fastops.methods.accelerate_bitsandbytes(model)

    Nothing is copied or repacked, before or after. Each layer stays the module that it was (its class becomes a
    subclass of its class, of the same name), with its Params4bit, its hooks, those of accelerate too, and with what
    wraps it, such as PEFT's adapters; it can be moved, saved and trained as before. What it computes is what
    bitsandbytes computes: x is cast to the layer's compute_dtype, the result back to x's dtype, and gradients flow to x
    and to the bias.

    A layer whose weight is not quantised yet is left to bitsandbytes until it is. Layers in the layout of bitsandbytes'
    CPU kernel (left by a forward in eval mode on a CPU with AVX512-BF16) are put back into the plain one; their scales,
    which bitsandbytes has rounded to bf16, stay rounded. int8 layers, and subclasses of Linear4bit with a forward of
    their own, stay as they are.

    Args:
        model: any module that holds bitsandbytes.nn.Linear4bit layers, or such a layer itself. A second call changes
            nothing; restore_bitsandbytes undoes it.
        progress: called with (layers done, layers in all) after each layer.

    Returns:
        The same model.

    Raises (and leaves the model unchanged):
        ModuleNotFoundError: bitsandbytes is not installed.
        ValueError: there is no such layer, or one is of another quant_type than nf4 and fp4.
        RuntimeError: a blocksize is not a power of two from 32 to 4096.
    """
    base: Any = library(WHO).nn.Linear4bit
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, base) and _can_take(m, base)]
    if not layers:
        raise ValueError(
            f"{WHO}: model must hold a bitsandbytes Linear4bit layer, got {type(model).__name__} with none"
        )
    for name, layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            check_state(WHO, name or "model", state)
    for done, (_, layer) in enumerate(layers, 1):
        _leave_cpu_layout(layer)
        kind: Any = type(layer)
        _become(layer, _accelerated(kind))
        if progress is not None:
            progress(done, len(layers))
    return model


def restore_bitsandbytes(model: nn.Module) -> nn.Module:
    """Give the layers that accelerate_bitsandbytes took back to bitsandbytes; the weights are where they were.

    Returns:
        The same model; unchanged where no layer was taken.
    """
    for layer in model.modules():
        if _is_accelerated(type(layer)):
            _become(layer, type(layer).__base__)
    return model


def _is_accelerated(kind: type) -> bool:
    return "_bitsandbytes_forward" in vars(kind)


def _can_take(layer: nn.Module, base: type) -> bool:
    """Whether the layer computes by Linear4bit's own forward, or already by ours."""
    kind, own = type(layer), vars(layer)
    # accelerate's hooks put theirs into `forward` and keep the one that it calls in `_old_forward`.
    called = own.get("_old_forward" if "_hf_hook" in own else "forward")
    if called is not None and getattr(called, "__func__", None) is not kind.forward:
        return False
    return _is_accelerated(kind) or kind.forward is base.forward  # type: ignore[attr-defined]


def _become(layer: Any, kind: Any) -> None:
    before = type(layer).forward
    layer.__class__ = kind
    for name in ("forward", "_old_forward"):  # accelerate's hooks leave bound methods in either
        if getattr(vars(layer).get(name), "__func__", None) is before:
            setattr(layer, name, types.MethodType(kind.forward, layer))


@functools.cache
def _accelerated(kind: Any) -> Any:
    """The subclass of Linear4bit (or of LinearNF4, …) with our forward; its name stays, since others go by it."""
    if _is_accelerated(kind):
        return kind
    members = {"forward": _forward, "_bitsandbytes_forward": kind.forward, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _leave_cpu_layout(layer: Any) -> None:
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None or not is_cpu_layout(state):
        return
    packed, state.absmax = from_cpu_layout(weight.data, state)
    weight.data = packed.reshape(state.original_qshape).view(weight.quant_storage)
    state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    state.offset = state.state2 = None  # its scales are no longer double-quantised


def _forward(self: Any, x: Tensor) -> Tensor:
    """y [..., out_features] of x [..., in_features], in the dtype of x, by fastops.nf4_linear."""
    # All that may have moved or been replaced since the last call is read anew, by the shortest ways there are.
    weight = self._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is None or is_cpu_layout(state):
        return self._bitsandbytes_forward(x)  # type: ignore[no-any-return]
    out_features, in_features = state.shape
    if x.shape[-1] != in_features:
        raise RuntimeError(f"{WHO}: x must have {in_features} features in its last dimension, got {list(x.shape)}")
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    given, computed = x.dtype, self.compute_dtype or x.dtype
    if computed != given:
        x = x.to(computed)
    bias = self._parameters.get("bias")
    if bias is not None and bias.dtype != computed:
        bias = bias.to(computed)
    scales = {} if state.quant_type == "nf4" else {"code": state.code}
    if state.nested:
        inner = state.state2
        scales["absmax_code"], scales["absmax_scale"] = inner.code, inner.absmax
        scales["absmax_offset"], scales["absmax_blocksize"] = state.offset, inner.blocksize
    with torch._C.DisableTorchFunctionSubclass():  # a Params4bit takes every call through Python
        packed = weight
        if torch.is_grad_enabled() or weight.dtype != torch.uint8:  # backward comes when this block is left
            packed = weight.data.view(torch.uint8)
        y = product(x, packed, state.absmax, out_features, state.blocksize, bias, scales)
    return y if computed == given else y.to(given)
