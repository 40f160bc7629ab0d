"""prefill_attn: causal attention of the new rows of many sequences, packed one after the other, over their KV caches.

Source: arXiv:1706.03762; packed sequences and bottom-right causal masks: arXiv:2307.08691. What a row sees, and the
error budget, are in _attention.py: a sequence's rows are those of decode_attn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _attention, decode_attn
from ._truth import Cost, Sample

BUDGET = _attention.BUDGET


class _Sequence(NamedTuple):
    """Its rows of q, and decode_attn's arguments."""

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor


def prefill_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A sequence at a time, in fp32."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for s in _sequences(q, k_cache, v_cache, cu_q_lens, lengths, max_q_len, block_table, window):
        o, natural, _ = _attention.attend(s.q, s.k, s.v, s.seen, scale, softcap, torch.float32)
        out[s.rows], lse[s.rows] = o[0].transpose(0, 1).to(q.dtype), natural[0].T
    return out, lse


def _sequences(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    block_table: Tensor | None,
    window: int | None,
) -> Iterator[_Sequence]:
    """Each sequence with rows; one whose rows are not where they can be (or are more than max_q_len) has none."""
    starts = cu_q_lens.tolist()
    for b in range(lengths.shape[0]):
        first, last = starts[b], starts[b + 1]
        if not 0 <= first < last <= q.shape[0] or last - first > max_q_len:
            continue
        cache = slice(None) if block_table is not None else slice(b, b + 1)
        table = None if block_table is None else block_table[b : b + 1]
        (k, exists), (v, _) = _attention.gather(k_cache[cache], table), _attention.gather(v_cache[cache], table)
        seen = _attention.visible(lengths[b : b + 1], None, last - first, k.shape[2], None, window)
        if exists is not None:
            seen = seen & exists[:, None]
        yield _Sequence(slice(first, last), q[first:last].transpose(0, 1)[None], k, v, seen)


def cost(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Cost:
    """Read q, K and V once; write out and lse; 4 D flops a query head for each row and key that it sees.

    Meta tensors hold no lengths: full caches and max_q_len rows a sequence.
    """
    n, heads, d = q.shape
    batch = lengths.shape[0]
    per_page = k_cache.shape[1] if block_table is not None else 1
    capacity = block_table.shape[1] * per_page if block_table is not None else k_cache.shape[2]
    kv_heads = k_cache.shape[2] if block_table is not None else k_cache.shape[1]
    if lengths.is_meta:
        shapes = [(max_q_len, capacity)] * batch
    else:
        shapes = list(zip(cu_q_lens.diff().tolist(), lengths.clamp(0, capacity).tolist(), strict=True))
    keys = pairs = 0
    for rows, length in shapes:
        places = torch.arange(length - rows, length).clamp(min=-1) + 1  # the keys of each row without a window
        pairs += int((places if window is None else places.clamp(max=window)).sum())
        keys += length if window is None else min(length, rows + window - 1)
    small = 4 * (2 * batch + 1) + (0 if block_table is None else 4 * -(-keys // max(per_page, 1)))
    moved = 2 * keys * kv_heads * d * k_cache.element_size() + 2 * q.numel() * q.element_size() + 4 * n * heads
    return Cost(moved + small, 4 * pairs * heads * d)


class _Case(NamedTuple):
    """New rows and lengths of each sequence, and options as in decode_attn's."""

    name: str
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    hq: int
    hkv: int
    d: int
    block: int = 0
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    more: int = 0  # by how much max_q_len is larger than it need be


_CASES = (
    _Case("one", (1,), (1,), 1, 1, 64),
    _Case("prompt", (130,), (130,), 4, 2, 64),
    _Case("ragged", (64, 1, 0, 129, 65), (64, 1, 7, 129, 65), 4, 2, 64),
    _Case("chunk", (100, 70), (300, 71), 4, 1, 128),
    _Case("gqa", (70, 33), (150, 40), 8, 2, 128),
    _Case("d80", (66,), (90,), 3, 3, 80),
    _Case("d96", (40, 20), (40, 64), 6, 2, 96),
    _Case("d256", (50,), (80,), 2, 1, 256),
    _Case("odd_d", (20, 5), (37, 5), 2, 1, 33),
    _Case("paged", (100, 17), (200, 17), 4, 2, 64, block=16),
    _Case("paged_odd_block", (40, 7), (40, 30), 4, 4, 64, block=5),
    _Case("window", (200, 31), (300, 31), 4, 2, 64, window=50),
    _Case("softcap", (90,), (120,), 4, 2, 64, softcap=5.0),
    _Case("everything", (77, 30, 21), (77, 130, 40), 6, 2, 96, block=16, window=40, softcap=8.0, scale=0.3, more=50),
    _Case("more_rows_than_keys", (9, 3), (4, 0), 2, 1, 64),
    _Case("many_tiles", (400, 300), (900, 300), 2, 1, 64),
    _Case("no_rows", (0, 0), (5, 0), 2, 1, 64),
    _Case("no_sequences", (), (), 2, 1, 64),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Ragged prompts and chunks against caches, every option; unused rows, pages and entries are poisoned."""
    for case in _CASES:
        n = sum(case.rows)
        (_, k, v, lengths), table = decode_attn.random_inputs(
            case.lengths, case.hq, case.hkv, case.d, 0, device, dtype, block=case.block, seed=seed
        )
        q = torch.randn(n, case.hq, case.d, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)
        starts = torch.tensor([0, *case.rows], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        kwargs: dict[str, Any] = {
            name: value for name in ("window", "softcap", "scale") if (value := getattr(case, name)) is not None
        }
        if table is not None:
            kwargs["block_table"] = table
        yield Sample(case.name, (q, k, v, starts, lengths, max(case.rows, default=0) + case.more), kwargs)


def error(
    got: tuple[Tensor, Tensor],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_q_lens: Tensor,
    lengths: Tensor,
    max_q_len: int,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> float:
    """Error ratio of out and lse against float64, sequence by sequence; rows of no sequence must be 0 and -inf."""
    worst, free = 0.0, torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    for s in _sequences(q, k_cache, v_cache, cu_q_lens, lengths, max_q_len, block_table, window):
        ours = got[0][s.rows].transpose(0, 1)[None], got[1][s.rows].T[None]
        worst = max(worst, _attention.attention_error(ours, s.q, s.k, s.v, s.seen, scale, softcap))
        free[s.rows] = False
    empty = bool((got[0][free] == 0).all()) and bool((got[1][free] == -torch.inf).all())
    return worst if empty else float("inf")
