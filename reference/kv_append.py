"""kv_append, kv_compact, kv_scatter: rows of keys and values into, or within, the caches, in place.

Caches are [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D] with block_table [B, max_blocks]: row `position` of
sequence b is slot position % block of page block_table[b, position // block]. A row that is not there (a bad length,
index or page) is skipped here, as on a GPU; the pages refuse it on a CPU before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio

BUDGET = 2.0  # rows of k under a rotary embedding: a sum of two products in fp32, rounded once; all else is bit-equal
kv_compact_BUDGET = 0.0  # copies
kv_scatter_BUDGET = 0.0

Where = tuple[Any, ...]  # an index of a cache that gives [Hkv, D]


def locate(cache: Tensor, block_table: Tensor | None, b: int, position: int) -> Where | None:
    """Where row `position` of sequence b lies in a cache, or None."""
    if position < 0:
        return None
    if block_table is None:
        return (b, slice(None), position) if position < cache.shape[2] else None
    column, slot = divmod(position, max(cache.shape[1], 1))
    if column >= block_table.shape[1] or cache.shape[1] == 0:
        return None
    page = int(block_table[b, column])
    return (page, slot) if 0 <= page < cache.shape[0] else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, minus: float = -1.0) -> Tensor:
    """The first R elements of the rows of x [..., D] turned by cos and sin [..., R / 2], in x's dtype.

    (x1 cos - x2 sin, x2 cos + x1 sin), where x1 and x2 are the halves of the R elements, or interleaved the even and
    the odd ones.
    """
    half, out = cos.shape[-1], x.clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    x1, x2 = x[..., first], x[..., second]
    out[..., first] = x1 * cos + minus * (x2 * sin)
    out[..., second] = x2 * cos + x1 * sin
    return out


def _appended(
    cache: Tensor,
    new_rows: int,
    lengths: Tensor,
    block_table: Tensor | None,
    q_lens: Tensor | None,
    cos: Tensor | None,
    positions: Tensor | None,
) -> Iterator[tuple[int, int, Where, int]]:
    """(b, t, where it goes, its rotary position) of every row that kv_append writes."""
    wanted = [new_rows] * lengths.shape[0] if q_lens is None else q_lens.tolist()
    for b, length in enumerate(lengths.tolist()):
        for t in range(min(wanted[b], new_rows) if length >= 0 else 0):
            where = locate(cache, block_table, b, length + t)
            position = length + t if positions is None else int(positions[b, t])
            if where is not None and (cos is None or 0 <= position < cos.shape[0]):
                yield b, t, where, position


def kv_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    positions: Tensor | None = None,
) -> None:
    """Row t of sequence b goes to position lengths[b] + t, for t < q_lens[b]; k may be rotated on its way, in fp32."""
    for b, t, where, position in _appended(k_cache, k.shape[2], lengths, block_table, q_lens, cos, positions):
        row = k[b, :, t]
        if cos is not None and sin is not None:
            row = rotate(row.float(), cos[position].float(), sin[position].float(), rope_interleaved)
        k_cache[where] = row.to(k_cache.dtype)
        v_cache[where] = v[b, :, t]


def _moves(
    cache: Tensor, lengths: Tensor, accept_index: Tensor, accept_len: Tensor, block_table: Tensor | None
) -> Iterator[tuple[Where, Where]]:
    """(from, to) of every row that kv_compact moves, in order; an index that does not ascend ends a sequence's."""
    tree, indices, counts = accept_index.shape[1], accept_index.tolist(), accept_len.tolist()
    for b, length in enumerate(lengths.tolist()):
        last = -1
        for i in range(min(counts[b], tree) if length >= 0 else 0):
            index = indices[b][i]
            if not last < index < tree:
                break
            last = index
            start, to = (locate(cache, block_table, b, length + offset) for offset in (index, i))
            if index != i and start is not None and to is not None:
                yield start, to


def kv_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Row lengths[b] + accept_index[b, i] goes to position lengths[b] + i, for i < accept_len[b]."""
    for start, to in _moves(k_cache, lengths, accept_index, accept_len, block_table):
        k_cache[to] = k_cache[start].clone()
        v_cache[to] = v_cache[start].clone()


def kv_scatter(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """Row a of sequence b goes to position index[b, a]; -1 goes nowhere, and of equal positions the last one stays."""
    for b, positions in enumerate(index.tolist()):
        for a, position in enumerate(positions):
            where = locate(k_cache, None, b, position)
            if where is not None:
                k_cache[where], v_cache[where] = k[b, :, a], v[b, :, a]


def cost(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    q_lens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    positions: Tensor | None = None,
) -> Cost:
    """Read n = sum(q_lens) rows of k and v, write as many: 4 n Hkv D itemsize bytes, and the small tensors.

    Those are 4 bytes for each length, q_len and rotary position, 4 for each page of new rows, and R elements of cos and
    sin a row. A rotation is 6 operations for 2 elements. On the meta device, which holds no values, n = B T.
    """
    batch, heads, new_rows, dim = k.shape
    ragged = q_lens is not None and q_lens.device.type != "meta"
    rows = int(q_lens.clamp(0, new_rows).sum()) if ragged and q_lens is not None else batch * new_rows
    small = 4 * batch * (1 if q_lens is None else 2) + (0 if positions is None else 4 * rows)
    if block_table is not None:
        small += 4 * batch * -(-new_rows // max(k_cache.shape[1], 1))
    pairs = 0 if cos is None else cos.shape[1]
    small += 0 if cos is None else 2 * rows * pairs * cos.element_size()
    return Cost(4 * rows * heads * dim * k.element_size() + small, 6 * rows * heads * pairs)


def kv_compact_cost(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    accept_index: Tensor,
    accept_len: Tensor,
    *,
    block_table: Tensor | None = None,
) -> Cost:
    """Read and write the n rows that move: 4 n Hkv D itemsize bytes, 4 for each length, count and index.

    Where the indices hold no values (the meta device) all rows but the first of each sequence move.
    """
    batch, tree = accept_index.shape
    heads, dim = k_cache.shape[2 if block_table is not None else 1], k_cache.shape[3]
    moved, accepted = batch * max(tree - 1, 0), batch * tree
    if accept_index.device.type != "meta":
        column = torch.arange(tree, device=accept_index.device)
        taken = column < accept_len[:, None]
        moved, accepted = int((taken & (accept_index != column)).sum()), int(taken.sum())
    small = 4 * (2 * batch + accepted)
    if block_table is not None:
        small += 4 * batch * -(-tree // max(k_cache.shape[1], 1))
    return Cost(4 * moved * heads * dim * k_cache.element_size() + small, 0)


def kv_scatter_cost(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Cost:
    """Read and write n rows: 4 n Hkv D itemsize bytes, 4 for each index; n counts no -1 where there are values."""
    batch, heads, rows, dim = k.shape
    n = batch * rows if index.device.type == "meta" else int((index >= 0).sum())
    return Cost(4 * n * heads * dim * k.element_size() + 4 * batch * rows, 0)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit, the payload of a NaN included."""
    return got.shape == want.shape and torch.equal(_bits(got), _bits(want))


def _mismatch(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """0 where both caches are bit-equal, unwritten rows included, else infinity."""
    return 0.0 if all(same_bits(g, w) for g, w in zip(got, want, strict=True)) else float("inf")


def error(
    got: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    **kwargs: Any,
) -> float:
    """Error ratio of the rotated elements of the caches after the call, given those before; the rest is bit-equal."""
    want_k, want_v = k_cache.clone(), v_cache.clone()
    if cos is None or sin is None:
        kv_append(want_k, want_v, k, v, lengths, **kwargs)
        return _mismatch(got, (want_k, want_v))
    written, truth, magnitude = [], [], []
    block_table, q_lens, positions = (kwargs.get(name) for name in ("block_table", "q_lens", "positions"))
    turned = 2 * cos.shape[1]
    for b, t, where, position in _appended(k_cache, k.shape[2], lengths, block_table, q_lens, cos, positions):
        row, angle = k[b, :, t].double(), (cos[position].double(), sin[position].double())
        written.append(got[0][where][:, :turned])
        truth.append(rotate(row, *angle, rope_interleaved)[:, :turned])
        magnitude.append(rotate(row.abs(), angle[0].abs(), angle[1].abs(), rope_interleaved, 1.0)[:, :turned])
        want_k[where], want_v[where] = k[b, :, t], v[b, :, t]
        want_k[where][:, :turned] = written[-1]
    ratio = error_ratio(torch.stack(written), torch.stack(truth), torch.stack(magnitude)) if written else 0.0
    return max(ratio, _mismatch(got, (want_k, want_v)))


def kv_compact_error(got: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor, *args: Any, **kwargs: Any) -> float:
    """0 where the caches after the call are what they must be of those before, bit for bit, else infinity."""
    want = k_cache.clone(), v_cache.clone()
    kv_compact(*want, *args, **kwargs)
    return _mismatch(got, want)


def kv_scatter_error(got: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor, *args: Any) -> float:
    """As kv_compact_error()."""
    want = k_cache.clone(), v_cache.clone()
    kv_scatter(*want, *args)
    return _mismatch(got, want)


# How caches may lie in memory. contiguous: as their sizes say. transposed: heads and rows the other way round, as
# [B, S, H, D] or pages [n_blocks, H, block, D]. together: k and v by turns, row by row, in one tensor. padded: rows
# end before their memory does, so that they start at odd places.
LAYOUTS = ("contiguous", "transposed", "together", "padded")


def lay_out(k_cache: Tensor, v_cache: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same values in other memory; gaps are NaN."""
    if layout == "transposed":
        return k_cache.transpose(1, 2).contiguous().transpose(1, 2), v_cache.transpose(1, 2).contiguous().transpose(
            1, 2
        )
    if layout == "together":
        both = torch.stack([k_cache, v_cache], dim=3)
        return both[:, :, :, 0], both[:, :, :, 1]
    if layout == "padded":
        gap = k_cache.new_full((*k_cache.shape[:-1], 3), float("nan"))
        wide = torch.cat([k_cache, gap], dim=3), torch.cat([gap, v_cache], dim=3)
        return wide[0][..., : k_cache.shape[3]], wide[1][..., 3:]
    return k_cache.contiguous(), v_cache.contiguous()


def random_caches(
    batch: int,
    heads: int,
    capacity: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    block: int = 0,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Full caches and, with pages of `block` rows, a block table whose pages are scattered and some of them unused."""
    generator = torch.Generator().manual_seed(seed)
    pages = batch * (capacity // block) if block else 0
    shape = (pages + 3, block, heads, dim) if block else (batch, heads, capacity, dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    k_cache, v_cache = lay_out(k_cache, v_cache, layout)
    if not block:
        return k_cache, v_cache, None
    order = torch.randperm(pages + 3, generator=generator)[:pages]
    return k_cache, v_cache, order.reshape(batch, capacity // block).to(device, torch.int32)


class _Case(NamedTuple):
    """Sizes of caches and of what comes into them (B, H, T, D), and how it comes."""

    name: str
    sizes: tuple[int, int, int, int]
    capacity: int
    block: int = 0
    layout: str = "contiguous"
    ragged: bool = False
    rotary: int = 0  # R
    interleaved: bool = False
    positions: bool = False
    data_type_angles: bool = False


_CASES = (
    _Case("one", (1, 1, 1, 1), 1),
    _Case("step", (5, 2, 1, 128), 40),
    _Case("rows", (3, 2, 7, 64), 33, ragged=True),
    _Case("odd", (4, 3, 5, 77), 29, layout="padded"),
    _Case("together", (2, 4, 16, 80), 50, layout="together", ragged=True),
    _Case("transposed", (3, 2, 4, 96), 20, layout="transposed"),
    _Case("wide", (2, 1, 3, 1100), 9),
    _Case("no_rows", (3, 2, 0, 64), 8),
    _Case("no_sequences", (0, 2, 3, 64), 8),
    _Case("no_heads", (2, 0, 3, 64), 8),
    _Case("paged", (4, 2, 5, 128), 48, 16, ragged=True),
    _Case("paged_step", (9, 3, 1, 64), 24, 8),
    _Case("small_pages", (3, 2, 6, 40), 21, 1),
    _Case("odd_pages", (3, 2, 9, 65), 35, 7, "padded", ragged=True),
    _Case("pages_together", (2, 2, 4, 64), 32, 16, "together"),
    _Case("pages_transposed", (2, 3, 17, 64), 64, 32, "transposed"),
    _Case("tree", (2, 2, 64, 64), 100, ragged=True),
)
_ROTATED = (
    _Case("rope", (3, 2, 4, 128), 40, rotary=128),
    _Case("rope_part", (3, 2, 4, 80), 40, rotary=32, ragged=True),
    _Case("rope_pairs", (3, 2, 4, 64), 40, rotary=64, interleaved=True, layout="transposed"),
    _Case("rope_pairs_part", (2, 3, 3, 96), 24, 8, rotary=48, interleaved=True, data_type_angles=True),
    _Case("rope_odd", (2, 2, 3, 33), 12, rotary=14, layout="padded"),
    _Case("rope_odd_pairs", (2, 2, 3, 33), 12, rotary=10, interleaved=True),
    _Case("rope_tree", (3, 2, 9, 64), 48, 16, rotary=64, ragged=True, positions=True),
    _Case("rope_bare", (2, 2, 2, 64), 12, rotary=64, data_type_angles=True),
)


def _rows(case: _Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New k and v [B, H, T, D], as slices of one projection [B, T, 2 H D]."""
    batch, heads, rows, dim = case.sizes
    both = torch.randn(batch, rows, 2 * heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    return both[:, :heads], both[:, heads:]


def _rotary(
    case: _Case, lengths: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    batch, _, rows, _ = case.sizes
    if not case.rotary:
        return {}
    angles = torch.rand(case.capacity + rows, case.rotary // 2, generator=generator) * 6.3
    angle_type = dtype if case.data_type_angles else torch.float32
    kwargs: dict[str, Any] = {"cos": angles.cos().to(device, angle_type), "sin": angles.sin().to(device, angle_type)}
    if case.interleaved:
        kwargs["rope_interleaved"] = True
    if case.positions:
        depth = torch.randint(0, rows, (batch, rows), generator=generator)
        kwargs["positions"] = (lengths.cpu()[:, None] + depth).to(device, torch.int32)
    return kwargs


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Sizes around vectors and pages, every layout, lengths from 0 to full, rotated and not."""
    for case in _CASES + _ROTATED:
        generator = torch.Generator().manual_seed(seed)
        batch, heads, rows, dim = case.sizes
        k_cache, v_cache, table = random_caches(
            batch, heads, case.capacity, dim, device, dtype, block=case.block, layout=case.layout, seed=seed
        )
        lengths = torch.randint(0, case.capacity - rows + 1, (batch,), generator=generator)
        lengths[:1], lengths[1:2] = 0, case.capacity - rows
        lengths = lengths.to(device, torch.int32)
        kwargs: dict[str, Any] = {} if table is None else {"block_table": table}
        if case.ragged:
            some = torch.tensor([rows, 0, rows // 2, min(1, rows)])
            kwargs["q_lens"] = some[torch.arange(batch) % 4].to(device, torch.int32)
        kwargs |= _rotary(case, lengths, device, dtype, generator)
        yield Sample(case.name, (k_cache, v_cache, *_rows(case, device, dtype, generator), lengths), kwargs)


def random_accepts(batch: int, tree: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """accept_index [B, T], ascending from 0, padded with -1, and accept_len [B] of random paths; the first is whole."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((batch, tree), -1, dtype=torch.int32)
    counts = torch.zeros(batch, dtype=torch.int32)
    for b in range(batch if tree else 0):
        taken = torch.rand(tree, generator=generator) < (1.0 if b == 0 else float(torch.rand((), generator=generator)))
        taken[0] = True
        path = taken.nonzero()[:, 0]
        index[b, : len(path)], counts[b] = path, len(path)
    return index, counts


def kv_compact_samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """The caches of kv_append's samples with a tree of T rows at the end of each sequence."""
    for case in _CASES:
        batch, heads, rows, dim = case.sizes
        k_cache, v_cache, table = random_caches(
            batch, heads, case.capacity, dim, device, dtype, block=case.block, layout=case.layout, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, case.capacity - rows + 1, (batch,), generator=generator)
        lengths[:1] = case.capacity - rows
        accept_index, accept_len = random_accepts(batch, rows, seed)
        if case.ragged:
            accept_len[-1:] = 0
        moved = (t.to(device, torch.int32) for t in (lengths, accept_index, accept_len))
        yield Sample(case.name, (k_cache, v_cache, *moved), {} if table is None else {"block_table": table})


def kv_scatter_samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """The contiguous caches of kv_append's samples; rows go to random positions, all different, or nowhere."""
    for case in _CASES:
        if case.block:
            continue
        batch, heads, rows, dim = case.sizes
        k_cache, v_cache, _ = random_caches(
            batch, heads, case.capacity, dim, device, dtype, layout=case.layout, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(batch, case.capacity, generator=generator).argsort(dim=1)[:, :rows].to(torch.int32)
        if case.ragged:
            order[:, ::3] = -1
        yield Sample(case.name, (k_cache, v_cache, *_rows(case, device, dtype, generator), order.to(device)), {})
