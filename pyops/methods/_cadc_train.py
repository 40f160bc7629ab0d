"""CADC's training and evaluation: the factorisation of all interactions, the two towers on some, ranking."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.two_tower import INIT, TwoTower
from ..ops.mf_sgd import mf_sgd
from ._cadc_data import CHUNK, Interactions, check_pairs

Progress = Callable[[int, int], None]  # (done, in all)
STRATEGIES = ("init-freeze", "init-finetune", "random")


@dataclass(frozen=True)
class Factors:
    """A matrix factorisation: logits user @ item.T + user_bias[:, None] + item_bias + global_bias."""

    user: Tensor
    item: Tensor
    user_bias: Tensor
    item_bias: Tensor
    global_bias: Tensor

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of mf_sgd's arguments."""
        return self.user, self.item, self.user_bias, self.item_bias, self.global_bias

    def scores(self, users: Tensor) -> Tensor:
        """Logits [n, items] of users with every item."""
        return self.user[users] @ self.item.T + self.user_bias[users][:, None] + self.item_bias + self.global_bias


@dataclass(frozen=True)
class MfSettings:
    """How to factorise; chosen on ML-100k, on a validation split of its training part (docs/cadc.md)."""

    factors: int = 64
    negatives: int = 4
    epochs: int = 20
    lr: float = 0.05
    reg: float = 0.01
    deterministic: bool = True
    chunk: int = CHUNK


@dataclass(frozen=True)
class TowerSettings:
    """How to train the two towers; `lr` is Adam's."""

    epochs: int = 20
    batch: int = 1024
    negatives: int = 4
    lr: float = 1e-3
    weight_decay: float = 0.0
    hidden: int = 64


def factorize(
    pairs: Tensor,
    users: int,
    items: int,
    settings: MfSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Factorise all pairs, by mf_sgd; they may be mapped from a file and are read a chunk at a time.

    Each epoch takes the chunks in another order and shuffles each; its negatives are new.
    """
    s = settings or MfSettings()
    check_pairs(pairs, users, items, duplicates=False)
    generator = torch.Generator().manual_seed(seed)
    user, item = (INIT * torch.randn(rows, s.factors, generator=generator) for rows in (users, items))
    biases = [torch.zeros(rows) for rows in (users, items)]
    # The mean label, where the global bias would end without anything else.
    start = torch.full((1,), -math.log(s.negatives) if s.negatives else 0.0)
    f = Factors(*(t.to(device) for t in (user, item, *biases, start)))
    n, done = pairs.shape[0], 0
    starts = list(range(0, n, s.chunk))
    for _ in range(s.epochs):
        for place in torch.randperm(len(starts), generator=generator).tolist():
            piece = pairs[starts[place] : starts[place] + s.chunk]
            shuffled = piece[torch.randperm(piece.shape[0], generator=generator)].to(device)
            mf_sgd(
                *f.tables, shuffled, negatives=s.negatives, lr=s.lr, reg=s.reg, seed=seed + 1, offset=done,
                deterministic=s.deterministic, backend=backend,
            )  # fmt: skip
            done += piece.shape[0]
            if progress is not None:
                progress(done, n * s.epochs)
    return f


def train_two_tower(
    pairs: Tensor,
    users: int,
    items: int,
    factors: Factors | None = None,
    settings: TowerSettings | None = None,
    *,
    strategy: str = "init-freeze",
    width: int | None = None,
    user_content: Tensor | None = None,
    item_content: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TwoTower:
    """Train the two towers on pairs, with sampled negatives and binary cross-entropy.

    Args:
        pairs: int64 [n, 2].
        users, items: how many there are, in pairs or not.
        factors: what the strategies "init-..." start from.
        settings: epochs, batch and rates.
        strategy: "init-freeze": embeddings from `factors`, fixed; "init-finetune": the same, trained; "random".
        width: of the embeddings under "random", where no factors are given.
        user_content, item_content: fp32 [users or items, features], or None.
        seed: of the network, of the order, and of the negatives.
        device: where to train.
        progress: called with (batches done, batches in all).
    """
    s = settings or TowerSettings()
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if factors is None and strategy != "random":
        raise ValueError(f"strategy {strategy!r} needs the factors of a matrix factorisation, got None")
    columns = factors.user.shape[1] if factors is not None else width or MfSettings.factors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoTower(users, items, columns, user_content, item_content, s.hidden)
    model = model.to(device)
    if factors is not None and strategy != "random":
        model.load_factors(*factors.tables, freeze=strategy == "init-freeze")
    else:
        with torch.no_grad():
            model.global_bias.fill_(-math.log(s.negatives) if s.negatives else 0.0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=s.lr, weight_decay=s.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    batches = -(-pairs.shape[0] // s.batch)
    for epoch in range(s.epochs):
        order = torch.randperm(pairs.shape[0], generator=generator)
        for i, index in enumerate(order.split(s.batch)):
            some = pairs[index]
            sampled = torch.randint(items, (len(some), s.negatives), generator=generator)
            each = torch.cat([some[:, 1:], sampled], dim=1).to(device)
            logits = model(some[:, 0].to(device), each)
            label = torch.zeros_like(logits)
            label[:, 0] = 1
            loss = F.binary_cross_entropy_with_logits(logits, label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress(epoch * batches + i + 1, batches * s.epochs)
    return model.eval()


class Scorer(Protocol):
    """Factors, TwoTower, or anything else that ranks."""

    def scores(self, users: Tensor) -> Tensor:
        """[n, items] of users [n]."""


@functools.lru_cache(maxsize=8)
def _candidates(test: _Frozen, train: _Frozen, items: int, count: int, seed: int) -> Tensor:
    """[m, count] items of each test user that neither training nor the test has with him."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(len(test.pairs), items, dtype=torch.bool)
    _forbid(allowed, test.pairs, train.pairs)
    allowed[torch.arange(len(test.pairs)), test.pairs[:, 1]] = False
    if int(allowed.sum(1).min()) < count:
        raise ValueError(f"candidates must be at most {int(allowed.sum(1).min())} here, got {count}")
    return torch.multinomial(allowed.float(), count, generator=generator)


class _Frozen:
    """Pairs that a cache may hold on to, known by identity."""

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    def __hash__(self) -> int:
        return hash((self.pairs.data_ptr(), self.pairs.shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.pairs is other.pairs


def _forbid(allowed: Tensor, test: Tensor, train: Tensor) -> None:
    """Clear in `allowed` [m, items] what the user of each test pair has in training."""
    row = torch.full((int(max(test[:, 0].max(), train[:, 0].max())) + 1,), -1)
    row[test[:, 0]] = torch.arange(len(test))
    place = row[train[:, 0]]
    allowed[place[place >= 0], train[place >= 0, 1]] = False


def evaluate(
    model: Scorer,
    test: Tensor,
    train: Interactions,
    *,
    k: int = 10,
    candidates: int | None = 99,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """HR@k, NDCG@k and AUC of ranking each test user's item.

    Among `candidates` sampled items that the user has no interaction with, or (None) among all items that he has not in
    training. An item that scores the same as the wanted one ranks before it, so a model that says nothing gets nothing.

    Raises:
        ValueError: a test pair is also in training (a leak), or a user has two.
    """
    if test.dim() != 2 or test.shape[1] != 2 or len(test) == 0:
        raise ValueError(f"test must be int64 [m, 2] with m > 0, got {list(test.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if test[:, 0].unique().numel() < len(test):
        raise ValueError("test must have one pair a user, got several")
    keys = [pairs[:, 0] * train.items + pairs[:, 1] for pairs in (test, train.pairs)]
    leaks = int(torch.isin(keys[0], keys[1]).sum())
    if leaks:
        raise ValueError(f"test must share no pair with training, got {leaks} that are in both")
    scores = model.scores(test[:, 0].to(device)).detach().cpu()
    wanted = scores.gather(1, test[:, 1:])
    if candidates is not None:
        drawn = _candidates(_Frozen(test), _Frozen(train.pairs), train.items, candidates, seed)
        before, among = (scores.gather(1, drawn) >= wanted).sum(1), torch.full((len(test),), candidates)
    else:
        allowed = torch.ones_like(scores, dtype=torch.bool)
        _forbid(allowed, test, train.pairs)
        allowed[torch.arange(len(test)), test[:, 1]] = False
        before, among = ((scores >= wanted) & allowed).sum(1), allowed.sum(1)
    hit = before < k
    gain = torch.where(hit, 1 / torch.log2(before + 2.0), 0.0)
    auc = 1 - before / among.clamp(min=1)
    return {f"hr{k}": float(hit.float().mean()), f"ndcg{k}": float(gain.mean()), "auc": float(auc.mean())}
