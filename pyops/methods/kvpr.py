"""KVPR: a KV cache in host memory at the limit of the link, by recomputing a part of it on the device.

    from fastops.methods import OffloadedCache

    tokens = decoder.generate(prompts, 256, cache=OffloadedCache(decoder))

Every decode step must bring each layer's K and V to the device. Of the first rows the layer's inputs X are sent
instead, half as many bytes where heads are not grouped, and K and V are made from them while the rest arrives. The
result is that of a resident cache. Source: KVPR, arXiv:2411.17089; the chunks and the 4-bit store are ours.
docs/kvpr.md has the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..models import Decoder, Rows
from ..models._architecture import Architecture
from ..models._linear import Dense, Nf4
from ..models.caches import Layer, append_rows
from ._kvpr_device import Projection, Stage, Visit
from ._kvpr_lanes import COMPUTE, COPY, STORE, Lanes, Mark, Timeline
from ._kvpr_plan import (
    CHUNKS,
    COMPRESSED,
    MEBI,
    WHO,
    Plan,
    Rates,
    Shape,
    best_plan,
    chunk_rows,
    column_seconds,
    column_split,
    split_point,
    step_seconds,
)
from ._kvpr_profile import Profile, profile_of
from ._kvpr_store import Codec, HostMemoryError, HostStore, available_memory
from ._kvpr_transfer import Transfer

__all__ = ["HostMemoryError", "OffloadedCache", "Plan", "Profile", "Rates", "Shape", "available_memory", "split_point"]

SCHEDULES = ("auto", "full", "single", "pipeline", "column")
PLAN_EVERY = 32  # rows after which the split is chosen anew
COLUMN_CHUNK = 64 * MEBI  # bytes of X in one copy of the column schedule, whose copies wait for nobody


class OffloadedCache:
    """Keys and values in host memory, for `Decoder.generate(..., cache=...)`; exact unless compressed.

    Two layers are on the device at a time. It serves one text at a time, of prompts and then a token a step: no draft
    trees, and all layers in their order. Steps are not captured in CUDA graphs. When a step fails, the cache refuses to
    go on until the next start(), with which every text begins, and which makes it sound again.

    Args:
        decoder: whose projections recompute.
        split: "auto", the fastest by the machine's profile; "full", all K and V are sent; "single", KVPR's one split;
            "pipeline", X in chunks; "column", the one at which batches that share weights (generate_column) keep the
            link and the GPU equally busy; or how many rows are recomputed (of those that there are).
        chunk: bytes of a chunk of X, of an integer split: one chunk when None. Of "pipeline" and "auto": the best of 2
            to 64 MiB when None.
        compress: what is stored in 4 bits: None, "kv", "x" or "all". Not exact then.
        pin: use pinned memory; on a GPU when None.
        segment: tokens by which the store grows, at least.
        host_limit: bytes of host memory that it may have; what the machine and its control group have when None.
        weights: bytes of a layer's weights that are sent in each step too, divided by the batches that share them.
        profile: rates of the machine; measured, or read from disk, when None and a schedule needs them.
        timeline: record what is copied and computed when; see `timeline.save(path)`.
        progress: show a bar while profiling.

    Raises:
        ValueError: naming the argument, what it must be and what it is.
    """

    lengths: Tensor
    capturable = False

    def __init__(
        self,
        decoder: Decoder,
        split: int | str = "auto",
        *,
        chunk: int | None = None,
        compress: str | None = None,
        pin: bool | None = None,
        segment: int = 128,
        host_limit: int | None = None,
        weights: float = 0.0,
        profile: Profile | None = None,
        timeline: bool = False,
        progress: bool = False,
    ) -> None:
        if split not in SCHEDULES if isinstance(split, str) else split < 0:
            raise ValueError(f"{WHO}: split must be one of {', '.join(SCHEDULES)}, or 0 or more, got {split!r}")
        if compress not in COMPRESSED:
            raise ValueError(f"{WHO}: compress must be one of None, 'kv', 'x', 'all', got {compress!r}")
        for name, value in (("chunk", chunk), ("segment", segment)):
            if value is not None and value < 1:
                raise ValueError(f"{WHO}: {name} must be at least 1, got {value}")
        a, self.device = decoder.architecture, decoder.device
        if pin and self.device.type != "cuda":
            raise ValueError(f"{WHO}: pin must be False without a CUDA device, got True")
        self.decoder, self.split, self.chunk, self.compress, self.version = decoder, split, chunk, compress, 0
        self.pin = self.device.type == "cuda" if pin is None else pin
        self.segment, self.host_limit, self.weights = segment, host_limit, weights
        self._width, packed = a.kv_heads * a.head_dim, COMPRESSED[compress]
        self._kv = Codec(2 * self._width, decoder.dtype, "kv" in packed, parts=2)
        self._x = Codec(a.hidden, decoder.dtype, "x" in packed)
        self._profile, self._progress = profile, progress
        self._lanes = Lanes(self.device, timeline)
        self._projection = Projection(decoder)
        self._failed: str | None = None
        self._store: HostStore | None = None
        self._stages: list[Stage] = []
        self._plans: dict[int, Plan] = {}

    @property
    def timeline(self) -> Timeline | None:
        """What was copied and computed when; None unless asked for."""
        return self._lanes.timeline

    @property
    def host_bytes(self) -> int:
        """Host memory that it holds."""
        return 0 if self._store is None else self._store.bytes

    @property
    def shape(self) -> Shape:
        """What a row weighs; once a text has begun."""
        hidden, itemsize = self.decoder.architecture.hidden, self._kv.dtype.itemsize
        return Shape(self._batch, hidden, self._width, itemsize, self.compress)

    @property
    def profile(self) -> Profile:
        """The machine's rates; measured, or read from disk, at first."""
        if self._profile is None:
            hidden = self.decoder.architecture.hidden
            self._profile = profile_of(
                self.device, hidden, self._width, self._kv.dtype, pin=self.pin, progress=self._progress
            )
        return self._profile

    def rates(self, tokens: int) -> Rates:
        """For steps over so many rows: beside recomputation a layer reads its weights, K and V."""
        blocks = self.decoder.blocks
        weights = sum(m.weight_bytes for m in blocks[0].children() if isinstance(m, (Dense, Nf4)))
        attended = tokens * 2 * self._batch * self._width * self._kv.dtype.itemsize
        return self.profile.rates(weights + attended)

    def plan(self, tokens: int) -> Plan:
        """What a step over so many rows in host memory does; of an integer split its time is predicted, too."""
        if self.split == "column":
            rates = self.rates(tokens)
            split = column_split(self.shape, rates, tokens, tokens, self.weights)
            seconds = column_seconds(self.shape, rates, tokens, split, self.weights)
            rows = min(split, chunk_rows(self.shape, self.chunk or COLUMN_CHUNK))
            return Plan("column", split, rows, seconds, self.shape.copied(tokens, split) + self.weights)
        if isinstance(self.split, str):
            sizes = CHUNKS if self.chunk is None else (self.chunk,)
            layers = self.decoder.architecture.layers
            return best_plan(self.shape, self.rates(tokens), tokens, self.split, sizes=sizes, layers=layers)
        split, chunk = self._fixed(tokens)
        seconds = step_seconds(self.shape, self.rates(tokens), tokens, split, chunk)
        name = "full" if split == 0 else "pipeline" if chunk < split else "single"
        return Plan(name, split, chunk, seconds, self.shape.copied(tokens, split))

    def _fixed(self, tokens: int) -> tuple[int, int]:
        """(split, rows of a chunk) of an integer split."""
        split = min(int(self.split), tokens)
        return split, split if self.chunk is None else min(split, chunk_rows(self.shape, self.chunk))

    def _visit(self, layer: int, tokens: int) -> Visit:
        if not isinstance(self.split, str):
            return Visit(layer, tokens, *self._fixed(tokens))
        if self.split == "full" or not self._sends_x:
            return Visit(layer, tokens, 0, 0)
        near = -(-tokens // PLAN_EVERY) * PLAN_EVERY
        if near not in self._plans:
            self._plans[near] = self.plan(near)
        plan = self._plans[near]
        return Visit(layer, tokens, min(tokens, plan.split), plan.chunk)

    @property
    def _sends_x(self) -> bool:
        """Whether X is stored: not where no split can use it."""
        return self.split > 0 if not isinstance(self.split, str) else self.split != "full" and self.shape.worth_it

    def start(self, model: Architecture, batch: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Empty, for a text; host memory for all of its rows must be there, though it is taken as the text grows.

        Raises:
            HostMemoryError: it is not.
            ValueError: the decoder is not the one that this cache was made for.
        """
        if (model, device, dtype) != (self.decoder.architecture, self.decoder.device, self.decoder.dtype):
            raise ValueError(f"{WHO}: decoder must be the one that the cache was made with, got another")
        self._failed = "a start() that failed"
        self._lanes.synchronize()  # copies for a step that did not come
        self._batch = batch
        if self._store is None or batch != self._store.batch or rows > self._store.tokens:
            self._forget()
            self._allocate(batch, rows)
        assert self._store is not None
        self._store.check(rows)
        if isinstance(self.split, str) and self._sends_x:
            _ = self.profile  # measured now, if it must be, not in the first step
        self._plans = {}
        self._stages[0].holds = self._stages[1].holds = None
        self._stages[0].free = self._stages[1].free = None
        self._stored: list[Mark] = [None] * model.layers
        self._rows = [0] * batch  # of each sequence, as far as the host has launched
        self._turn = self._next = 0
        self._input: Tensor | None = None
        self._transfer.forget()
        self.lengths.zero_()
        self._failed = None

    def _allocate(self, batch: int, rows: int) -> None:
        a = self.decoder.architecture
        x_planes = self._x.planes if self._sends_x else []
        planes = [*self._kv.planes, *x_planes]
        store = HostStore(planes, a.layers, batch, rows, self.pin, self.segment, self.host_limit)
        store.check(rows)  # before the device's memory is taken
        x_rows = rows if isinstance(self.split, str) else min(rows, self.split)
        self._stages = [
            Stage.make(
                rows, batch, a.kv_heads, a.head_dim, self.device, self._kv, self._x, x_rows if self._sends_x else 0
            )
            for _ in range(2)
        ]
        for buffer in [b for stage in self._stages for b in (stage.kv, *stage.x, *stage.inbox)]:
            self._lanes.keep(buffer, COPY)  # a cache may be dropped with copies under way
        self.lengths = torch.zeros(batch, device=self.device, dtype=torch.int32)
        self._store, self.version = store, self.version + 1
        self._transfer = Transfer(store, self._lanes, batch)
        if self._sends_x:
            for layer in range(a.layers):
                self._projection.prepare(layer)

    def _forget(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store, self._stages = None, []
        self.__dict__.pop("_transfer", None)  # which holds the store

    @contextlib.contextmanager
    def _whole(self) -> Iterator[HostStore]:
        """What fails within leaves the cache refusing, until it is started again."""
        if self._store is None or self._failed is not None:
            raise RuntimeError(f"{WHO}: start() must be called first, got {self._failed or 'a cache without a text'}")
        try:
            yield self._store
        except BaseException as why:
            self._failed = f"a failed step ({type(why).__name__}: {(str(why).splitlines() or [''])[0]})"
            raise

    def reserve(self, rows: int) -> None:
        """Room in host memory for `rows` rows a sequence; mostly it is there already, allocated ahead by a thread."""
        with self._whole() as store:
            store.reserve(rows)

    def append_input(self, layer: int, x: Tensor, rows: Rows) -> None:
        """What the layer's projections have as input, [N, H]; the layer's copies begin, or have begun."""
        with self._whole():
            if layer != self._next:
                raise RuntimeError(
                    f"{WHO}: layers must come in their order, each once a step, got {layer} instead of {self._next}"
                )
            self._lanes.end(COMPUTE)
            self._input = x if self._sends_x else None
            if rows.starts is None:
                self._check_step(rows)
                self._fetch_ahead(layer)
            else:
                self._stages[self._turn % 2].holds = None
                self._lanes.wait(COMPUTE, self._lanes.mark(COPY))  # what was on its way to the buffers

    def _check_step(self, rows: Rows) -> None:
        if rows.width != 1 or rows.tree_mask is not None or rows.q_lens is not None:
            raise ValueError(
                f"{WHO}: rows must be prompts or one new token of every sequence, got {rows.width} rows, "
                f"tree_mask {'given' if rows.tree_mask is not None else 'None'}"
            )
        most = self._stages[0].kv.shape[0]
        if max(self._rows) + 1 > most:
            raise ValueError(f"{WHO}: rows must be at most {most} a sequence, got {max(self._rows) + 1}")

    def _fetch_ahead(self, layer: int) -> None:
        """Have the copies of this layer under way, and those of the next one behind them, be it of the next step."""
        tokens, layers = max(self._rows), self.decoder.architecture.layers
        here, other = self._stages[self._turn % 2], self._stages[(self._turn + 1) % 2]
        now = self._visit(layer, tokens)
        if here.holds != now:
            here.free = self._lanes.mark(COMPUTE)
            self._fetch(here, now)
        other.free = self._lanes.mark(COMPUTE)  # attention of the layer before has been launched
        if layer + 1 < layers:
            self._fetch(other, self._visit(layer + 1, tokens))
        elif tokens + 2 <= other.kv.shape[0] and layers > 1:
            self._fetch(other, self._visit(0, tokens + 1))
        else:
            other.holds = None

    def _fetch(self, stage: Stage, visit: Visit) -> None:
        """Launch a layer's copies: X chunk by chunk, then K and V."""
        lanes, planes = self._lanes, len(self._kv.planes)
        stage.holds, stage.arrived = visit, []
        lanes.wait(COPY, stage.free)
        lanes.wait(COPY, self._stored[visit.layer])
        for first, last in visit.chunks:
            with lanes.on(COPY, f"X {visit.layer}", rows=last - first):
                self._transfer.send(stage.x, visit.layer, planes, first, last)
            stage.arrived.append(lanes.mark(COPY))
        if visit.split < visit.tokens:
            with lanes.on(COPY, f"KV {visit.layer}", rows=visit.tokens - visit.split):
                self._transfer.send(stage.inbox, visit.layer, 0, visit.split, visit.tokens)
        stage.arrived.append(lanes.mark(COPY))

    def append(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        """The rows from host memory are put in place, then the new ones; these go back to host memory."""
        with self._whole():
            stage = self._stages[self._turn % 2]
            if rows.starts is None:
                self._assemble(layer, stage)
            else:
                self._load_prompts(layer, stage, rows)
            self._lanes.begin(COMPUTE, f"append {layer}")
            append_rows(stage.k, stage.v, k, v, rows)
            self._lanes.end(COMPUTE)
            self._save(layer, torch.cat([k.flatten(1), v.flatten(1)], dim=1), rows)
            self._next, self._turn = layer + 1, self._turn + 1

    def _assemble(self, layer: int, stage: Stage) -> None:
        """Recompute each chunk as it arrives; then K and V that were sent."""
        lanes, visit = self._lanes, stage.holds
        assert visit is not None
        assert visit.layer == layer
        if visit.split:
            recompute = self._projection.of(layer, stage)
            for i, (first, last) in enumerate(visit.chunks):
                lanes.wait(COMPUTE, stage.arrived[i])
                with lanes.on(COMPUTE, f"recompute {layer}", rows=last - first):
                    recompute(first, self._x.decode([plane[first:last] for plane in stage.x]))
        lanes.wait(COMPUTE, stage.arrived[-1])
        if self._kv.packed and visit.split < visit.tokens:
            sent = slice(visit.split, visit.tokens)
            with lanes.on(COMPUTE, f"unpack {layer}", rows=visit.tokens - visit.split):
                stage.kv.flatten(2)[sent] = self._kv.decode([plane[sent] for plane in stage.inbox])

    def _load_prompts(self, layer: int, stage: Stage, rows: Rows) -> None:
        """Rows of earlier chunks of the prompts that go on in this pass; of no others."""
        flat = stage.kv.flatten(2)
        for b, (before, count) in enumerate(zip(self._rows, rows.counts, strict=True)):
            if before and count:
                planes = [self._transfer.gather(layer, i, b, before) for i in range(len(self._kv.planes))]
                flat[:before, b] = self._kv.decode([p.to(self.device, non_blocking=True) for p in planes])

    def _save(self, layer: int, kv: Tensor, rows: Rows) -> None:
        """New rows to host memory."""
        planes = self._kv.encode(kv)
        if self._input is not None:
            planes += self._x.encode(self._input)
        self._input = None
        after_compute = self._lanes.mark(COMPUTE)
        self._lanes.wait(STORE, after_compute)
        with self._lanes.on(STORE, f"store {layer}", rows=kv.shape[0]):
            if rows.starts is None:
                self._transfer.save_step(layer, planes, self._rows)
            else:
                self._transfer.save_prompts(layer, planes, self._rows, rows.counts)
        self._stored[layer] = self._lanes.mark(STORE)

    def layer(self, layer: int) -> Layer:
        """What attention reads; rows beyond the lengths hold anything."""
        with self._whole():
            stage = self._stages[(self._turn - 1) % 2]
            self._lanes.begin(COMPUTE, f"layer {layer}")
            return stage.k, stage.v, None

    def advance(self, after: Tensor) -> None:
        """All layers hold the new rows."""
        with self._whole():
            layers = self.decoder.architecture.layers
            if self._next != layers:
                raise RuntimeError(f"{WHO}: all {layers} layers must have the new rows, got {self._next}")
            self._lanes.end(COMPUTE)
            counts = self._transfer.finish()
            self._rows = [n + c for n, c in zip(self._rows, counts or [1] * self._batch, strict=True)]
            self._next = 0
            self.lengths.copy_(after)
