"""Every access to memory that two lanes share is ordered by a mark and a wait: proven without a GPU.

On a CPU the lanes are one thread, which hides a missing wait. So here each lane has a vector clock, that marks carry
and waits merge; every operator's reads and writes are noted by byte range; and of two accesses of which one writes, on
different lanes, the second must know of the first. Taking any of the runtime's waits away must be noticed.
"""

import contextlib
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastops.methods import OffloadedCache, kvpr
from fastops.methods._kvpr_lanes import COMPUTE, COPY, LANES, STORE, Lanes
from fastops.models import Decoder, FullAttention, Rows

SIZES = dict(vocab_size=97, hidden_size=64, num_attention_heads=4, max_position_embeddings=160, intermediate_size=96)


class Mark(NamedTuple):
    """What a lane had seen."""

    lane: str
    clocks: dict[str, int]

    def synchronize(self):
        """The host waits; what prompts leave is synchronised below."""


class Clocks(Lanes):
    """Lanes that know what each has seen of the others."""

    def __init__(self, device, timeline=False):
        super().__init__(device, timeline)
        self.current, self.seen = COMPUTE, {lane: dict.fromkeys(LANES, 0) for lane in LANES}
        self.deaf = set()  # (waiting lane, lane of the mark) whose waits are taken away
        self.kept = set()

    @contextlib.contextmanager
    def on(self, lane, name, **about):
        before, self.current = self.current, lane
        yield
        self.current = before

    def mark(self, lane):
        return Mark(lane, dict(self.seen[lane]))

    def wait(self, lane, mark):
        if mark is not None and (lane, mark.lane) not in self.deaf:
            for other, clock in mark.clocks.items():
                self.seen[lane][other] = max(self.seen[lane][other], clock)

    def keep(self, tensor, lane):
        self.kept.add(tensor.untyped_storage().data_ptr())

    def synchronize(self):
        for lane in LANES:
            for other in LANES:
                self.seen[lane][other] = self.seen[other][other]


class Watch(TorchDispatchMode):
    """Notes what every operator reads and writes, and finds pairs that nothing orders."""

    def __init__(self, lanes):
        super().__init__()
        self.lanes, self.accesses, self.alive, self.races = lanes, defaultdict(list), [], []
        self.made_by = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema, lane = func._schema, self.lanes.current
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        outputs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.alive += outputs  # so that no address serves twice
        if view:
            return out
        self.lanes.seen[lane][lane] += 1
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            value = given.get(argument.name)
            if writes and schema.name.endswith("kv_recompute"):  # of the caches, these rows alone
                value = value[:, :, given["start"] : given["start"] + given["x"].shape[1]]
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.layout == torch.strided:
                    self._note(lane, tensor, writes, str(func))
        for tensor in outputs:
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in self.accesses:  # no in-place result
                self.made_by[tensor.untyped_storage().data_ptr()] = lane
                self._note(lane, tensor, True, str(func))
        return out

    def _note(self, lane, tensor, writes, name):
        storage, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
        first = tensor.storage_offset() * size
        last = first + (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * size
        seen = self.lanes.seen[lane]
        for begin, end, other, clock, wrote, what in self.accesses[storage]:
            if other != lane and begin < last and first < end and (writes or wrote) and seen[other] < clock:
                self.races.append(f"{lane} {name} after {other} {what}")
        self.accesses[storage].append((first, last, lane, self.lanes.seen[lane][lane], writes, name))
        if lane == STORE and not writes and self.made_by.get(storage) == COMPUTE:
            assert storage in self.lanes.kept, f"{name} reads memory that the allocator may give away"


@pytest.fixture(scope="module")
def decoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=3)
    return Decoder.from_hf(transformers.LlamaForCausalLM(config).eval().requires_grad_(False), compiled=False)


@torch.no_grad()
def races(decoder, monkeypatch, lengths, split, deaf=(), **options):
    """What is not ordered in a few steps after prompts of these lengths."""
    monkeypatch.setattr(kvpr, "Lanes", Clocks)
    cache = OffloadedCache(decoder, split, segment=8, **options)
    lanes, batch = cache._lanes, len(lengths)
    cache.start(decoder.architecture, batch, max(lengths) + 6, decoder.device, decoder.dtype)
    cache.reserve(max(lengths))
    device = decoder.device
    prompt = torch.randint(97, (sum(lengths),))
    decoder.hidden(prompt, Rows.packed([0] * batch, lengths, device), cache, FullAttention())
    cache.reserve(max(lengths) + 6)
    lanes.synchronize()  # as finish() does after prompts
    lanes.deaf = set(deaf)
    with Watch(lanes) as watch:
        for _ in range(5):
            rows = Rows.next(cache.lengths.clone())
            decoder.hidden(torch.zeros(batch, dtype=torch.int64), rows, cache, FullAttention())
    return watch.races


WAYS = {
    "full": (0, {}), "single": (9, {}), "chunks": (11, dict(chunk=4 * 3 * 64 * 4)), "all": (1000, {}),
    "kv": (0, dict(compress="kv")), "x": (9, dict(compress="x")), "packed": (11, dict(compress="all", chunk=512)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [[16, 16, 16], [16, 3, 9]], ids=["alike", "ragged"])
def test_everything_shared_is_ordered(way, lengths, decoder, monkeypatch):
    split, options = WAYS[way]
    found = races(decoder, monkeypatch, lengths, split, **options)
    if lengths != [16, 16, 16]:
        # Rows beyond a short sequence are sent before its new one is stored: never read, so their order is nothing.
        found = [race for race in found if not race.startswith("store")]
    assert not found


@pytest.mark.parametrize(
    ("waiting", "marked"),
    [(COMPUTE, COPY), (COPY, COMPUTE), (COPY, STORE), (STORE, COMPUTE)],
    ids=["until arrived", "until free", "until stored", "until computed"],
)
@pytest.mark.parametrize("way", ["full", "chunks", "packed"])
def test_a_missing_wait_is_noticed(waiting, marked, way, decoder, monkeypatch):
    split, options = WAYS[way]
    assert races(decoder, monkeypatch, [16, 16, 16], split, deaf=[(waiting, marked)], **options)
