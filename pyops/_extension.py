"""Loads the compiled parts, `_C` (operators) and `_host` (objects without tensors), where they exist.

torch is imported first: the extension finds libtorch's symbols in the process. A file that is there but does not load
warns, since its absence would otherwise look like slow kernels; `python -m fastops info` repeats the reason.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and why not."""
    folder = Path(__file__).parent
    files = [*folder.glob(f"{name}.*.so"), *folder.glob(f"{name}.so")]
    if not files:
        return None, f"{__package__}.{name} was not built"
    try:
        return importlib.import_module(f".{name}", __package__), ""
    except ImportError as error:
        reason = f"{__package__}.{name} does not load: {error}"
        if name == "_C":
            warnings.warn(f"{reason}; Triton and reference kernels are used instead", stacklevel=3)
        return None, reason


C, C_MISSING = _load("_C")
host, HOST_MISSING = _load("_host")

HAS_CUDA_KERNELS: bool = C is not None and C.has_cuda_kernels()
