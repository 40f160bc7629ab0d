"""Rows between host memory and the device: ranges to it, new rows back, prompts by way of a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ._kvpr_lanes import STORE, Lanes, Mark
from ._kvpr_store import HostStore, empty_host

WAITING = 4  # buffers of prompts on their way to the host, a layer's or two


class Transfer:
    """Copies of a store's planes.

    Args:
        store: host memory.
        lanes: of the device.
        batch: sequences.
    """

    def __init__(self, store: HostStore, lanes: Lanes, batch: int) -> None:
        self._store, self._lanes, self._batch = store, lanes, batch
        self._waiting: list[tuple[Mark, int, int, Tensor, list[int], list[int]]] = []
        self._counts: list[int] | None = None

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting, self._counts = [], None

    def send(self, targets: Sequence[Tensor], layer: int, plane: int, first: int, last: int) -> None:
        """Tokens first … last - 1 of planes `plane` … to the same rows of targets [tokens, B, width]; does not wait."""
        for i, target in enumerate(targets):
            for at, piece in self._store.pieces(layer, plane + i, first, last):
                target[at : at + piece.shape[0]].copy_(piece, non_blocking=True)

    def gather(self, layer: int, plane: int, b: int, tokens: int) -> Tensor:
        """[tokens, width] of a sequence's first tokens, in a buffer from which the device may copy."""
        width, dtype = self._store.planes[plane].width, self._store.planes[plane].dtype
        rows = empty_host((tokens, width), dtype, self._store.pin)
        for at, piece in self._store.pieces(layer, plane, 0, tokens):
            rows[at : at + piece.shape[0]] = piece[:, b]
        return rows

    def save_step(self, layer: int, planes: Sequence[Tensor], rows: Sequence[int]) -> None:
        """A new row of every sequence, [B, width] a plane, at position rows[b]; a copy for each run of equal ones."""
        for i, new in enumerate(planes):
            self._lanes.keep(new, STORE)
            first = 0
            for position, run in itertools.groupby(rows):
                last = first + len(list(run))
                ((_, piece),) = self._store.pieces(layer, i, position, position + 1)
                piece[0, first:last].copy_(new[first:last], non_blocking=True)
                first = last

    def save_prompts(self, layer: int, planes: Sequence[Tensor], before: Sequence[int], counts: Sequence[int]) -> None:
        """Packed new rows [N, width] a plane, counts[b] of sequence b behind its before[b].

        Where all sequences have as many, and begin at the same token, they are turned token after token on the device
        and go where they belong. Else they go to a buffer first, from which the host spreads them when they are there.
        """
        self._counts = list(counts)
        alike = len(set(counts)) == 1 and len(set(before)) == 1
        for i, new in enumerate(planes):
            self._lanes.keep(new, STORE)
            if alike:
                new = new.unflatten(0, (self._batch, counts[0])).transpose(0, 1).contiguous()
                for at, piece in self._store.pieces(layer, i, before[0], before[0] + counts[0]):
                    row = at - before[0]
                    piece.copy_(new[row : row + piece.shape[0]], non_blocking=True)
            else:
                host = new
                if self._lanes.cuda:
                    host = empty_host(tuple(new.shape), new.dtype, self._store.pin)
                    host.copy_(new, non_blocking=True)
                self._waiting.append((self._lanes.mark(STORE), layer, i, host, list(before), list(counts)))
        while len(self._waiting) > WAITING:
            self._spread(*self._waiting.pop(0))

    def _spread(
        self, there: Mark, layer: int, plane: int, rows: Tensor, before: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Wait for a buffer, and put its rows where they belong."""
        if there is not None:
            there.synchronize()
        first = 0
        for b, (begin, count) in enumerate(zip(before, counts, strict=True)):
            for at, piece in self._store.pieces(layer, plane, begin, begin + count):
                row = first + at - begin
                piece[:, b] = rows[row : row + piece.shape[0]]
            first += count

    def finish(self) -> list[int] | None:
        """All new rows of a pass have their place; the counts of a pass of prompts. Waits after prompts alone."""
        counts, self._counts = self._counts, None
        if counts is not None and self._lanes.cuda:
            self._lanes.stream(STORE).synchronize()  # the host reads these rows for the next chunk
        while self._waiting:
            self._spread(*self._waiting.pop(0))
        return counts
