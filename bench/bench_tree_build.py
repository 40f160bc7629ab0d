"""tree_build: random draft trees of a few sizes; launch-bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastops.reference import tree_build

from . import peers_attention
from .harness import Bench, Call, Case
from .peers import PEERS

PEERS["tree_build"] = peers_attention.TREE
CASES = [Case({"B": b, "T": t}, torch.int32) for b, t in ((1, 64), (8, 16), (64, 64))]


def make(case: Case, device: torch.device) -> Call:
    return Call((tree_build.random_parents(case.sizes["B"], case.sizes["T"]).to(device),))


def chunks(call: Call, output: Any) -> Iterator[tuple[Any, Call]]:
    """All of it: a few thousand nodes."""
    yield output, call


BENCH = Bench("tree_build", CASES, make, chunks)
