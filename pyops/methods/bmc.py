"""BMC: KV caches that grow in place, by r rows every r steps.

    decoder.generate(prompts, 256, **bmc.parts())                   # decode_attn, which never reads spare rows
    decoder.generate(prompts, 256, **bmc.parts(setting="padded"))   # as published: masked attention over all of them

A cache that grows by one row a step copies all it holds in each; one that reserves everything at once makes attention
over its whole capacity read rows that hold nothing. Between them, r spare rows every r steps cost least at an r that
follows from what a copied and a padded row take on the device (_bmc_model.py; r="auto" measures both, once).

With attention that knows the lengths, padding costs nothing: there r trades the time in copies (and in CUDA graphs that
are captured again) against memory that lies spare. growth="virtual" does without copies: the cache reserves addresses
for everything, and memory is put behind them as rows come.

Source: arXiv:2511.12031, of which the abstract was at hand; the rest is derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models._architecture import Architecture
from ..models._rows import Rows
from ..models.caches import Layer, append_rows, per_sequence
from ..models.decoder import FullAttention
from ..ops.kv_append import kv_append
from ._bmc_model import Costs, best_r, overhead, smallest_r
from ._bmc_profile import FIRST_ROWS, Pace, Shape, costs_of, length_aware_r
from ._bmc_virtual import Reserved

__all__ = [
    "Costs",
    "GrowingCache",
    "Memory",
    "PaddedAttention",
    "best_r",
    "costs_of",
    "overhead",
    "parts",
    "register_attention",
    "smallest_r",
    "transformers_cache",
]

SETTINGS = ("padded", "length_aware")
GROWTHS = ("copy", "virtual", "off")


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache, all layers, keys and values.

    Args:
        held: of rows that are in use.
        capacity: of rows that there is memory for.
        reserved: of rows that there are addresses for.
        copied: moved by growth so far.
    """

    held: int
    capacity: int
    reserved: int
    copied: int


class GrowingCache:
    """A KV cache that grows by r rows whenever it is full, [B, Hkv, S, D] a layer.

    Args:
        r: rows; 1 is a copy every step, and as many as the text has reserve them all at once. "auto" follows the model:
            best_r for padded attention; for length_aware the smallest that keeps copies below a hundredth of the time,
            steps being timed as they come.
        setting: the attention that reads it: "length_aware", or "padded" (PaddedAttention), whose spare rows are zero.
        growth: "copy"; "virtual": addresses for the whole text at once, memory behind them by r rows, no copies; "off":
            `limit` rows, or as many as the text needs, and never more.
        limit: rows that a sequence may have.
        width: rows that a step writes: more than 1 with speculation.
        accepted: of them, how many stay in the mean.

    Raises:
        ValueError: naming the argument, what it must be and what it is; from start() and reserve(), for texts longer
            than the limit.
        MemoryError: there is no memory to grow; the cache still holds its rows and can be used, or grown later.

    Attributes:
        capacity: rows that a sequence can have now.
        spare: rows that it grew by last.
        growths: how often it grew since start().
    """

    lengths: Tensor

    def __init__(
        self,
        r: int | str = "auto",
        *,
        setting: str = "length_aware",
        growth: str = "copy",
        limit: int | None = None,
        width: int = 1,
        accepted: float = 1.0,
    ) -> None:
        _check(r, setting, growth, limit, width, accepted)
        self.r, self.setting, self.growth, self.limit = r, setting, growth, limit
        self.width, self.accepted = width, accepted
        self.version = self.growths = self.capacity = self.spare = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self._reserved: list[Reserved] = []
        self._copied_rows = self._held = self._most = 0
        self._pace = Pace()

    def start(self, model: Architecture, batch: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Empty, and nothing reserved yet but addresses."""
        if self.limit is not None and rows > self.limit:
            raise ValueError(f"bmc: limit must be at least the {rows} rows of the text, got {self.limit}")
        self._shape = Shape(batch, model.layers, model.heads, model.kv_heads, model.head_dim, device, dtype)
        self._most = rows if self.limit is None or self.growth != "off" else self.limit
        self._release()
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.capacity = self._held = self._copied_rows = self.growths = 0
        self.version += 1
        self._pace = Pace()
        if self.growth == "virtual":
            self._reserved = [Reserved(self._rows_shape(rows), device, dtype) for _ in range(2 * model.layers)]
        else:
            empty = torch.empty(self._rows_shape(0), device=device, dtype=dtype)
            self.k, self.v = [empty] * model.layers, [empty] * model.layers

    def reserve(self, rows: int) -> None:
        """Room for sequences of `rows` rows; grows where there is none."""
        grows = rows > self.capacity
        if self.capacity:  # what comes after the first rows is a prompt, not a step
            self._pace.tick(grows)
        if grows:
            if rows > self._most:
                raise ValueError(
                    f"bmc: the cache is full: it has {self.capacity} of at most {self._most} rows, {rows} are needed"
                )
            before = rows - self.width if self.capacity else rows  # first is the prompt, then come steps
            self.spare = self._spare(before)
            self._grow(min(before + self.spare, self._most))
        self._held = rows

    def append(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        """In place."""
        append_rows(*self._tensors(layer), k, v, rows)

    def layer(self, layer: int) -> Layer:
        """All rows that there is memory for; those beyond the lengths are zero or were written once."""
        return *self._tensors(layer), None

    def advance(self, after: Tensor) -> None:
        """In place, so that captured graphs see it."""
        self.lengths.copy_(after)
        if after.device.type == "cpu":
            self._pace.done()

    @property
    def memory(self) -> Memory:
        """What it takes now."""
        s = self._shape
        row = 2 * s.layers * s.batch * s.kv_heads * s.head_dim * s.dtype.itemsize
        addresses = self._most if self.growth == "virtual" else self.capacity
        held = min(self._held, self.capacity)
        return Memory(row * held, row * self.capacity, row * addresses, row * self._copied_rows)

    def _rows_shape(self, rows: int) -> tuple[int, int, int, int]:
        s = self._shape
        return s.batch, s.kv_heads, rows, s.head_dim

    def _tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of a layer. Padded attention gets its capacity; else all addresses, which never change."""
        if self.growth != "virtual":
            return self.k[layer], self.v[layer]
        k, v = self._reserved[2 * layer].tensor, self._reserved[2 * layer + 1].tensor
        if self.setting == "padded":
            return k[:, :, : self.capacity], v[:, :, : self.capacity]
        return k, v

    def _spare(self, rows: int) -> int:
        """Rows to grow by, where the cache holds `rows`."""
        if self.growth == "off":
            return self._most
        if isinstance(self.r, int):
            return max(self.r, self.width)  # what a step needs at least
        try:
            if self.setting == "padded":
                costs = costs_of(self._shape, self._most, self.width)
                return best_r(costs, rows, max(0, self._most - rows - self.width + 1), self.width, self.accepted)
            return max(self.width, length_aware_r(self._shape, rows, self._pace, self.width, self.accepted))
        except torch.OutOfMemoryError:  # no room to measure: as where nothing is known
            return max(self.width, FIRST_ROWS)

    def _grow(self, capacity: int) -> None:
        """All layers to `capacity` rows, a layer at a time: beside the cache there is one more layer at most."""
        moves = self.growth != "virtual" or self.setting == "padded"
        self.version += moves  # captured graphs hold the old memory, or a view of less
        if self.growth == "virtual":
            self._commit(capacity)
        else:
            for i in range(self._shape.layers):
                if self.k[i].shape[2] < capacity:  # else it grew before memory ran out for another
                    self.k[i], self.v[i] = self._moved(self.k[i], self.v[i], capacity)
            self._copied_rows += min(self._held, self.capacity)
        self.growths += self.capacity > 0
        self.capacity = capacity

    def _moved(self, k: Tensor, v: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        try:
            return grown(k, v, min(self._held, k.shape[2]), capacity, self.lengths, self.setting == "padded")
        except (RuntimeError, MemoryError) as error:
            raise self._short(capacity, error) from error

    def _commit(self, capacity: int) -> None:
        for reserved in self._reserved:
            try:
                reserved.commit(capacity)
            except MemoryError as error:
                raise self._short(capacity, error) from error

    def _short(self, capacity: int, error: Exception) -> MemoryError:
        s = self._shape
        mib = 2 * s.batch * s.kv_heads * capacity * s.head_dim * s.dtype.itemsize / 2**20
        reason = str(error).split("\n", 1)[0]
        return MemoryError(
            f"bmc: no memory to grow from {self.capacity} to {capacity} rows, {mib:.1f} MiB a layer; the cache still "
            f"holds its rows ({reason})"
        )

    def _release(self) -> None:
        for reserved in self._reserved:
            reserved.close()
        self._reserved, self.k, self.v = [], [], []


def grown(k: Tensor, v: Tensor, held: int, capacity: int, lengths: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    """k and v [B, Hkv, S, D] with `capacity` rows: of the first `held` those within lengths, zeros or anything behind.

    Raises what torch does where there is no memory.
    """
    make = torch.zeros if zeros else torch.empty
    sizes = (*k.shape[:2], capacity, k.shape[3])
    new_k, new_v = (make(sizes, device=k.device, dtype=k.dtype) for _ in range(2))
    if held:
        kv_append(new_k, new_v, k[:, :, :held], v[:, :, :held], torch.zeros_like(lengths), q_lens=lengths)
    return new_k, new_v


class PaddedAttention:
    """Attention over all rows that the cache has, those beyond the lengths masked: torch's, and the published setting.

    Query heads that share keys are rows of one head, so nothing is expanded. Prompts go through prefill_attn.
    """

    def __init__(self) -> None:
        self._prompts = FullAttention()
        self._masks: tuple[Rows, dict[tuple[int, int | None], Tensor]] | None = None

    def __call__(self, layer: int, q: Tensor, cache: Layer, rows: Rows, window: int | None) -> Tensor:
        """[N, Hq, D] of q [N, Hq, D]. Raises ValueError for a paged cache."""
        k, v, table = cache
        if table is not None:
            raise ValueError("bmc: padded attention needs a contiguous cache, got a paged one")
        if rows.starts is not None:
            return self._prompts(layer, q, cache, rows, window)
        mask = self._mask(rows, k.shape[2], window)
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        grouped = per_sequence(q, rows.width).unflatten(1, (heads, group)).flatten(2, 3)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(1, 1, group, 1))
        heads_of_rows: Tensor = out.unflatten(2, (group, rows.width)).flatten(1, 2)
        return heads_of_rows.transpose(1, 2).flatten(0, 1)

    def _mask(self, rows: Rows, capacity: int, window: int | None) -> Tensor:
        """[B, 1, T, S] bool, made once a pass."""
        if self._masks is None or self._masks[0] is not rows:
            self._masks = (rows, {})
        masks = self._masks[1]
        if (capacity, window) not in masks:
            masks[capacity, window] = visible(rows, capacity, window)[:, None]
        return masks[capacity, window]


def visible(rows: Rows, capacity: int, window: int | None) -> Tensor:
    """[B, T, S] bool: which of a cache's rows each new row may see; one beyond q_lens sees as any other would."""
    place = torch.arange(rows.width, device=rows.lengths.device)
    key = torch.arange(capacity, device=rows.lengths.device)
    before = rows.lengths[:, None, None]
    if rows.tree_mask is None:
        position = before + place[:, None]
        seen, key_position = key <= position, key
    else:
        bits = rows.tree_mask | (torch.ones_like(rows.tree_mask) << place)  # each sees itself
        node = key - before  # [B, 1, S]
        seen = (node < 0) | (((bits[:, :, None] >> node.clamp(0, 63)) & 1).bool() & (node < rows.width))
        depths = rows.positions.unflatten(0, (-1, rows.width))
        position = depths[:, :, None]
        key_position = torch.where(node < 0, key, depths.gather(1, node[:, 0].clamp(0, rows.width - 1).long())[:, None])
    return seen if window is None else seen & (key_position > position - window)


def parts(
    setting: str = "length_aware",
    r: int | str = "auto",
    *,
    growth: str = "copy",
    limit: int | None = None,
    width: int = 1,
    accepted: float = 1.0,
) -> dict[str, Any]:
    """What Decoder.generate and Decoder.stream need for BMC: a cache, and the attention that goes with it.

    Args:
        setting: "length_aware": fastops.decode_attn; "padded": PaddedAttention.
        r, growth, limit, width, accepted: GrowingCache's.
    """
    cache = GrowingCache(r, setting=setting, growth=growth, limit=limit, width=width, accepted=accepted)
    return {"cache": cache, "attention": PaddedAttention() if setting == "padded" else FullAttention()}


def transformers_cache(
    model: Any, r: int | str = "auto", *, setting: str = "length_aware", limit: int | None = None
) -> Any:
    """A transformers Cache that grows by r rows, for `model.generate(..., past_key_values=...)`.

    Any attention implementation can read it; with register_attention()'s nothing is read twice.

    Args:
        model: a transformers model of decoder layers with attention.
        r: as GrowingCache's; "auto" decides at each growth, since nobody says how long the text will be.
        setting: "length_aware": attention gets the rows that are held; "padded": the whole capacity and a mask, which
            needs register_attention()'s attention, or "eager".
        limit: rows that a sequence may have.

    Raises:
        ValueError: naming the argument; and from generate(), a text longer than the limit.
        MemoryError: from generate(), no memory to grow; the cache still holds its rows.
    """
    from ._bmc_transformers import cache_of

    _check(r, setting, "copy", limit, 1, 1.0)
    return cache_of(model, r, setting, limit)


def register_attention(name: str = "fastops") -> str:
    """Make fastops' attention, with the masks it needs, known to transformers; for model.set_attn_implementation(name).

    Causal attention of texts without padding goes to decode_attn and prefill_attn; batches with padding to torch's with
    a mask, in which a row that sees nothing is 0; all else (training, dropout, encoders) to transformers' own.
    """
    from ._bmc_transformers import register

    return register(name)


def _check(r: int | str, setting: str, growth: str, limit: int | None, width: int, accepted: float) -> None:
    if r != "auto" and (isinstance(r, (bool, str)) or r < 1):
        raise ValueError(f'bmc: r must be "auto" or at least 1, got {r!r}')
    for name, value, known in (("setting", setting, SETTINGS), ("growth", growth, GROWTHS)):
        if value not in known:
            raise ValueError(f"bmc: {name} must be one of {', '.join(known)}, got {value!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"bmc: limit must be at least 1, got {limit}")
    if width < 1:
        raise ValueError(f"bmc: width must be at least 1, got {width}")
    if not 0 < accepted <= width:
        raise ValueError(f"bmc: accepted must be more than 0 and at most width, {width}, got {accepted}")
