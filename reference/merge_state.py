"""merge_state: two attentions of the same queries over disjoint keys become the attention over all of them.

Source: FlashInfer, arXiv:2501.01005, section 2.2 (attention states); MARché, arXiv:2506.12035. Weights are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio

BUDGET = 4.0  # a chain: weights, their sum, a quotient


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(o [..., D], lse [...]); a state whose lse is -inf saw no key, and its o counts for nothing, even if NaN."""
    top = torch.maximum(lse_a, lse_b)
    base = top.masked_fill(top == -math.inf, 0.0)
    w_a, w_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = w_a + w_b
    share = 1 / total.masked_fill(total == 0, 1.0)
    compute = torch.promote_types(o_a.dtype, lse_a.dtype)
    parts = [
        (o.to(compute) * (w * share)[..., None]).masked_fill((w == 0)[..., None], 0.0)
        for o, w in ((o_a, w_a), (o_b, w_b))
    ]
    return (parts[0] + parts[1]).to(o_a.dtype).contiguous(), (base + total.log()).contiguous()


def cost(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Cost:
    """Read two states and write one: 3 D elements and 3 fp32 a row; 3 flops an element."""
    return Cost(3 * o_a.numel() * o_a.element_size() + 12 * lse_a.numel(), 3 * o_a.numel())


class _Case(NamedTuple):
    """Leading sizes, D, and which state is empty: "a", "b", "both", "some" (each in a third of the rows) or ""."""

    name: str
    leading: tuple[int, ...]
    d: int
    empty: str = ""
    spread: float = 1.0


_CASES = (
    _Case("mar", (2, 3, 64), 64),
    _Case("mar_huge", (1, 4, 33), 80, "some"),
    _Case("d128", (37, 3), 128, "some"),
    _Case("d256", (5, 3), 256),
    _Case("row", (), 64),
    _Case("vector", (300,), 17, "some"),
    _Case("five", (2, 1, 3, 2, 5), 40, "some"),
    _Case("a_empty", (4, 5), 64, "a"),
    _Case("b_empty", (4, 5), 64, "b"),
    _Case("both_empty", (4, 5), 64, "both"),
    _Case("one", (1, 1), 1),
    _Case("odd", (13, 7), 33, "some"),
    _Case("apart", (50, 4), 64, spread=60.0),
    _Case("far_apart", (50, 4), 64, spread=3000.0),
    _Case("no_rows", (0, 4), 64),
    _Case("no_width", (3, 4), 0),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """States of every awkward size; the o of an empty state is NaN."""
    for case in _CASES:
        generator = torch.Generator().manual_seed(seed)
        o_a, o_b = (torch.randn(*case.leading, case.d, generator=generator).to(dtype) for _ in range(2))
        lse_a, lse_b = (torch.randn(case.leading, generator=generator) * case.spread for _ in range(2))
        third = torch.arange(math.prod(case.leading)).reshape(case.leading) % 4
        for name, o, lse, own in (("a", o_a, lse_a, 1), ("b", o_b, lse_b, 2)):
            gone = (third == own) | (third == 3) if case.empty == "some" else third >= 0
            if case.empty in (name, "both", "some"):
                lse[gone], o[gone] = -math.inf, math.nan
        yield Sample(case.name, tuple(t.to(device) for t in (o_a, lse_a, o_b, lse_b)), {})


def error(got: tuple[Tensor, Tensor], o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> float:
    """Error ratio of o and of lse against float64, the larger one.

    With w the weights and t how far their exponents lie below the larger lse: an error of u (1 + t) in a weight moves o
    by w (o_i - o) u (1 + t), so the magnitudes are sum_i w_i (|o_i| + |o|) (1 + t_i) and sum_i w_i (1 + t_i).
    """
    o, lse = got
    left, right = lse_a.double(), lse_b.double()
    true_lse = torch.logaddexp(left, right)
    top = torch.maximum(left, right)
    weights, values, depth = [], [], []
    for each, of in ((left, o_a), (right, o_b)):
        weight = (each - true_lse.masked_fill(true_lse == -math.inf, 0.0)).exp()
        weights.append(weight)
        values.append(of.double().masked_fill((weight == 0)[..., None], 0.0))
        depth.append((top - each).nan_to_num(0.0, 0.0, 0.0))
    truth = weights[0][..., None] * values[0] + weights[1][..., None] * values[1]
    scaled = [w * (1 + t) for w, t in zip(weights, depth, strict=True)]
    sizes = [s[..., None] * (v.abs() + truth.abs()) for s, v in zip(scaled, values, strict=True)]
    magnitude = sizes[0] + sizes[1]
    return max(error_ratio(o, truth, magnitude), error_ratio(lse, true_lse, scaled[0] + scaled[1]))
