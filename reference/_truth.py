"""What the references share: costs, samples and the measure of error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cost(NamedTuple):
    """The least an op must do: bytes through memory (inputs read once, outputs written once) and flops."""

    bytes: int
    flops: int


class Sample(NamedTuple):
    """Arguments that a backend must get right."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Truth(NamedTuple):
    """What an op's reference page knows beside the function itself."""

    cost: Callable[..., Cost]
    samples: Callable[..., Iterator[Sample]]
    error: Callable[..., float]
    budget: float


def member(page: Any, op: str, name: str) -> Any:
    """`<op>_<name>` of a page that several ops share, where there is one; else its `<name>`."""
    own = f"{op}_{name}"
    return getattr(page, own if hasattr(page, own) else name)


def truth(op: str, family: str = "") -> Truth:
    """The truth about `op`, from the reference page of its family (its own page when "")."""
    page = importlib.import_module(f".{family or op}", __package__)
    return Truth(*(member(page, op, name) for name in ("cost", "samples", "error", "BUDGET")))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def error_ratio(
    got: Tensor,
    truth: Tensor,
    magnitude: Tensor | None = None,
    accumulate: torch.dtype | None = None,
    allowance: Tensor | None = None,
) -> float:
    """Largest error of an element, as a multiple of the best possible rounding error.

    Per element |got - truth| / (u_out |truth| + u_acc magnitude + allowance), the maximum taken over all elements. An
    element that equals the correctly rounded truth (infinities and NaNs included) has error 0.

    Args:
        got: the output under test, any float dtype.
        truth: float64, same shape.
        magnitude: float64, the sum of the absolute values of the terms added up to make each element.
        accumulate: dtype of that sum in the kernel (float32 when None).
        allowance: float64, what else each element may be off by, as an absolute error.
    """
    if got.shape != truth.shape:
        raise ValueError(f"error_ratio: got must have the shape of truth, {list(truth.shape)}, got {list(got.shape)}")
    if got.numel() == 0:
        return 0.0
    rounded = truth.to(got.dtype)
    exact = (got == rounded) | (got.isnan() & rounded.isnan())
    allowed = unit_roundoff(got.dtype) * truth.abs()
    if magnitude is not None:
        allowed = allowed + unit_roundoff(accumulate or torch.float32) * magnitude
    if allowance is not None:
        allowed = allowed + allowance
    info = torch.finfo(got.dtype)
    allowed = allowed.clamp(min=info.tiny * info.eps / 2)  # half the smallest subnormal
    ratio = torch.where(exact, 0.0, (got.double() - truth).abs() / allowed)
    return float(ratio.nan_to_num(nan=float("inf")).max())
