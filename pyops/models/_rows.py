"""The new rows of one pass through a decoder: where they stand, and which sequence each belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """N new rows of B sequences, as many of each (one after the other), or packed.

    Args:
        lengths: int32 [B], rows of each sequence in the cache before these.
        after: int32 [B], and with these.
        positions: int64 [N], the place of each row in its sequence.
        width: rows a sequence, of which q_lens may say that fewer count; 0 where rows are packed.
        q_lens: int32 [B] or None, how many of the `width` rows count.
        tree_mask: int64 [B, width] or None, which new rows each sees (see decode_attn).
        starts: int32 [B + 1], where the rows of each sequence begin; packed rows only.
        counts: rows of each sequence, on the host; packed rows only.
    """

    lengths: Tensor
    after: Tensor
    positions: Tensor
    width: int = 0
    q_lens: Tensor | None = None
    tree_mask: Tensor | None = None
    starts: Tensor | None = None
    counts: tuple[int, ...] = ()

    @classmethod
    def next(cls, lengths: Tensor) -> Rows:
        """One more row in every sequence; reads no values."""
        return cls(lengths, lengths + 1, lengths.long(), 1)

    @classmethod
    def tree(cls, lengths: Tensor, tree_mask: Tensor, depth: Tensor, q_lens: Tensor | None = None) -> Rows:
        """A draft tree (or several tokens in a row) in every sequence: as tree_build makes it."""
        width = tree_mask.shape[1]
        new = width if q_lens is None else q_lens
        positions = (lengths[:, None] + depth).reshape(-1).long()
        return cls(lengths, (lengths + new).int(), positions, width, q_lens, tree_mask)

    @classmethod
    def packed(cls, before: Sequence[int], counts: Sequence[int], device: torch.device) -> Rows:
        """counts[b] rows of sequence b, which has before[b] already."""
        after = [a + b for a, b in zip(before, counts, strict=True)]
        places = itertools.chain.from_iterable(range(a, b) for a, b in zip(before, after, strict=True))
        ints = torch.tensor([*before, *after, *itertools.accumulate(counts, initial=0)], dtype=torch.int32).to(device)
        batch = len(counts)
        return cls(
            ints[:batch],
            ints[batch : 2 * batch],
            torch.tensor(list(places), dtype=torch.int64).to(device),
            starts=ints[2 * batch :],
            counts=tuple(counts),
        )

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.lengths.shape[0]
