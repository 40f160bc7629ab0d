"""The product that every 4-bit layer computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.nf4_gemv import LINEAR, nf4_linear

NO_SCALES: Mapping[str, Any] = {}


def product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int,
    bias: Tensor | None,
    scales: Mapping[str, Any] = NO_SCALES,
) -> Tensor:
    """fastops.nf4_linear; `scales` is what its arguments code and absmax_* are, where they are not their defaults.

    A layer's call is made of microseconds: without a gradient to record, only the arguments that count are passed on,
    straight to the op (each None among them costs a sixth of a microsecond).
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return nf4_linear(x, packed, absmax, out_features, blocksize, bias=bias, **scales)
    if bias is None:
        return LINEAR(None, x, packed, absmax, out_features, blocksize, **scales)  # type: ignore[no-any-return]
    return LINEAR(None, x, packed, absmax, out_features, blocksize, bias=bias, **scales)  # type: ignore[no-any-return]
