"""attn_received: how much softmax attention each key receives, summed over heads and queries.

Source: MARché, arXiv:2506.12035: tokens to refresh are those that the generated ones attend to. Everything is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio
from .split_attn import softmax_scale

BUDGET = 4.0  # a chain: scores, probabilities, sums


def attn_received(q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """[B, S] of q [B, H, G, D] and k [B, H, S, D]; a key that the mask leaves out receives 0."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(compute) @ k.to(compute).mT * softmax_scale(scale, q.shape[-1])
    if mask is None:
        return scores.softmax(dim=-1).sum(dim=(1, 2))
    seen = full_mask(mask, k)
    p = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(dim=-1)
    return p.sum(dim=(1, 2)).masked_fill(~seen.any(dim=1, keepdim=True), 0.0)  # nothing to attend to


def full_mask(mask: Tensor, k: Tensor) -> Tensor:
    """The mask as [B, S] for k [B, H, S, D]."""
    return mask.expand(k.shape[0], k.shape[2])


def cost(q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Cost:
    """Read q, k and the mask, write [B, S] fp32; 2 D flops a query and key for the score."""
    b, _, s, d = k.shape
    read = (q.numel() + k.numel()) * q.element_size() + (0 if mask is None else mask.numel())
    return Cost(read + 4 * b * s, 2 * math.prod(q.shape[:3]) * s * d)


class _Case(NamedTuple):
    """Sizes of a sample; `mask` is "", or the shape of one: "bs", "s", "b1", "1s", or "none" (nothing is seen)."""

    name: str
    b: int
    h: int
    g: int
    s: int
    d: int
    mask: str = ""
    scale: float | None = None
    spread: float = 1.0


_CASES = (
    _Case("mar", 2, 3, 7, 320, 64),
    _Case("mar_huge", 1, 4, 6, 320, 80, "bs"),
    _Case("d128", 1, 2, 3, 70, 128, "s"),
    _Case("one_query", 2, 3, 1, 33, 64, "1s"),
    _Case("many_queries", 1, 2, 90, 130, 64, "bs"),
    _Case("many_keys", 1, 2, 5, 2100, 64, "bs"),
    _Case("whole_batch", 3, 2, 5, 20, 32, "b1"),
    _Case("none_seen", 2, 2, 5, 33, 64, "none"),
    _Case("no_query", 2, 2, 0, 9, 64),
    _Case("no_key", 2, 2, 4, 0, 64),
    _Case("no_head", 2, 0, 4, 9, 64),
    _Case("no_batch", 0, 2, 4, 9, 64, "s"),
    _Case("one", 1, 1, 1, 1, 1),
    _Case("odd", 1, 3, 13, 77, 17, "bs"),
    _Case("wide", 1, 1, 18, 50, 256),
    _Case("wide_odd", 1, 2, 2, 50, 200, "bs"),
    _Case("sharp", 1, 2, 16, 95, 64, spread=30.0),
    _Case("negative_scale", 1, 2, 6, 40, 64, scale=-0.2),
    _Case("zero_scale", 1, 2, 6, 40, 64, "bs", scale=0.0),
)


def make_inputs(
    b: int, h: int, g: int, s: int, d: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Normal (q, k), made on the CPU so that a seed means one thing."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(b, h, rows, d, generator=generator).to(device, dtype) for rows in (g, s))
    return q, k


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Every awkward size; keys that the mask leaves out are NaN."""
    for case in _CASES:
        q, k = make_inputs(*case[1:6], device, dtype, seed)
        kwargs: dict[str, Any] = {} if case.scale is None else {"scale": case.scale}
        if case.mask:
            shapes = {"s": (case.s,), "b1": (case.b, 1), "1s": (1, case.s)}
            draw = torch.rand(
                shapes.get(case.mask, (case.b, case.s)), generator=torch.Generator().manual_seed(seed + 1)
            )
            mask = (draw < (0.0 if case.mask == "none" else 0.8)).to(device)
            k[~full_mask(mask, k)[:, None].expand(k.shape[:3])] = math.nan
            kwargs["mask"] = mask
        yield Sample(case.name, (q * case.spread, k), kwargs)


def error(got: Tensor, q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> float:
    """Error ratio against float64.

    With p the probabilities and A = |scale| sum_d |q k|, an error of u A in the scores moves p_j by at most
    p_j u (A_j + sum_i p_i A_i): the magnitude is the sum over heads and queries of p_j (1 + A_j + sum_i p_i A_i).
    """
    x, keys, factor = q.double(), k.double(), softmax_scale(scale, q.shape[-1])
    unseen = None if mask is None else ~full_mask(mask, k)
    if unseen is not None:
        keys = keys.masked_fill(unseen[:, None, :, None], 0.0)
    scores = x @ keys.mT * factor
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None, None], -math.inf)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    p = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    size = x.abs() @ keys.abs().mT * abs(factor)
    magnitude = p * (1 + size + (p * size).sum(-1, keepdim=True))
    return error_ratio(got, p.sum(dim=(1, 2)), magnitude.sum(dim=(1, 2)))
