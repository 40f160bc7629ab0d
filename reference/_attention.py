"""What the references of attention over a KV cache share: reading caches, who sees whom, and the truth in float64.

Scores z = scale q.k (softcap tanh(z / softcap) where one is given), out = sum_j softmax(z)_j v_j,
lse = log sum_j e^z_j, over the keys that a row sees; out = 0 and lse = -inf where it sees none. Source:
arXiv:1706.03762, section 3.2.1; grouped query heads: arXiv:2305.13245.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._truth import error_ratio, unit_roundoff

BUDGET = 4.0  # a chain of sums


def valid_lengths(lengths: Tensor, capacity: int) -> Tensor:
    """Lengths that no cache can have count as 0."""
    return torch.where((lengths >= 0) & (lengths <= capacity), lengths, 0)


def gather(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """([B, Hkv, S, D] rows in order of position, [B, S] which of them lie in a page that exists; None: all)."""
    if block_table is None:
        return cache, None
    pages, block = cache.shape[:2]
    exists = (block_table >= 0) & (block_table < pages)
    if pages == 0:
        rows = cache.new_zeros(*block_table.shape, block, *cache.shape[2:])
    else:
        rows = cache[block_table.clamp(0, pages - 1).long()]  # [B, max_blocks, block, Hkv, D]
    return rows.flatten(1, 2).transpose(1, 2), exists.repeat_interleave(block, dim=1)


def popcount(bits: Tensor) -> Tensor:
    """How many bits of each int64 are set."""
    return ((bits[..., None] >> torch.arange(64, device=bits.device)) & 1).sum(-1)


def visible(
    lengths: Tensor,
    q_lens: Tensor | None,
    rows: int,
    capacity: int,
    tree_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """[B, T, S] bool: which keys each new row sees.

    The new rows of a sequence are its last ones, so row t of n stands at length - n + t. Causal: it sees itself and all
    before it. In a tree it sees all before the new rows, itself, and the nodes its mask names; its place is then after
    as many of the new rows as it sees others. A window keeps the keys that are fewer than `window` places before it.
    """
    lengths = valid_lengths(lengths, capacity).long()[:, None, None]
    new = torch.full_like(lengths, rows) if q_lens is None else q_lens.long()[:, None, None]
    prefix = lengths - new
    row = torch.arange(rows, device=lengths.device)[:, None]
    key = torch.arange(capacity, device=lengths.device)
    if tree_mask is None:
        place, key_place = prefix + row, key
        seen = key <= place
    else:
        own = torch.ones((), dtype=torch.int64, device=lengths.device) << row[:, 0]  # bit 63 is the sign
        bits = tree_mask | own
        node = (key - prefix).clamp(0, 63)  # [B, 1, S]
        seen = (key < prefix) | ((bits[:, :, None] >> node) & 1).bool()
        others = popcount(bits) - 1  # [B, T]
        place = prefix + others[:, :, None]
        there = others.gather(1, node[:, 0].clamp(max=max(rows - 1, 0))) if rows else node[:, 0]
        key_place = torch.where(key < prefix, key, prefix + there[:, None])
    if window is not None:
        seen = seen & (key_place > place - window)
    return seen & (key < lengths) & (row < new)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, Hq, T, D], lse [B, Hq, T], probabilities [B, Hq, T, S]), everything computed in `dtype`.

    q [B, Hq, T, D]; k, v [B, Hkv, S, D], of which rows that nobody sees may hold anything; seen [B, T, S].
    """
    q, k, v = _unpoisoned(q, k, v, seen, dtype)
    z = scores(q, k, scale, softcap).masked_fill(~seen[:, None], -math.inf)
    lse = z.logsumexp(-1)
    p = (z - lse.clamp(min=torch.finfo(dtype).min)[..., None]).exp()
    return _weighted(p, v), lse, p


def scores(q: Tensor, k: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """[B, Hq, T, S]."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    z = q.unflatten(1, (k.shape[1], group)).flatten(2, 3) @ k.mT
    z = z.unflatten(2, (group, q.shape[2])).flatten(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    capped: Tensor = z if softcap is None else softcap * (z / softcap).tanh()
    return capped


def _weighted(p: Tensor, v: Tensor) -> Tensor:
    """Sums of rows of v [B, Hkv, S, D] with the weights p [B, Hq, T, S]."""
    group = p.shape[1] // v.shape[1] if v.shape[1] else 1
    out = p.unflatten(1, (v.shape[1], group)).flatten(2, 3) @ v
    heads: Tensor = out.unflatten(2, (group, p.shape[2])).flatten(1, 2)
    return heads


def _unpoisoned(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """In `dtype`, zero where nobody looks: rows of k and v without a reader (0 * NaN is NaN), of q without keys."""
    keys, rows = seen.any(1)[:, None, :, None], seen.any(2)[:, None, :, None]
    return torch.where(rows, q, 0).to(dtype), torch.where(keys, k, 0).to(dtype), torch.where(keys, v, 0).to(dtype)


def attention_error(
    got: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> float:
    """Error ratio of (out, lse) against float64; arguments as attend().

    An fp32 score is off by u A_j, A_j = scale sum_d |q_d k_jd|, which changes out by p_j (v_j - out) times that: the
    terms of out are p_j (|v_j| + |out|) (1 + A_j), those of lse 1 + sum_j p_j A_j. Tensor cores want p in 16 bits:
    where q is, each p_j v_j may be rounded once, which adds u_q sqrt(sum (p_j v_j)^2).
    """
    out, lse, p = attend(q, k, v, seen, scale, softcap, torch.float64)
    q64, k64, v64 = _unpoisoned(q, k, v, seen, torch.float64)
    sizes = 1 + scores(q64.abs(), k64.abs(), None if scale is None else abs(scale), None)
    weight = p * sizes
    magnitude = _weighted(weight, v64.abs()) + weight.sum(-1)[..., None] * out.abs()
    allowance = None
    if q.dtype != torch.float32:
        allowance = unit_roundoff(q.dtype) * _weighted(p.square(), v64.square()).sqrt()
    return max(
        error_ratio(got[0], out, magnitude, allowance=allowance),
        error_ratio(got[1], lse, weight.sum(-1)),
    )
