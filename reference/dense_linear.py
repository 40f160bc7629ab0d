"""dense_linear: y = x @ W.T + bias, W [N, K] in panels [ceil(N / 32), K, 32]: output 32 p + i is panels[p, :, i]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._truth import Cost, Sample, error_ratio

BUDGET = 4.0  # a chain of sums
PANEL = 32


def plain(panels: Tensor, out_features: int) -> Tensor:
    """W [N, K]."""
    return panels.transpose(1, 2).flatten(0, 1)[:out_features]


def dense_linear(x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None) -> Tensor:
    """[..., N] of x [..., K]."""
    return F.linear(x, plain(panels, out_features), bias)


def cost(x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None) -> Cost:
    """Read x, the weights and the bias, write [..., N]; a product and a sum for each weight and row."""
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    elements = out_features * k + rows * (k + out_features) + (0 if bias is None else out_features)
    return Cost(elements * x.element_size(), 2 * rows * out_features * k)


class _Case(NamedTuple):
    """Leading sizes of x, weight [n, k]."""

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    bias: bool = False


_CASES = (
    _Case("vector", (), 64, 64),
    *(_Case(f"rows_{m}", (m,), 37, 100, bias=m % 2 == 1) for m in (*range(16), 28, 29, 64)),
    _Case("tensor", (2, 3, 2), 65, 130, bias=True),
    _Case("empty_tensor", (3, 0), 8, 64, bias=True),
    _Case("one", (1,), 1, 1),
    _Case("one_input", (5,), 33, 1, bias=True),
    _Case("one_output", (7,), 1, 1025),
    _Case("no_inputs", (2,), 5, 0, bias=True),
    _Case("no_outputs", (2,), 0, 64),
    _Case("long", (1,), 5, 9001, bias=True),
    _Case("long_rows", (6,), 3, 4111),
    _Case("two_threads", (8,), 700, 256, bias=True),
    _Case("blocks_of_rows", (300,), 90, 150, bias=True),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Every number of rows that a kernel tells apart, widths around its vectors, panels and chains of sums."""
    for case in _CASES:
        generator = torch.Generator().manual_seed(seed)
        count = -(-case.n // PANEL)
        x = torch.randn(*case.leading, case.k, generator=generator).to(device, dtype)
        panels = torch.randn(count, case.k, PANEL, generator=generator)
        if case.n % PANEL:
            panels[-1, :, case.n % PANEL :] = float("nan")  # belongs to no output
        kwargs = {"bias": torch.randn(case.n, generator=generator).to(device, dtype)} if case.bias else {}
        yield Sample(case.name, (x, panels.to(device, dtype), case.n), kwargs)


def error(got: Tensor, x: Tensor, panels: Tensor, out_features: int, *, bias: Tensor | None = None) -> float:
    """Error ratio against float64."""
    left, right = x.double(), plain(panels, out_features).double()
    truth, magnitude = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        truth, magnitude = truth + bias.double(), magnitude + bias.double().abs()
    return error_ratio(got, truth, magnitude)
