"""split_attn: attention of a few queries over two sets of keys, active and cached, as if they were one.

Source: MARché, arXiv:2506.12035, cache-aware attention. Scores and sums are fp32; out is rounded once to q's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio, unit_roundoff

BUDGET = 4.0  # a chain: scores, probabilities, sums


def split_attn(
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, A, D], lse [B, H, A]) of q [B, H, A, D]; out lies in memory as [B, A, H, D]."""
    compute = torch.promote_types(q.dtype, torch.float32)
    k = torch.cat([k_active, k_cached], dim=2).to(compute)
    v = torch.cat([v_active, v_cached], dim=2).to(compute)
    scores = q.to(compute) @ k.mT * softmax_scale(scale, q.shape[-1])
    if cached_mask is not None:
        seen = all_seen(cached_mask, k_active.shape[2], k)
        scores = scores.masked_fill(~seen[:, :, None, :], -math.inf)
        v = v.masked_fill(~seen[..., None], 0.0)  # a slot left out may hold anything
    lse = scores.logsumexp(dim=-1)
    p = scores.softmax(dim=-1).masked_fill((lse == -math.inf)[..., None], 0.0)
    out = (p @ v).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """1 / sqrt(head_dim) where none is given."""
    return head_dim**-0.5 if scale is None else scale


def all_seen(cached_mask: Tensor, active: int, k: Tensor) -> Tensor:
    """[B, H, A' + C]: whether a key of the union k [B, H, A' + C, D] takes part; active ones always do."""
    mask = cached_mask[:, None] if cached_mask.dim() == 2 else cached_mask
    mask = mask.expand(*k.shape[:2], mask.shape[-1])
    return torch.cat([mask.new_ones(*k.shape[:2], active), mask], dim=2)


def cost(
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
) -> Cost:
    """Read q, both sets of keys and values and the mask, write out as q and lse in fp32.

    A query and a key cost 4 D flops: a product and a sum an element for the score, and again for the value.
    """
    read = sum(t.numel() * t.element_size() for t in (q, k_active, v_active, k_cached, v_cached))
    mask = 0 if cached_mask is None else cached_mask.numel()
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    written = rows * (q.shape[3] * q.element_size() + 4)
    keys = k_active.shape[2] + k_cached.shape[2]
    return Cost(read + mask + written, 4 * rows * keys * q.shape[3])


class _Case(NamedTuple):
    """Sizes of a sample; `mask` is "", "bc", "bhc" or "none" (which lets nothing through)."""

    name: str
    b: int
    h: int
    a: int  # queries
    n: int  # active keys
    c: int  # cached keys
    d: int
    mask: str = ""
    scale: float | None = None
    spread: float = 1.0  # of the scores: larger ones make single keys win


_CASES = (
    _Case("mar", 2, 3, 64, 64, 256, 64, "bc"),
    _Case("mar_huge", 1, 2, 64, 64, 320, 80, "bc"),
    _Case("d128", 1, 2, 33, 40, 100, 128, "bhc"),
    _Case("no_mask", 2, 1, 17, 17, 65, 64),
    _Case("nothing_cached", 2, 2, 20, 20, 0, 64),
    _Case("nothing_cached_mask", 1, 2, 5, 6, 0, 32, "bc"),
    _Case("nothing_active", 1, 3, 7, 0, 70, 80, "bc"),
    _Case("no_key", 2, 2, 3, 0, 0, 64),
    _Case("none_seen", 2, 2, 19, 0, 33, 64, "none"),
    _Case("active_only_seen", 1, 2, 19, 5, 33, 64, "none"),
    _Case("no_query", 2, 2, 0, 4, 9, 64, "bc"),
    _Case("no_batch", 0, 2, 4, 4, 9, 64, "bc"),
    _Case("no_head", 2, 0, 4, 4, 9, 64),
    _Case("one", 1, 1, 1, 1, 1, 1),
    _Case("one_key", 1, 2, 65, 1, 0, 16, scale=2.0),
    _Case("odd", 1, 3, 13, 9, 77, 17, "bhc"),
    _Case("narrow", 2, 1, 5, 3, 31, 7, "bc"),
    _Case("wide", 1, 1, 18, 20, 50, 256, "bc"),
    _Case("wide_odd", 1, 1, 9, 20, 50, 200),
    _Case("d96", 1, 1, 66, 3, 130, 96, "bc"),
    _Case("many_keys", 1, 1, 6, 5, 1100, 64, "bc", spread=4.0),
    _Case("sharp", 1, 2, 40, 33, 95, 64, "bc", spread=30.0),
    _Case("negative_scale", 1, 2, 12, 8, 40, 64, "bc", scale=-0.2),
    _Case("zero_scale", 1, 1, 4, 8, 40, 64, scale=0.0),
)


def make_inputs(
    b: int, h: int, a: int, n: int, c: int, d: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Normal (q, k_active, v_active, k_cached, v_cached), made on the CPU so that a seed means one thing."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, h, rows, d, generator=generator).to(device, dtype) for rows in (a, n, n, c, c))


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Every awkward size; slots that the mask leaves out hold NaN."""
    for case in _CASES:
        q, k, v, k_cached, v_cached = make_inputs(*case[1:7], device, dtype, seed)
        kwargs: dict[str, Any] = {} if case.scale is None else {"scale": case.scale}
        if case.mask:
            generator = torch.Generator().manual_seed(seed + 1)
            shape = (case.b, case.h, case.c) if case.mask == "bhc" else (case.b, case.c)
            mask = (torch.rand(shape, generator=generator) < (0.0 if case.mask == "none" else 0.8)).to(device)
            left_out = ~(mask if mask.dim() == 3 else mask[:, None].expand(case.b, case.h, case.c))
            k_cached[left_out] = v_cached[left_out] = math.nan
            kwargs["cached_mask"] = mask
        yield Sample(case.name, (q * case.spread, k, v, k_cached, v_cached), kwargs)


def error(
    got: tuple[Tensor, Tensor],
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
) -> float:
    """Error ratio of out and of lse against float64, the larger one.

    With p the probabilities and A = |scale| sum_d |q k|, an error of u A in a score moves out by p (v - out) u A: the
    magnitude is sum_j p_j (|v_j| + |out|) (1 + A_j) for out and sum_j p_j (1 + A_j) for lse. Probabilities may be
    rounded once to a 16-bit q's dtype T: u_T sqrt(sum_j (p_j v_j)^2) more.
    """
    out, lse = got
    x = q.double()
    k, v = torch.cat([k_active, k_cached], 2).double(), torch.cat([v_active, v_cached], 2).double()
    factor = softmax_scale(scale, q.shape[-1])
    unseen = None if cached_mask is None else ~all_seen(cached_mask, k_active.shape[2], k)
    if unseen is not None:
        k, v = (t.masked_fill(unseen[..., None], 0.0) for t in (k, v))
    scores = x @ k.mT * factor
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, :, None], -math.inf)
    true_lse = scores.logsumexp(dim=-1)
    p = (scores - true_lse.masked_fill(true_lse == -math.inf, 0.0)[..., None]).exp()
    weight = p * (1 + x.abs() @ k.abs().mT * abs(factor))
    truth = p @ v
    magnitude = weight @ v.abs() + truth.abs() * weight.sum(-1, keepdim=True)
    allowance = (p.square() @ v.square()).sqrt() * unit_roundoff(q.dtype)
    return max(
        error_ratio(out, truth, magnitude, allowance=allowance),
        error_ratio(lse, true_lse, weight.sum(-1)),
    )
