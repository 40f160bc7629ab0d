"""A decoder whose layers' weights are in host memory too: two layers of them are on the device at a time.

A layer's weights lie one after the other, so that a staging buffer has them as they are. They are sent in the order of
their use, and of the projections those of K and V first; each product waits for its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ..models import Decoder
from ..models._linear import Dense
from ..models.decoder import Block
from ._kvpr_lanes import COMPUTE, COPY, Lanes, Mark
from ._kvpr_plan import WHO
from ._kvpr_store import (
    SPARE,
    HostMemoryError,
    allocated,
    available_memory,
    empty_host,
    gigabytes,
    release_pinned,
)

PRODUCTS = ("qkv", "out", "up", "down")  # of a layer, in the order of their use
BUFFERS = ("input_norm", "input_bias", "mlp_norm", "mlp_bias", "qk_norm")


class Streamed(Dense):
    """A dense layer whose weight is where `_weight` was put last, and is there after `ready`."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, lanes: Lanes) -> None:
        super().__init__(torch.empty(0, dtype=dtype), bias)
        self.shape, self.weights, self._lanes = shape, shape[0] * shape[1], lanes
        self.ready: Mark = None

    def _lay_out(self) -> None:
        """Not what comes anew for each visit."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K], when the weight is there."""
        self._lanes.wait(COMPUTE, self.ready)
        return super().forward(x)


@dataclass
class _Staging:
    """Device memory for one of two layers in turn."""

    flat: Tensor
    holds: int | None = None
    ready: list[Mark] = field(default_factory=list)  # of each product


class OffloadedWeights:
    """A copy of a decoder that has its layers' weights in host memory; what else it has is shared, or moved.

    Args:
        decoder: with dense weights; it may lie on the CPU while `device` is a GPU that could not hold it.
        device: where to compute; the decoder's when None.
        pin: use pinned memory; on a GPU when None.
        host_limit: bytes of host memory that it may have; what the machine and its control group have when None.

    Attributes:
        decoder: what computes. A layer must be made present by visit() before it is used.
        layer_bytes: that a visit sends.

    Raises:
        ValueError: the decoder has weights in 4 bits.
        HostMemoryError: there is not enough host memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device | str | None = None,
        *,
        pin: bool | None = None,
        host_limit: int | None = None,
    ) -> None:
        self.device = decoder.device if device is None else torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.pin = self.device.type == "cuda" if pin is None else pin
        blocks = [cast(Block, block) for block in decoder.blocks]
        if not all(isinstance(getattr(block, name), Dense) for block in blocks for name in PRODUCTS):
            raise ValueError(f"{WHO}: decoder must have dense weights to keep them in host memory, got NF4")
        self._lanes = Lanes(self.device)
        self._first = decoder.architecture.heads * decoder.architecture.head_dim  # rows of W_Q, which are sent last
        sizes = [sum(getattr(block, name).weights for name in PRODUCTS) for block in blocks]
        self._room(sum(allocated(size * decoder.dtype.itemsize, self.pin) for size in sizes), host_limit, self.pin)
        self._host = [empty_host((size,), decoder.dtype, self.pin) for size in sizes]
        most = max(sizes, default=0)
        self._staging = [_Staging(torch.empty(most, dtype=decoder.dtype, device=self.device)) for _ in range(2)]
        for staging in self._staging:
            self._lanes.keep(staging.flat, COPY)
        self.layer_bytes = most * decoder.dtype.itemsize
        self.decoder = self._offloaded(decoder, blocks)
        self._turn = 0

    def visit(self, layer: int) -> None:
        """The layer's products may be computed from here on, until the next visit; the next layer's weights set out."""
        here, other = self._staging[self._turn % 2], self._staging[(self._turn + 1) % 2]
        if here.holds != layer:
            self._fetch(here, layer)
        block = self.decoder.blocks[layer]
        for name, weight, ready in zip(PRODUCTS, self._views(layer, here.flat), here.ready, strict=True):
            product = cast(Streamed, getattr(block, name))
            product._weight, product.ready = weight, ready
        if len(self._host) > 1:
            self._fetch(other, (layer + 1) % len(self._host))
        self._turn += 1

    def _fetch(self, staging: _Staging, layer: int) -> None:
        """Launch the copies of a layer's weights, when what was launched before has left the buffer."""
        lanes = self._lanes
        lanes.wait(COPY, lanes.mark(COMPUTE))
        staging.holds, staging.ready = layer, []
        for target, source in zip(self._views(layer, staging.flat), self._views(layer, self._host[layer]), strict=True):
            first = 0 if staging.ready else self._first
            with lanes.on(COPY, f"weights {layer}"):
                for rows in (slice(first, None), slice(0, first)):
                    target[rows].copy_(source[rows], non_blocking=True)
            staging.ready.append(lanes.mark(COPY))

    def _views(self, layer: int, flat: Tensor) -> list[Tensor]:
        """[N, K] of each product within a layer's weights."""
        shapes = [cast(Streamed, getattr(self.decoder.blocks[layer], name)).shape for name in PRODUCTS]
        parts = flat[: sum(n * k for n, k in shapes)].split([n * k for n, k in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _offloaded(self, decoder: Decoder, blocks: list[Block]) -> Decoder:
        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device)

        made = []
        for host, block in zip(self._host, blocks, strict=True):
            products, at = list[Streamed](), 0
            for name in PRODUCTS:
                dense = cast(Dense, getattr(block, name))
                weight = dense.weight
                host[at : at + weight.numel()].copy_(weight.reshape(-1))
                products.append(
                    Streamed((weight.shape[0], weight.shape[1]), weight.dtype, here(dense.bias), self._lanes)
                )
                at += weight.numel()
            qkv, out, up, down = products
            made.append(Block(qkv, out, up, down, {name: here(getattr(block, name)) for name in BUFFERS}))
        embedding, head = cast(Tensor, here(decoder.embedding)), decoder.head
        if isinstance(head, Dense) and self.device != decoder.device:
            tied = torch.equal(head.weight, decoder.embedding)
            head = Dense(embedding if tied else head.weight.to(self.device), here(head.bias))
        elif self.device != decoder.device:
            raise ValueError(f"{WHO}: decoder must have a dense head to be moved to {self.device}, got NF4")
        parts = {name: here(getattr(decoder, name)) for name in ("norm", "norm_bias", "positions", "frequencies")}
        whole = Decoder(
            decoder.architecture, made, embedding, head, **parts,  # type: ignore[arg-type]
            rotary_scale=decoder.rotary_scale, compiled=decoder.compiled, tokenizer=decoder.tokenizer,
        )  # fmt: skip
        return whole.eval()

    @staticmethod
    def _room(need: int, limit: int | None, pin: bool) -> None:
        have, what = (limit, "host_limit") if limit is not None else available_memory()
        if limit is None and pin and need > have - SPARE:
            release_pinned()  # what torch keeps of weights and caches that are gone
            have, what = available_memory()
        have -= 0 if limit is not None else SPARE
        if need > have:
            raise HostMemoryError(
                f"{WHO}: host memory must have {gigabytes(need)} for the weights, got {gigabytes(max(have, 0))} "
                f"({what})"
            )
