"""decode_attn: attention of a few new rows a sequence over its KV cache, causal or along a tree.

Source: arXiv:1706.03762; grouped query heads: arXiv:2305.13245; trees: arXiv:2305.09781, section 4. What a row sees,
and the error budget, are in _attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _attention, tree_build
from ._truth import Cost, Sample

BUDGET = _attention.BUDGET


def decode_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computed in fp32."""
    k, v, seen = _inputs(q, k_cache, v_cache, lengths, tree_mask, block_table, q_lens, window)
    out, lse, _ = _attention.attend(q, k, v, seen, scale, softcap, torch.float32)
    return out.to(q.dtype), lse


def _inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    tree_mask: Tensor | None,
    block_table: Tensor | None,
    q_lens: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys [B, Hkv, S, D], values, who sees them [B, T, S])."""
    (k, exists), (v, _) = _attention.gather(k_cache, block_table), _attention.gather(v_cache, block_table)
    seen = _attention.visible(lengths, q_lens, q.shape[2], k.shape[2], tree_mask, window)
    return k, v, seen if exists is None else seen & exists[:, None]


def cost(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Cost:
    """Read q, and K and V of every row within the lengths; write out and lse; 4 D flops a row, key and query head.

    Of a window only its rows (and those of the rows before it, T - 1 more). Meta tensors hold no lengths: full caches.
    """
    batch, heads, rows, d = q.shape
    per_page = k_cache.shape[1] if block_table is not None else 1
    capacity = block_table.shape[1] * per_page if block_table is not None else k_cache.shape[2]
    kv_heads = k_cache.shape[2] if block_table is not None else k_cache.shape[1]
    widest = capacity if window is None else min(capacity, window + rows - 1)
    keys = batch * widest if lengths.is_meta else int(lengths.clamp(0, widest).sum())
    small = sum(t.numel() * t.element_size() for t in (lengths, tree_mask, q_lens) if t is not None)
    pages = 0 if block_table is None else 4 * -(-keys // max(per_page, 1))
    moved = (
        2 * keys * kv_heads * d * k_cache.element_size() + 2 * q.numel() * q.element_size() + 4 * batch * heads * rows
    )
    return Cost(moved + small + pages, 4 * keys * heads * rows * d)


class _Case(NamedTuple):
    """Sizes, lengths after the new rows, and options; pages of `block` rows where it is not 0."""

    name: str
    lengths: tuple[int, ...]
    hq: int
    hkv: int
    d: int
    rows: int = 1
    q_lens: tuple[int, ...] | None = None
    tree: bool = False
    block: int = 0
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    slack: int = 3  # rows that the caches have beyond the longest length


# Around tiles of 16, 32, 64 and 128 keys, every head size and ratio, lengths 0 and 1, the widest trees.
_CASES = (
    _Case("one", (1,), 1, 1, 64),
    _Case("short", (0, 1, 2, 15, 16, 17), 4, 2, 64),
    _Case("gqa", (129, 64, 100), 8, 2, 128),
    _Case("mha", (65, 33), 3, 3, 64),
    _Case("wide_group", (70,), 12, 1, 128),
    _Case("odd_group", (140, 3), 7, 1, 80),
    _Case("d96", (77, 200), 6, 2, 96),
    _Case("d256", (50, 130), 4, 2, 256),
    _Case("odd_d", (37, 5), 2, 1, 33),
    _Case("tiny_d", (9,), 2, 2, 1),
    _Case("long", (1500, 1, 700), 4, 2, 64),
    _Case("paged", (1, 17, 130), 8, 2, 128, block=16),
    _Case("paged_odd_block", (40, 7), 4, 4, 64, block=5),
    _Case("paged_one", (33, 20), 4, 1, 64, block=1),
    _Case("rows", (64, 9, 5), 4, 2, 64, rows=5),
    _Case("rows_of_all", (8, 3), 2, 1, 64, rows=8),
    _Case("more_rows_than_keys", (2, 0, 9), 2, 1, 64, rows=4),
    _Case("many_rows", (300, 64), 4, 1, 128, rows=64),
    _Case("ragged_rows", (50, 60, 70, 8), 4, 2, 64, rows=6, q_lens=(0, 1, 6, 4)),
    _Case("tree", (130, 64, 20), 8, 2, 128, rows=16, tree=True),
    _Case("widest_tree", (200, 64), 4, 4, 64, rows=64, tree=True),
    _Case("ragged_tree", (90, 64, 33), 4, 2, 80, rows=64, q_lens=(64, 63, 1), tree=True),
    _Case("paged_tree", (140, 40), 4, 2, 128, rows=33, tree=True, block=16),
    _Case("window", (200, 31, 32), 4, 2, 64, window=32),
    _Case("window_of_one", (40,), 2, 1, 64, window=1),
    _Case("window_rows", (150, 20), 4, 2, 64, rows=7, window=64),
    _Case("window_tree", (150, 70), 4, 2, 64, rows=20, tree=True, window=5),
    _Case("softcap", (90, 12), 4, 2, 64, softcap=5.0),
    _Case("scale", (90, 12), 4, 2, 64, rows=3, scale=0.7),
    _Case("everything", (77, 130, 21), 6, 2, 96, rows=9, q_lens=(9, 4, 7), tree=True, block=16, window=40, softcap=8.0),
    _Case("full", (64, 64), 4, 2, 64, slack=0),
    _Case("no_rows", (5, 6), 2, 1, 64, rows=0),
    _Case("no_sequences", (), 2, 1, 64),
    _Case("no_capacity", (0,), 2, 1, 64, slack=0),
)


def random_inputs(
    lengths: tuple[int, ...],
    hq: int,
    hkv: int,
    d: int,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    block: int = 0,
    slack: int = 3,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """((q, k_cache, v_cache, lengths), block_table); NaN in every row beyond a length and every unused page."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, capacity = len(lengths), max(lengths, default=0) + slack
    q = normal(batch, hq, rows, d)
    k, v = normal(batch, hkv, capacity, d), normal(batch, hkv, capacity, d)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = float("nan"), float("nan")
    table = None
    if block:
        k, v, table = to_pages(k, v, lengths, block, generator)
    return (q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)), table


def to_pages(
    k: Tensor, v: Tensor, lengths: tuple[int, ...], block: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows in pages [n_blocks, block, Hkv, D] in random order, two of them unused; dead entries are absurd."""
    used = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator).tolist()
    table = torch.full((len(lengths), max(used, default=0) + 1), 2147480000, dtype=torch.int32)
    pages = [c.new_full((sum(used) + 2, block, *c.shape[1::2]), float("nan")) for c in (k, v)]
    for b, length in enumerate(lengths):
        for i in range(used[b]):
            page = table[b, i] = order.pop()
            there = slice(i * block, min(length, (i + 1) * block))
            for paged, cache in zip(pages, (k, v), strict=True):
                paged[page, : there.stop - there.start] = cache[b, :, there].transpose(0, 1)
    return pages[0], pages[1], table.to(k.device)


def _sample(case: _Case, device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    args, table = random_inputs(
        case.lengths, case.hq, case.hkv, case.d, case.rows, device, dtype, block=case.block, slack=case.slack, seed=seed
    )
    kwargs: dict[str, Any] = {
        name: value for name in ("window", "softcap", "scale") if (value := getattr(case, name)) is not None
    }
    if table is not None:
        kwargs["block_table"] = table
    if case.q_lens is not None:
        kwargs["q_lens"] = torch.tensor(case.q_lens, dtype=torch.int32, device=device)
    if case.tree:
        parents = tree_build.random_parents(len(case.lengths), case.rows, seed)
        kwargs["tree_mask"] = tree_build.tree_build(parents)[0].to(device)
    return Sample(case.name, args, kwargs)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Every shape and option; rows beyond a length, pages of nobody and entries of no page are poisoned."""
    for case in _CASES:
        yield _sample(case, device, dtype, seed)


def error(
    got: tuple[Tensor, Tensor],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> float:
    """Error ratio of out and lse against float64."""
    k, v, seen = _inputs(q, k_cache, v_cache, lengths, tree_mask, block_table, q_lens, window)
    return _attention.attention_error(got, q, k, v, seen, scale, softcap)
