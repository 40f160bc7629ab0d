"""The device's side of an offloaded cache: buffers for two layers, and the projections that make K and V again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models import Decoder
from ..models._linear import Dense, Nf4
from ..models.decoder import Block
from ..ops.kv_recompute import kv_recompute
from ..ops.nf4_dequant import nf4_dequant
from ._kvpr_lanes import Mark
from ._kvpr_store import Codec
from ._kvpr_weights import Streamed


@dataclass(frozen=True)
class Visit:
    """What a layer's buffers hold in a decode step, or will.

    Args:
        layer: which.
        tokens: rows from host memory.
        split: of these, rows that are recomputed.
        chunk: rows of X in one copy.
    """

    layer: int
    tokens: int
    split: int
    chunk: int

    @property
    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) rows of each chunk of X."""
        for at in range(0, self.split, max(self.chunk, 1)):
            yield at, min(self.split, at + max(self.chunk, 1))


@dataclass
class Stage:
    """Device buffers of a layer, for one of two layers in turn.

    Args:
        kv: [capacity, B, 2, Hkv D], where attention reads; rows are as in host memory.
        k, v: its [B, Hkv, capacity, D] views.
        x: what arrives of X, a tensor [capacity, B, width] a plane.
        inbox: what arrives of K and V, likewise; kv itself where they are not in 4 bits.
        holds: what the copies under way, or done, are for.
        arrived: when each chunk of X is here, and last when K and V are.
        free: when the layer before has left the buffers.
    """

    kv: Tensor
    k: Tensor
    v: Tensor
    x: list[Tensor]
    inbox: list[Tensor]
    holds: Visit | None = None
    arrived: list[Mark] = field(default_factory=list)
    free: Mark = None

    @classmethod
    def make(
        cls, capacity: int, batch: int, heads: int, dim: int, device: torch.device, kv: Codec, x: Codec, x_rows: int
    ) -> Stage:
        """Uninitialised buffers; those of X hold x_rows rows."""
        rows = torch.empty(capacity, batch, 2, heads * dim, device=device, dtype=kv.dtype)
        k, v = (rows[:, :, i].unflatten(-1, (heads, dim)).permute(1, 2, 0, 3) for i in range(2))
        inbox = [rows.flatten(2)] if not kv.packed else _planes(kv, capacity, batch, device)
        return cls(rows, k, v, _planes(x, x_rows, batch, device) if x_rows else [], inbox)


def _planes(codec: Codec, rows: int, batch: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(rows, batch, p.width, device=device, dtype=p.dtype) for p in codec.planes]


class Projection:
    """W_K and W_V of each layer, with what stands between their products and the cache.

    Dense weights are views of the decoder's on a GPU (copies where they lie in panels), or of what was sent of
    them for a visit. Those in 4 bits are expanded when they are used.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._dense = decoder, dict[int, tuple[Tensor, Tensor]]()
        a = decoder.architecture
        self._first, self._width = a.heads * a.head_dim, a.kv_heads * a.head_dim

    def _block(self, layer: int) -> Block:
        block = self._decoder.blocks[layer]
        assert isinstance(block, Block)
        return block

    def _weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """[Hkv D, H] each."""
        if layer in self._dense:
            return self._dense[layer]
        qkv, hidden = self._block(layer).qkv, self._decoder.architecture.hidden
        begin = self._first * hidden
        if isinstance(qkv, Nf4) and begin % (2 * qkv.blocksize) == 0:
            packed, absmax = qkv.packed.reshape(-1)[begin // 2 :], qkv.absmax.reshape(-1)[begin // qkv.blocksize :]
            shape = (2 * self._width, hidden)
            both = nf4_dequant(packed, absmax, shape, self._decoder.dtype, qkv.blocksize)
            return both[: self._width], both[self._width :]
        if isinstance(qkv, Nf4):  # a block of weights holds some of W_Q and some of W_K
            whole = nf4_dequant(qkv.packed, qkv.absmax, (qkv.out_features, hidden), self._decoder.dtype, qkv.blocksize)
            w_k, w_v = whole[self._first :].split(self._width)
            return w_k, w_v
        both = qkv.weight[self._first :]
        if isinstance(qkv, Streamed):  # another layer's are there next
            return both[: self._width], both[self._width :]
        if both.device.type == "cpu":
            both = both.clone()  # without W_Q, which the slice would keep alive
        self._dense[layer] = both[: self._width], both[self._width :]
        return self._dense[layer]

    def prepare(self, layer: int) -> None:
        """Copy the weights now where they would be copied at their first use."""
        qkv = self._block(layer).qkv
        if isinstance(qkv, Dense) and not isinstance(qkv, Streamed):
            self._weights(layer)

    def of(self, layer: int, stage: Stage) -> Callable[[int, Tensor], None]:
        """What makes rows `first` … of the stage's K and V from x [n, B, H], given (first, x)."""
        block, a = self._block(layer), self._decoder.architecture
        w_k, w_v = self._weights(layer)
        bias = block.qkv.bias
        b_k, b_v = (None, None) if bias is None else bias[self._first :].split(self._width)
        norm = None if block.qk_norm is None else block.qk_norm[a.heads]
        cos, sin = (None, None) if self._decoder.frequencies is None else self._decoder.angle_table

        def recompute(first: int, x: Tensor) -> None:
            turn = slice(first, first + x.shape[0])
            kv_recompute(
                x.transpose(0, 1), w_k, w_v, b_k, b_v, None if cos is None else cos[turn],
                None if sin is None else sin[turn], stage.k, stage.v, first, k_norm_weight=norm, k_norm_eps=a.eps,
            )  # fmt: skip

        return recompute
