"""mf_sgd: an epoch of a factorisation, tables of MovieLens' shapes with synthetic pairs (popular items as there).

The tables change with every call, which is what they are for: each backend is proven on copies, on the first pairs. In
blocks by the reference's error. Lock-free no value is prescribed, but with steps so small that an example hardly
changes the next, the mean loss must be that of the first values within LOSS_TOLERANCE and, on a CPU, where few updates
are lost, the tables must move along the gradient there within MOVE_TOLERANCE: the share of these, times the budget,
stands for the error. The floor counts what updates move through the caches that hold the tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastops import _registry
from fastops.reference import mf_sgd as reference
from fastops.testing import on_copies, poison

from .floors import cached_gbps
from .harness import Bench, Call, Case, Outcome, Session, first_line
from .timing import Effort

SHAPES = {"ml-100k": (943, 1682, 100_000), "ml-1m": (6040, 3706, 1_000_000), "ml-10m": (69_878, 10_677, 10_000_000)}
PARTS = {"ml-100k": 100_000, "ml-1m": 200_000, "ml-10m": 50_000}  # that a CPU is timed with: peers take a second
PROVEN = 3 * reference.BLOCK + 100
CACHED_BYTES = {"cuda": 16 << 20, "cpu": 1 << 20}  # copies of less are mostly launches
SMALL_LR, LOSS_TOLERANCE, MOVE_TOLERANCE = 1e-5, 0.01, 0.1


def case(name: str, factors: int, negatives: int, deterministic: bool, device: str = "cuda") -> Case:
    users, items, pairs = SHAPES[name]
    sizes = {"shape": name, "users": users, "items": items, "pairs": PARTS[name] if device == "cpu" else pairs}
    sizes |= {"factors": factors, "negatives": negatives}
    return Case(sizes | ({"deterministic": True} if deterministic else {}), torch.float32, device)


CASES = [
    *(case(n, 64, 4, d) for n in SHAPES for d in (True, False)),
    *(case("ml-1m", f, 4, d) for f in (16, 128) for d in (True, False)),
    *(case(n, 64, 4, d, "cpu") for n in SHAPES for d in (True, False)),
    *(case("ml-100k", 64, 1, d, "cpu") for d in (True, False)),
]


def make(case: Case, device: torch.device) -> Call:
    s = case.sizes
    tables = [0.1 * torch.randn(s[rows], s["factors"], device=device) for rows in ("users", "items")]
    biases = [torch.zeros(n, device=device) for n in (s["users"], s["items"], 1)]
    keywords = {"negatives": s["negatives"], "lr": 0.02, "reg": 0.01, "seed": 1}
    return Call(
        (*tables, *biases, distinct_pairs(s["users"], s["items"], s["pairs"], device)),
        {**keywords, "deterministic": s.get("deterministic", False)},
    )


def distinct_pairs(users: int, items: int, n: int, device: torch.device) -> Tensor:
    """int64 [n, 2], shuffled, none twice (implicit takes a matrix of them); some rows far likelier than others.

    A power of a uniform number: the hundredth most popular item is a tenth as popular as the first, as in MovieLens.
    """
    if device.type == "meta":
        return torch.empty(n, 2, dtype=torch.int64, device=device)
    share = torch.rand(3 * n, 2, device=device, dtype=torch.float64)
    keys = (share[:, 0].square() * users).long() * items + (share[:, 1].pow(3) * items).long()
    keys = keys.unique()
    keys = keys[torch.randperm(len(keys), device=device)[:n]]
    assert len(keys) == n
    return torch.stack([keys // items, keys % items], dim=1)


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """One piece: the first pairs, whose outputs these are."""
    yield output, Call((*call.args[:5], call.args[5][:PROVEN]), call.kwargs)


def first_order(call: Call) -> tuple[Tensor, list[Tensor]]:
    """(mean loss, how the user's and item's tables and biases move), float64, every example at the first values."""
    user, item, user_bias, item_bias, bias = (t.double() for t in call.args[:5])
    pairs, k = call.args[5], call.kwargs
    drawn = reference.negatives_of(0, len(pairs), k["negatives"], len(item), k["seed"], pairs.device)
    items = torch.cat([pairs[:, 1:], drawn], dim=1)
    users = pairs[:, :1].expand_as(items)
    p, q = user[users], item[items]
    z = (p * q).sum(-1) + user_bias[users] + item_bias[items] + bias
    label = torch.zeros_like(z)
    label[:, 0] = 1
    g = (torch.sigmoid(z) - label)[..., None]
    one, reg = torch.ones_like(g), k["reg"]
    moves = []
    for table, rows, term in ((user, users, g * q), (item, items, g * p), (user_bias, users, g), (item_bias, items, g)):
        flat = table.reshape(len(table), -1)
        count = torch.zeros_like(flat[:, :1]).index_add_(0, rows.flatten(), one.flatten(0, 1))
        total = torch.zeros_like(flat).index_add_(0, rows.flatten(), term.flatten(0, 1))
        moves.append(-k["lr"] * (total + reg * count * flat).reshape(table.shape))
    return torch.nn.functional.binary_cross_entropy_with_logits(z, label), moves


class MfBench(Bench):
    """A page whose op changes its arguments."""

    def _prove(self, call: Call, device: torch.device, outcome: Outcome) -> tuple[dict[str, float], Any]:
        """On copies, on the first pairs."""
        op, errors, right = _registry.find(self.op), dict[str, float](), None
        for backend in op.available(device):
            if backend == "reference" or (backend == "triton" and device.type == "cpu"):
                continue
            ((_, start),) = self.chunks(call, None)
            try:
                with poison():
                    got = on_copies(functools.partial(op, backend), self.op, *start.args, **start.kwargs)
            except RuntimeError as why:
                outcome.failures.append(f"{backend}: {first_line(why)}")
                continue
            error = self._error(backend, start, got)
            if error <= self.reference.budget:
                errors[backend], right = error, got[0]
            else:
                outcome.failures.append(f"{backend}: error {error:.3g}, at most {self.reference.budget:g} allowed")
        return errors, right

    def _floor_us(self, call: Call, case: Case, session: Session) -> float:
        """Or what its updates take in the caches that hold the tables, whose speed a copy of their size tells."""
        user, item = call.args[:2]
        size = 4 * (len(user) + len(item)) * (user.shape[1] + 1)
        moved = reference.update_bytes(len(call.args[5]), call.kwargs["negatives"], user.shape[1])
        in_caches = moved / (
            cached_gbps(session.device, max(size, CACHED_BYTES[session.device.type]), session.effort) * 1e3
        )
        return max(super()._floor_us(call, case, session), in_caches)

    def _error(self, backend: str, start: Call, got: tuple[Any, ...]) -> float:
        if start.kwargs["deterministic"]:
            return self.reference.error(got, *start.args, **start.kwargs)
        # From where the global bias would end, which alone moves by thousands of examples, and then hardly does.
        bias = torch.full_like(start.args[4], -math.log(max(1, start.kwargs["negatives"])))
        start = Call((*start.args[:4], bias, start.args[5]), {**start.kwargs, "lr": SMALL_LR})
        mine = on_copies(functools.partial(_registry.find(self.op), backend), self.op, *start.args, **start.kwargs)
        loss, moves = first_order(start)
        shares = [float((mine[0] - loss).abs() / loss) / LOSS_TOLERANCE]
        if backend == "cpu":
            for before, after, move in zip(start.args[:4], mine[1:5], moves, strict=True):
                shares.append(float((after - before - move).norm() / move.norm()) / MOVE_TOLERANCE)
        return max(shares) * self.reference.budget


BENCH = MfBench("mf_sgd", CASES, make, chunks, effort=Effort(cuda_ms=120.0, cpu_ms=500.0))
