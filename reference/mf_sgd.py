"""mf_sgd: a pass of stochastic gradient descent over positive pairs and sampled negatives, for matrix factorisation.

Source: CADC, arXiv:2407.08108, its first step: p = sigmoid(u . v + b_u + b_v + b), binary cross-entropy. What the paper
leaves open is ours: negatives are uniform over the items and may hit positives; a *block* is BLOCK consecutive
positives, counted from the beginning of the stream (offset), with their negatives. All gradients of a block are taken
at the values before it; a row that occurs c times in it moves by lr * min(1, CAP / c) times the sum of its c gradients.
So rare rows move as in sequential descent, and rows that everything touches (a small table's, the global bias) cannot
overshoot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._truth import Cost, Sample, error_ratio

BLOCK = 2048  # positives whose gradients are taken at the same values
CAP = 16  # occurrences in a block from which on a row's step no longer grows
BUDGET = 4.0  # chains of sums

_WORD = (1 << 32) - 1
# Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_MULTIPLIERS, _WEYL, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32 x 32 bit product; int64 holds no 64-bit one, so `b` is taken in halves."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def philox(seed: int, counter: Tensor, index: int) -> Tensor:
    """[4, n] random words (int64, below 2^32) of 64-bit counters [n]; `index` is the counter's third word."""
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _WORD, (counter >> 32) & _WORD, zero + index, zero
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], c0), _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3])


def negatives_of(first: int, n: int, negatives: int, items: int, seed: int, device: torch.device) -> Tensor:
    """[n, negatives] item ids of the positives `first` ... `first + n - 1` of the stream, from nothing else."""
    counter = torch.arange(first, first + n, device=device)
    words = [philox(seed, counter, index) for index in range((negatives + 3) // 4)]
    if not words:
        return counter.new_zeros(n, 0)
    return ((torch.cat(words)[:negatives] * items) >> 32).T


class _Tables(NamedTuple):
    user: Tensor
    item: Tensor
    user_bias: Tensor
    item_bias: Tensor
    global_bias: Tensor


def _blocks(offset: int, n: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of positives begin and end, counted within this call."""
    start = 0
    while start < n:
        end = min(n, ((offset + start) // BLOCK + 1) * BLOCK - offset)
        yield start, end
        start = end


def _move(
    table: Tensor, rows: Tensor, gradients: Tensor, lr: float, reg: float, sizes: Tensor | None, wrong: Tensor | None
) -> None:
    """Take a block's step of `table`; where asked, add to `wrong` the sizes of the terms that make each element."""
    flat = table.reshape(len(table), -1)
    order = torch.argsort(rows, stable=True)
    distinct, count = torch.unique_consecutive(rows[order], return_counts=True)

    def sums(terms: Tensor) -> Tensor:
        return torch.segment_reduce(terms.reshape(len(rows), -1)[order], "sum", lengths=count, axis=0)

    total = sums(gradients)
    step = lr * (CAP / count.to(flat.dtype)).clamp(max=1)[:, None]
    before, decay = flat[distinct], (count * reg).to(flat.dtype)[:, None]
    flat[distinct] = before - step * (total + decay * before)
    if sizes is not None and wrong is not None:
        terms = sums(sizes)
        # Added one by one, c terms round c times, in directions of chance: sqrt(c) / 2 roundings of the sum in the root
        # mean square, beyond what a budget of a few roundings holds where c is large. Then the old value joins.
        terms *= (count.to(flat.dtype).sqrt() / 4).clamp(min=1)[:, None]
        wrong.reshape(len(table), -1)[distinct] += step * (terms + decay * before.abs()) + before.abs()


def _step(t: _Tables, block: Tensor, sampled: Tensor, lr: float, reg: float, wrong: _Tables | None = None) -> Tensor:
    """Descend on one block of pairs [m, 2] and sampled items [m, negatives]; returns its summed loss."""
    users, items = block[:, 0], torch.cat([block[:, 1:], sampled], dim=1)
    p, q = t.user[users], t.item[items]  # [m, F], [m, 1 + negatives, F]
    z = (q * p[:, None]).sum(-1) + t.user_bias[users][:, None] + t.item_bias[items] + t.global_bias.reshape(())
    label = torch.zeros_like(z)
    label[:, 0] = 1
    g = torch.sigmoid(z) - label
    loss = F.binary_cross_entropy_with_logits(z, label, reduction="sum")
    each_user = users[:, None].expand_as(items).reshape(-1)
    each_item, none = items.reshape(-1), torch.zeros_like(each_user)
    grads = [g[:, :, None] * q, g[:, :, None] * p[:, None], g, g, g]
    sizes: list[Tensor | None] = [None] * 5
    if wrong is not None:
        # z is a sum that rounds; the sigmoid passes on at most a quarter of it and rounds itself.
        b = t.user_bias[users].abs()[:, None] + t.item_bias[items].abs() + t.global_bias.reshape(()).abs()
        s = g.abs() + 1 + ((q * p[:, None]).abs().sum(-1) + b) / 4
        sizes = [s[:, :, None] * q.abs(), s[:, :, None] * p.abs()[:, None], s, s, s]
    places = [each_user, each_item, each_user, each_item, none]
    for i, (table, rows) in enumerate(zip(t, places, strict=True)):
        target = table.reshape(1) if i == 4 else table
        off = None if wrong is None else wrong[i].reshape(target.shape)
        _move(target, rows, grads[i], lr, 0.0 if i == 4 else reg, sizes[i], off)
    return loss


def _descend(
    t: _Tables,
    pairs: Tensor,
    negatives: int,
    lr: float,
    reg: float,
    seed: int,
    offset: int,
    wrong: _Tables | None = None,
) -> Tensor:
    """Every block in turn; returns the mean loss."""
    n, items, loss = len(pairs), len(t.item), t.user.new_zeros((), dtype=torch.float64)
    for start, end in _blocks(offset, n):
        block = pairs[start:end]
        sampled = negatives_of(offset + start, end - start, negatives, items, seed, pairs.device)
        inside = ((block >= 0) & (block < torch.tensor([len(t.user), items], device=pairs.device))).all(dim=1)
        if not inside.all():
            block, sampled = block[inside], sampled[inside]
        if len(block):
            loss += _step(t, block, sampled, lr, reg, wrong)
    return loss / max(1, n * (1 + negatives))


def mf_sgd(
    user: Tensor,
    item: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    global_bias: Tensor,
    pairs: Tensor,
    *,
    negatives: int,
    lr: float,
    reg: float,
    seed: int,
    offset: int = 0,
    deterministic: bool = True,
) -> Tensor:
    """Descend in place on pairs [n, 2]; returns the mean loss. In blocks whether deterministic or not."""
    tables = _Tables(user, item, user_bias, item_bias, global_bias)
    return _descend(tables, pairs, negatives, lr, reg, seed, offset).to(torch.float32)


def cost(
    user: Tensor,
    item: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    global_bias: Tensor,
    pairs: Tensor,
    *,
    negatives: int,
    lr: float = 0.0,
    reg: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    deterministic: bool = True,
) -> Cost:
    """Read the pairs, and read and write every table once; per example 4 F for z, 6 F for both rows' steps.

    Tables larger than every cache cannot be reused: there each example reads and writes its item's row and bias and
    each positive its user's, 8 (F + 1) bytes a row, which is more and what update_bytes() counts.
    """
    width = 1 + user.shape[1]
    tables = 8 * (user.shape[0] + item.shape[0]) * width + 8
    return Cost(tables + 16 * pairs.shape[0], 10 * user.shape[1] * pairs.shape[0] * (1 + negatives))


def update_bytes(n: int, negatives: int, factors: int) -> int:
    """Bytes through the level of memory that holds the tables: a user's row and 1 + negatives items', both ways."""
    return n * (16 + 8 * (factors + 1) * (2 + negatives))


class _Case(NamedTuple):
    """Table sizes, positives, and what the call says."""

    name: str
    users: int
    items: int
    factors: int
    n: int
    negatives: int = 4
    reg: float = 0.01
    offset: int = 0
    lr: float = 0.05


_CASES = (
    _Case("plain", 50, 70, 32, 300),
    _Case("odd", 7, 5, 13, 61, 3),
    _Case("one_factor", 9, 11, 1, 40, 1),
    _Case("no_negatives", 40, 30, 16, 100, 0),
    _Case("many_negatives", 33, 90, 24, 50, 9),
    _Case("most_negatives", 20, 60, 12, 4, 1024, lr=0.01),
    _Case("one_row", 1, 1, 8, 20, 2),
    _Case("one_pair", 3, 4, 64, 1, 5),
    _Case("no_pairs", 3, 4, 8, 0),
    _Case("no_reg", 20, 20, 17, 200, 4, 0.0),
    _Case("wide", 12, 14, 256, 70, 4),
    _Case("beyond", 10, 10, 259, 33, 2),
    _Case("blocks", 300, 200, 40, 2 * BLOCK + 77, 4, 0.01, BLOCK // 2 + 5),
    _Case("late", 60, 50, 9, 90, 5, 0.01, (1 << 33) - 40),
)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """fp32 tables of every awkward size, pairs that repeat, blocks that begin before the call and go on after it."""
    if dtype != torch.float32:
        return
    for case in _CASES:
        generator = torch.Generator().manual_seed(seed)
        draw = [
            0.3 * torch.randn(*shape, generator=generator)
            for shape in ((case.users, case.factors), (case.items, case.factors), (case.users,), (case.items,), (1,))
        ]
        ids = [torch.randint(0, rows, (case.n,), generator=generator) for rows in (case.users, case.items)]
        kwargs = {"negatives": case.negatives, "lr": case.lr, "reg": case.reg, "seed": 7 - (3 << 40)}
        yield Sample(
            case.name,
            tuple(t.to(device) for t in (*draw, torch.stack(ids, dim=1))),
            {**kwargs, "offset": case.offset},
        )


def error(
    got: tuple[Tensor, ...],
    user: Tensor,
    item: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    global_bias: Tensor,
    pairs: Tensor,
    *,
    negatives: int,
    lr: float,
    reg: float,
    seed: int,
    offset: int = 0,
    deterministic: bool = True,
) -> float:
    """Error ratio of (loss, the five tables afterwards) against float64; the arguments are those before.

    An element's terms are its values before each block and lr |gradient| there, each with what the product and the
    sigmoid before it may have rounded.
    """
    before = (user, item, user_bias, item_bias, global_bias)
    tables = _Tables(*(t.double().cpu().clone() for t in before))
    wrong = _Tables(*(torch.zeros_like(t) for t in tables))
    loss = _descend(tables, pairs.cpu(), negatives, lr, reg, seed, offset, wrong)
    # The loss: z's own error, a quarter of which (at most all) passes on, and sums of n values.
    ratios = [error_ratio(got[0].cpu(), loss, 4 * (1 + loss.abs()))]
    for mine, want, terms in zip(got[1:], tables, wrong, strict=True):
        ratios.append(error_ratio(mine.cpu().reshape(want.shape), want, terms))
    return max(ratios)
