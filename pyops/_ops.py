"""The operator namespace, named once.

Nothing else spells it out: a build under another name changes this line and the FASTOPS_NAMESPACE macro in csrc.
"""

from __future__ import annotations

import torch

NAMESPACE = "fastops"

# Schemas are defined from Python (op pages), kernels are implemented in C++ (`_C`), Triton or PyTorch.
library = torch.library.Library(NAMESPACE, "DEF")


def qualified(name: str) -> str:
    """`nf4_dequant` -> `fastops::nf4_dequant`."""
    return f"{NAMESPACE}::{name}"


def overload(name: str) -> torch._ops.OpOverload:
    """The op's default overload, the fastest way to call it from Python."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default  # type: ignore[no-any-return]
