"""Tools to prove an op: the measure of error, hostile inputs, and which backends there are to prove.

Used by this package's own tests and benches; useful for a backend of one's own too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._registry import find, registry, triton_interprets
from .reference._truth import error_ratio

__all__ = ["available", "devices", "error_ratio", "non_contiguous", "on_copies", "poison", "trusted"]


def devices() -> list[torch.device]:
    """The CPU, and the first CUDA device where there is one."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    return found


def available(op: str) -> list[tuple[str, torch.device]]:
    """Every (backend, device) that can run `op` here."""
    return [(backend, device) for device in devices() for backend in registry[op].available(device)]


def trusted(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """False where a wrong result is the tool's: Triton's interpreter computes bf16 incorrectly."""
    return not (backend == "triton" and device.type == "cpu" and triton_interprets() and dtype == torch.bfloat16)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Within this block uninitialised memory is NaN (or the largest integer), in C++ too, so unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    pooled = _extension.C is not None and _extension.C.enable_output_pool(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        if pooled and _extension.C is not None:
            _extension.C.enable_output_pool(True)


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values with gaps between all elements; the gaps hold NaN or the largest integer."""
    if tensor.dtype.is_floating_point:
        filler: float = float("nan")
    else:
        filler = 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    wide = torch.full((*tensor.shape, 2), filler, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def on_copies(call: Callable[..., Any], op: str, *args: Any, **kwargs: Any) -> Any:
    """What `call` returns for these arguments of `op`; of an op that changes some, a copy of which it is given, too.

    For an op in place: (what it returns, if anything, ..., the changed tensors in the schema's order).
    """
    found = find(op)
    copies = tuple(a.clone() if i in found.written else a for i, a in enumerate(args))
    return found.results(call(*copies, **kwargs), copies)
