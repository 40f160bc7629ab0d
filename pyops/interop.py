"""Call any op with another framework's arrays: NumPy, CuPy, JAX, or anything else with `__dlpack__`.

    packed, absmax = fastops.interop.nf4_quantize(numpy_weights)
    weights = fastops.interop.nf4_dequant(cupy_packed, cupy_absmax, (4096, 4096), "float16")

Nothing is copied: inputs become tensors through DLPack, the op runs on the caller's current stream, and results come
back as the caller's array type. Tensors among the arguments stay what they are; with tensors only, tensors come back.
This is the only module that imports CuPy, and only when a CuPy array is given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from . import _registry
from ._checks import fail


def __getattr__(name: str) -> Callable[..., Any]:
    """`fastops.interop.<op>`: the op for arrays of any framework."""
    if name.startswith("_") or name not in _registry.registry:
        raise AttributeError(f"fastops.interop has no op {name!r}; it has {', '.join(sorted(_registry.registry))}")
    return _wrapped(name)


def __dir__() -> list[str]:
    return sorted(_registry.registry)


@functools.cache
def _wrapped(name: str) -> Callable[..., Any]:
    function = getattr(importlib.import_module(__package__), name)
    signature = inspect.signature(function)
    arguments = _registry.registry[name].default._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        framework = _framework(list(given.arguments.values()))
        for key, value in given.arguments.items():
            given.arguments[key] = _to_torch(name, key, value, key in written)
        with _caller_stream(framework, list(given.arguments.values())):
            result = function(*given.args, **given.kwargs)
        return _to_framework(name, framework, result)

    return call


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, Tensor)


def _framework(values: list[Any]) -> str:
    """The top-level module of the first foreign array, or "torch"."""
    for value in values:
        if _is_array(value):
            roots = [base.__module__.partition(".")[0] for base in type(value).__mro__]
            known = next((root for root in roots if root in ("numpy", "cupy", "jax", "jaxlib")), roots[0])
            return "jax" if known == "jaxlib" else known
    return "torch"


def _to_torch(op: str, name: str, value: Any, written: bool) -> Any:
    if name == "dtype":
        return _dtype_of(op, value)
    if not _is_array(value):
        return value
    if written and _framework([value]) == "jax":
        fail(op, f"{name} must be a writable array, got a JAX array, which is immutable: copy it to a tensor first")
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):
        fail(op, f"{name} must have no negative stride, got strides {value.strides}: copy it first")
    if getattr(getattr(value, "flags", None), "writeable", True):
        return torch.utils.dlpack.from_dlpack(value)
    if written:
        fail(op, f"{name} must be a writable array, got a read-only one")
    with warnings.catch_warnings():  # torch has no read-only tensors and says so; the op does not write this one
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(value)


def _dtype_of(op: str, value: Any) -> torch.dtype | None:
    """A torch dtype from its name, or from torch's, NumPy's or JAX's own."""
    if value is None or isinstance(value, torch.dtype):
        return value
    name = value if isinstance(value, str) else getattr(value, "name", None) or getattr(value, "__name__", "")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        fail(op, f"dtype must be a floating-point dtype or its name, got {value!r}")
    return dtype


@contextlib.contextmanager
def _caller_stream(framework: str, values: list[Any]) -> Iterator[None]:
    """Run on CuPy's current stream; others order their work through DLPack's own stream protocol."""
    device = next((v.device for v in values if isinstance(v, Tensor) and v.is_cuda), None)
    if framework != "cupy" or device is None:
        yield
        return
    import cupy

    stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream(device.index).ptr, device=device)
    with torch.cuda.stream(stream):
        yield


def _to_framework(op: str, framework: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to_framework(op, framework, v) for v in value)
    if isinstance(value, dict):
        return {key: _to_framework(op, framework, v) for key, v in value.items()}
    if not isinstance(value, Tensor) or framework == "torch":
        return value
    if framework == "numpy":
        if value.dtype == torch.bfloat16:
            fail(op, "dtype must be float32 or float16 for NumPy, which has no bfloat16")
        return value.numpy()
    module = importlib.import_module("jax.dlpack" if framework == "jax" else framework)
    return module.from_dlpack(value)
