"""tree_build: from each node's parent, which nodes it sees and how deep it stands.

Source: tree attention of speculative decoding, arXiv:2305.09781, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._truth import Cost, Sample

BUDGET = 0.0  # bits

MAX_NODES = 64  # the bits of a mask


def tree_build(parent: Tensor, *, q_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tree_mask [B, T] int64: bits of the node and its ancestors, depth [B, T] int32).

    A parent that cannot be one (not before its child) counts as none. All nodes climb at once, twice as far each time.
    """
    rows = parent.shape[1]
    row = torch.arange(rows, device=parent.device)
    ancestor = torch.where((parent >= 0) & (parent < row), parent, -1).long()
    mask = (torch.ones_like(ancestor) << row).expand(parent.shape)  # bit 63 is the sign
    depth = (ancestor >= 0).long()
    for _ in range(max(rows - 1, 0).bit_length()):
        known, at = ancestor >= 0, ancestor.clamp(min=0)
        mask = torch.where(known, mask | mask.gather(1, at), mask)
        depth = torch.where(known, depth + depth.gather(1, at), depth)
        ancestor = torch.where(known, ancestor.gather(1, at), -1)
    if q_lens is not None:
        there = row < q_lens[:, None]
        mask, depth = torch.where(there, mask, 0), torch.where(there, depth, 0)
    return mask.contiguous(), depth.int()


def cost(parent: Tensor, *, q_lens: Tensor | None = None) -> Cost:
    """4 bytes of parent read, 8 of mask and 4 of depth written a node, 4 a sequence of q_lens; nothing to compute."""
    return Cost(16 * parent.numel() + (0 if q_lens is None else 4 * parent.shape[0]), 0)


def random_parents(batch: int, rows: int, seed: int = 0) -> Tensor:
    """[B, T] int32: each node's parent is any node before it."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch, rows, generator=generator)
    return (draw * torch.arange(rows)).int() - (torch.arange(rows) == 0).int()


def samples(device: torch.device, dtype: torch.dtype = torch.int32, seed: int = 0) -> Iterator[Sample]:
    """Random trees, chains (the deepest), stars (the flattest), forests, ragged ones, one node, none."""
    for batch, rows in ((3, 64), (2, 63), (5, 33), (1, 1), (4, 2), (2, 0), (0, 8)):
        yield Sample(f"random_{batch}x{rows}", (random_parents(batch, rows, seed).to(device),), {})
    chain = torch.arange(-1, 63, dtype=torch.int32, device=device).expand(2, 64)
    yield Sample("chain", (chain,), {})
    yield Sample("star", ((chain > -1).int() - 1,), {})
    yield Sample("forest", (torch.full((2, 9), -1, dtype=torch.int32, device=device),), {})
    ragged = torch.tensor([0, 1, 17, 64], dtype=torch.int32, device=device)
    yield Sample("ragged", (random_parents(4, 64, seed).to(device),), {"q_lens": ragged})


def error(got: tuple[Tensor, Tensor], parent: Tensor, *, q_lens: Tensor | None = None) -> float:
    """0, or inf where a bit differs from what climbing node by node gives."""
    parents = parent.tolist()
    rows = [parent.shape[1]] * parent.shape[0] if q_lens is None else q_lens.tolist()
    for b, (mask, depth) in enumerate(zip(got[0].tolist(), got[1].tolist(), strict=True)):
        for i in range(parent.shape[1]):
            bits, steps, node = 0, -1, i if i < rows[b] else -1
            while node >= 0:
                bits, steps = bits | 1 << node, steps + 1
                node = parents[b][node] if parents[b][node] < node else -1
            if (mask[i] % (1 << 64), depth[i]) != (bits, max(steps, 0)):
                return float("inf")
    return 0.0
