"""Where a decoder keeps the keys and values of its layers.

A cache is a part that plugs in. It offers `KVCache`'s methods: `start` once for a text, `reserve` before rows are
added, then for each layer `append` and `layer`, and `advance` when all layers have them. `version` changes when its
memory moves, which makes captured CUDA graphs stale.

Two things are optional. A cache with `append_input(layer, x, rows)` is given the input of a layer's projections, x
[N, H] after its norm, before that layer's `append`. A cache with `capturable = False` is never captured in a graph.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..ops.kv_append import kv_append
from ._architecture import WHO, Architecture
from ._rows import Rows

Layer = tuple[Tensor, Tensor, Tensor | None]  # k_cache, v_cache, block_table: as decode_attn takes them


class KVCache(Protocol):
    """What a decoder asks of a cache."""

    lengths: Tensor  # int32 [B] on the device, rows of each sequence
    version: int

    def start(self, model: Architecture, batch: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Empty, for `batch` sequences that will have at most `rows` rows each."""

    def reserve(self, rows: int) -> None:
        """Room for sequences of `rows` rows in all; host side, before a pass."""

    def append(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        """Write k and v [N, Hkv, D] of a layer after the rows it has."""

    def layer(self, layer: int) -> Layer:
        """What attention reads."""

    def advance(self, after: Tensor) -> None:
        """All layers hold the new rows: lengths become `after`."""


class UpfrontCache:
    """All rows that a text can have, reserved at once: [B, Hkv, S, D] a layer.

    Args:
        capacity: rows a sequence; what the text needs when None.
    """

    lengths: Tensor

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity, self.version = capacity, 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def start(self, model: Architecture, batch: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Reserve everything. Raises ValueError when a given capacity is too small."""
        if self.capacity is not None and rows > self.capacity:
            raise ValueError(f"{WHO}: cache must have a capacity of at least {rows} rows, got {self.capacity}")
        sizes = (batch, model.kv_heads, self.capacity or rows, model.head_dim)
        fits = bool(self.k) and (self.k[0].shape, self.k[0].device, self.k[0].dtype) == (sizes, device, dtype)
        if not fits or len(self.k) != model.layers:
            self.k = [torch.empty(sizes, device=device, dtype=dtype) for _ in range(model.layers)]
            self.v = [torch.empty(sizes, device=device, dtype=dtype) for _ in range(model.layers)]
            self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
            self.version += 1
        self.lengths.zero_()

    def reserve(self, rows: int) -> None:
        """Nothing to do: start() reserved them."""

    def append(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        """In place."""
        append_rows(self.k[layer], self.v[layer], k, v, rows)

    def layer(self, layer: int) -> Layer:
        """The whole of both; rows beyond the lengths hold anything."""
        return self.k[layer], self.v[layer], None

    def advance(self, after: Tensor) -> None:
        """In place, so that captured graphs see it."""
        self.lengths.copy_(after)


def append_rows(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rows: Rows, block_table: Tensor | None = None
) -> None:
    """kv_append for rows k, v [N, Hkv, D]: one call where all sequences have as many, else one a sequence."""
    counts = set(rows.counts)
    width = rows.width or (counts.pop() if len(counts) == 1 else 0)
    if width:
        kv_append(
            k_cache, v_cache, per_sequence(k, width), per_sequence(v, width), rows.lengths,
            block_table=block_table, q_lens=rows.q_lens,
        )  # fmt: skip
        return
    first = 0
    for b, count in enumerate(rows.counts):
        if count:
            own = slice(None) if block_table is not None else slice(b, b + 1)
            part = slice(first, first + count)
            kv_append(
                k_cache[own], v_cache[own], per_sequence(k[part], count), per_sequence(v[part], count),
                rows.lengths[b : b + 1], block_table=None if block_table is None else block_table[b : b + 1],
            )  # fmt: skip
        first += count


def per_sequence(x: Tensor, width: int) -> Tensor:
    """[B, heads, width, D], a view of rows [B * width, heads, D]."""
    rows: Tensor = x.unflatten(0, (-1, width))
    return rows.transpose(1, 2)
