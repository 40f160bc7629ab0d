"""The offloaded cache gives the resident cache's tokens, whatever is recomputed; and refuses what it cannot do."""

import functools
import itertools
import json
import operator
import re

import pytest
import torch

from fastops.methods import OffloadedCache, _kvpr_store, kvpr
from fastops.methods._kvpr_profile import Profile
from fastops.methods.kvpr import HostMemoryError
from fastops.models import Decoder, FullAttention, OneToken, Rows, UpfrontCache
from fastops.testing import devices

PROFILE = Profile({1 << 12: 5e8, 1 << 20: 2e9}, 1e10, 1e10)  # arithmetic enough that a split pays
SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=160)
GATED = dict(SIZES, intermediate_size=96)
MODELS = {
    "opt": ("OPT", dict(SIZES, ffn_dim=96, word_embed_proj_dim=64)),
    "llama": ("Llama", dict(GATED, attention_bias=True)),
    "gqa": ("Llama", dict(GATED, num_key_value_heads=2)),
    "qwen3": ("Qwen3", dict(GATED, num_key_value_heads=4, head_dim=32)),
}
per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)


@pytest.fixture(scope="module")
def decoder():
    """(name, device, changes) -> a small decoder of random weights, large enough that its tokens differ."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(name="llama", device="cpu", weights="dense", **changes):
        key = (name, str(device), weights, *sorted(changes.items()))
        if key not in made:
            kind, sizes = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
            )
            for parameter in model.eval().requires_grad_(False).parameters():
                parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05)
            made[key] = Decoder.from_hf(model, device=device, weights=weights, compiled=False)
        return made[key]

    return make


def prompts(lengths=(1, 13, 2, 30, 30, 21), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


RAGGED, ALIKE, ALONE = prompts(), prompts((30,) * 3, seed=1), prompts((21,), seed=2)


@functools.cache
def _resident(model, ids, new):
    return model.generate([list(i) for i in ids], new, eos=())


def resident(model, ids, new):
    """The tokens with a resident cache."""
    return _resident(model, tuple(map(tuple, ids)), new)


@pytest.fixture(autouse=True)
def one_thread():
    """Where others use the cores, two threads that wait for each other are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SPLITS = {
    "0": (0, {}),
    "1": (1, {}),
    "some": (17, {}),
    "all": (10_000, {}),
    "some in chunks": (23, dict(chunk=4 * 6 * 64 * 4)),
    "full": ("full", {}),
    "single": ("single", {}),
    "pipeline": ("pipeline", {}),
    "auto": ("auto", {}),
}


def cache_of(model, split="auto", **options):
    return OffloadedCache(model, split, **{"profile": PROFILE, "segment": 8, **options})


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
@per_device
def test_tokens_are_the_resident_cache_s(name, device, split, decoder):
    """Ragged, of equal lengths, alone; prompts whole and in chunks; one cache for all of them."""
    model = decoder(name, device)
    split, options = SPLITS[split]
    cache = cache_of(model, split, **options)
    for ids, chunks in ((RAGGED, (2048, 31)), (ALIKE, (2048, 7)), (ALONE, (4,))):
        want = resident(model, ids, 16)
        for chunk in chunks:
            assert model.generate(ids, 16, eos=(), cache=cache, chunk=chunk, graphs=True) == want


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("split", ["0", "some in chunks", "pipeline"])
def test_any_number_of_layers_takes_turns_in_two_buffers(layers, split, decoder):
    model, (split, options) = decoder("opt", num_hidden_layers=layers), SPLITS[split]
    want = resident(model, prompts(), 16)
    assert model.generate(prompts(), 16, eos=(), cache=cache_of(model, split, **options)) == want


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_nf4_weights_are_expanded_to_recompute(blocksize, decoder):
    """Blocks that end where W_K begins, and such that do not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(GATED, hidden_size=96, intermediate_size=96) if blocksize == 4096 else GATED
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval().requires_grad_(False)
    model = Decoder.from_hf(hf, weights="nf4", blocksize=blocksize)
    want = model.generate(prompts(), 16, eos=())
    for split in (0, 9, 1000):
        assert model.generate(prompts(), 16, eos=(), cache=cache_of(model, split)) == want


def test_what_is_recomputed_is_what_was_stored(decoder, monkeypatch):
    """The split decides which rows are sent as X and which as K and V."""
    model = decoder("llama")
    cache = cache_of(model, 9, timeline=True)
    model.generate([[1] * 20], 4, eos=(), cache=cache)
    spans = cache.timeline.spans()
    last = {s["name"]: s["rows"] for s in spans if s["lane"] == "copy"}
    assert last == {"X 0": 9, "X 1": 9, "X 2": 9, "KV 0": 13, "KV 1": 13, "KV 2": 13}
    assert [s["name"] for s in spans if s["lane"] == "copy"] == [
        f"{w} {j}" for _ in range(3) for j in range(3) for w in ("X", "KV")
    ]
    assert {s["rows"] for s in spans if s["name"].startswith("recompute")} == {9}
    assert [s["name"] for s in spans if s["lane"] == "store"][-3:] == ["store 0", "store 1", "store 2"]
    calls = []
    monkeypatch.setattr(kvpr.Projection, "of", lambda *a: calls.append(a))
    model.generate([[1] * 20], 4, eos=(), cache=cache_of(model, "full"))
    assert not calls


def test_x_is_stored_only_where_it_can_help(decoder):
    ids = prompts((20, 20))
    held = {}
    for name, model in (("llama", decoder("llama")), ("gqa", decoder("gqa"))):
        for split, compress in (("full", None), ("auto", None), ("auto", "x"), ("auto", "all"), ("auto", "kv")):
            cache = cache_of(model, split, compress=compress, segment=64)
            model.generate(ids, 4, eos=(), cache=cache)
            held[name, split, compress] = cache.host_bytes / (3 * 2 * 23 * 4)  # elements a token
    assert held["llama", "full", None] == 2 * 64
    assert held["llama", "auto", None] == 3 * 64
    assert held["llama", "auto", "kv"] == 2 * 64 * 5 / 32 * 0.9  # no X; nibbles and a scale for 64
    assert held["gqa", "auto", None] == 2 * 32
    assert held["gqa", "auto", "x"] == 2 * 32 + 64 * 4.5 / 32
    assert held["llama", "auto", "all"] == pytest.approx(held["llama", "full", None] * 1.5 * 4.5 / 32)


@pytest.mark.parametrize("compress", ["kv", "x", "all"])
@pytest.mark.parametrize("split", [0, 12, 1000])
@per_device
def test_a_compressed_store_is_near(compress, split, device, decoder):
    """Logits of the next token from 4-bit rows stay near; those of what is not compressed are exact."""
    model = decoder("opt", device)
    exact = _next_logits(model, cache_of(model, split))
    got = _next_logits(model, cache_of(model, split, compress=compress))
    distance = float((got - exact).norm() / exact.norm())
    untouched = (compress == "x" and split == 0) or (compress == "kv" and split == 1000)
    rounding = 1e-5 if device.type == "cpu" else 1e-3
    assert distance < rounding if untouched else 1e-4 < distance < 0.1
    want = model.generate(prompts(), 8, eos=())
    got = model.generate(prompts(), 8, eos=(), cache=cache_of(model, split, compress=compress))
    assert [len(t) for t in got] == [len(t) for t in want]
    assert [t[0] for t in got] == [t[0] for t in want]  # made from the prompt alone, which was never packed


@torch.no_grad()
def _next_logits(model, cache, strict=False):
    """Of a token after prompts."""
    ids = prompts((24, 24, 24))
    cache.start(model.architecture, 3, 30, model.device, model.dtype)
    cache.reserve(24)
    packed = torch.tensor(functools.reduce(operator.iadd, ids, []), device=model.device)
    model.hidden(packed, Rows.packed([0] * 3, [24] * 3, model.device), cache, FullAttention())
    cache.reserve(25)
    token = torch.tensor([5, 6, 7], device=model.device)
    warm = model.hidden(token, Rows.next(cache.lengths), cache, FullAttention())  # loads kernels
    cache.reserve(26)
    if strict:
        assert all(s.is_pinned() for plane in cache._store._segments for layer in plane for s in layer)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = model.hidden(token, Rows.next(cache.lengths), cache, FullAttention())
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode("default")
    return model.head(torch.cat([warm, hidden]))


@per_device
def test_the_timeline_is_a_chrome_trace(device, decoder, tmp_path):
    model = decoder("llama", device)
    cache = cache_of(model, 12, chunk=4 * 64 * 4, timeline=True)
    model.generate([[3] * 20], 5, eos=(), cache=cache)
    cache.timeline.save(tmp_path / "trace.json")
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    lanes = {lane: sorted((e["ts"], e["dur"], e["name"]) for e in events if e["tid"] == lane) for lane in range(3)}
    for spans in lanes.values():
        assert spans
        assert all(duration >= 0 for _, duration, _ in spans)
        for (start, duration, _), (following, _, _) in itertools.pairwise(spans):
            assert start + duration <= following + (1e-3 if device.type == "cpu" else 2.0)  # the device's clock
    names = [name for _, _, name in lanes[1]]
    assert names.count("recompute 0") == 3 * 4  # chunks of four rows, in each of four steps
    assert {"append 2", "layer 2"} <= set(names)
    cache.timeline.clear()
    assert not cache.timeline.spans()


def test_a_store_is_used_again_and_grows_as_the_text_does(decoder):
    model = decoder("llama")
    cache = cache_of(model, "auto")
    first = model.generate(prompts(), 20, eos=(), cache=cache)
    version, held = cache.version, cache.host_bytes
    assert model.generate(prompts(), 20, eos=(), cache=cache) == first
    assert model.generate(prompts((5,) * 6), 9, eos=(), cache=cache) == resident(model, prompts((5,) * 6), 9)
    assert (cache.version, cache.host_bytes) == (version, held)
    longer = cache_of(model, "auto")
    stream = model.stream([[1, 2]], 100, eos=(), cache=longer)
    next(stream)
    early = longer.host_bytes
    for _ in stream:
        pass
    assert longer.host_bytes > 4 * early
    assert model.generate([[1, 2]], 100, eos=()) == model.generate([[1, 2]], 100, eos=(), cache=longer)


def test_a_text_left_early_leaves_nothing_behind(decoder):
    model = decoder("llama")
    cache = cache_of(model, 9)
    want = model.generate(prompts(), 12, eos=())
    stream = model.stream(prompts(seed=5), 12, eos=(), cache=cache)
    for _ in range(3):
        next(stream)
    stream.close()
    assert model.generate(prompts(), 12, eos=(), cache=cache) == want


def test_a_cache_may_ask_for_the_inputs_of_projections(decoder):
    """Of each layer, before its rows; what the decoder's own product makes of them are those rows."""
    model, seen = decoder("opt"), []

    class Asking(UpfrontCache):
        def append_input(self, layer, x, rows):
            seen.append((layer, x))

        def append(self, layer, k, v, rows):
            asked, x = seen[-1]
            assert asked == layer
            made = model.blocks[layer].qkv(x).unflatten(-1, (3, *k.shape[1:]))
            assert torch.equal(made[:, 1], k)
            assert torch.equal(made[:, 2], v)
            super().append(layer, k, v, rows)

    assert model.generate(prompts(), 5, eos=(), cache=Asking()) == model.generate(prompts(), 5, eos=())
    assert [layer for layer, _ in seen] == [0, 1, 2] * 5


def test_the_plan_is_told(decoder):
    model = decoder("llama")
    cache = cache_of(model, "pipeline")
    model.generate(prompts((8, 8)), 3, eos=(), cache=cache)
    plan = cache.plan(100)
    assert plan.schedule == "pipeline"
    assert 0 < plan.split <= 100
    assert plan.seconds > 0
    assert cache_of_plan(model, 40).schedule == "single"
    assert cache_of_plan(model, 0).schedule == "full"


def cache_of_plan(model, split):
    cache = cache_of(model, split)
    cache.start(model.architecture, 2, 120, model.device, model.dtype)
    return cache.plan(100)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(compress="all")], ids=["plain", "packed"])
def test_a_step_never_waits_for_the_device(options, dtype, decoder):
    """Nor does it take memory that is not pinned; and its logits are near those of a resident cache."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(GATED, hidden_size=256, num_attention_heads=4, intermediate_size=256)
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval().requires_grad_(False)
    model = Decoder.from_hf(hf, device="cuda", dtype=dtype, compiled=False)
    want = _next_logits(model, UpfrontCache())
    got = _next_logits(model, cache_of(model, 12, chunk=3 * 256 * 2 * 4, **options), strict=True)
    assert float((got - want).norm() / want.norm()) < (0.1 if options else 2e-2)


class TestFaults:
    def test_short_host_memory_is_told_before_anything_is_computed(self, decoder):
        model = decoder("llama")
        cache = cache_of(model, 9, host_limit=100_000)
        with pytest.raises(HostMemoryError, match=r"host memory must have \d\.\d+ MB for \d+ tokens of 6 sequences"):
            model.generate(prompts(), 24, eos=(), cache=cache)
        ids = prompts((5,))
        assert model.generate(ids, 4, eos=(), cache=cache) == model.generate(ids, 4, eos=())

    def test_memory_refused_in_mid_text(self, decoder, monkeypatch):
        model = decoder("llama")
        cache = cache_of(model, 9)
        stream = model.stream([[1, 2]], 100, eos=(), cache=cache)
        next(stream)

        def refuse(*args):
            raise RuntimeError("refused")

        monkeypatch.setattr(_kvpr_store, "empty_host", refuse)
        with pytest.raises(HostMemoryError, match="got an error: refused"):
            list(stream)
        with pytest.raises(RuntimeError, match=r"start\(\) must be called first, got a failed step \(HostMemoryError"):
            cache.reserve(3)
        monkeypatch.undo()
        assert model.generate([[1, 2]], 50, eos=(), cache=cache) == model.generate([[1, 2]], 50, eos=())

    @pytest.mark.parametrize("where", ["recompute", "send", "save", "attention"])
    def test_an_error_in_mid_step(self, where, decoder, monkeypatch):
        """The error comes out as it is; the cache refuses the text, and is as good as new for the next."""
        model = decoder("llama")
        cache, want = cache_of(model, 9), model.generate(prompts(), 12, eos=())
        place = {
            "recompute": ("fastops.methods._kvpr_device.kv_recompute"),
            "send": ("fastops.methods._kvpr_transfer.Transfer.send"),
            "save": ("fastops.methods._kvpr_transfer.Transfer.save_step"),
            "attention": ("fastops.models.decoder.decode_attn"),
        }[where]
        stream = model.stream(prompts(), 12, eos=(), cache=cache)
        next(stream)
        next(stream)

        def broken(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(place, broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            next(stream)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="must"), torch.no_grad():
            model.hidden(torch.zeros(6, dtype=torch.int64), Rows.next(cache.lengths), cache, lambda *a: a[1])
        assert model.generate(prompts(), 12, eos=(), cache=cache) == want

    def test_a_cache_without_a_text(self, decoder):
        with pytest.raises(RuntimeError, match=r"start\(\) must be called first, got a cache without a text"):
            cache_of(decoder("llama")).reserve(1)

    def test_draft_trees_are_refused(self, decoder):
        model = decoder("llama")
        cache = cache_of(model, 9)
        cache.start(model.architecture, 2, 20, model.device, model.dtype)
        mask, depth = torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)
        with pytest.raises(ValueError, match="rows must be prompts or one new token of every sequence, got 2 rows"):
            cache.append_input(0, torch.zeros(4, 64), Rows.tree(cache.lengths, mask, depth))

    def test_more_rows_than_were_announced(self, decoder):
        model = decoder("llama")
        cache = cache_of(model, 9)
        cache.start(model.architecture, 1, 1, model.device, model.dtype)
        cache.reserve(1)
        with torch.no_grad():
            model.hidden(torch.tensor([1]), Rows.next(cache.lengths), cache, lambda layer, q, *a: q)
        with pytest.raises(ValueError, match="rows must be at most 1 a sequence, got 2"):
            cache.append_input(0, torch.zeros(1, 64), Rows.next(cache.lengths))

    def test_another_decoder(self, decoder):
        cache = cache_of(decoder("llama"))
        with pytest.raises(ValueError, match="decoder must be the one that the cache was made with, got another"):
            decoder("opt").generate([[1]], 2, cache=cache)

    def test_decodings_of_several_rows(self, decoder):
        """Two single steps in one are single steps."""

        class Pairs(OneToken):
            width = 2

            def step(self, text):
                first = super().step(text).clone()
                return torch.cat([first, super().step(text)], dim=1)

        model = decoder("llama")
        want = model.generate(prompts(), 21, eos=())
        assert model.generate(prompts(), 21, eos=(), decoding=Pairs(), cache=cache_of(model, 9)) == want


BAD = {
    "split": (dict(split=-1), "split must be one of auto, full, single, pipeline, column, or 0 or more, got -1"),
    "word": (dict(split="half"), "split must be one of auto, full, single, pipeline, column, or 0 or more, got 'half'"),
    "compress": (dict(compress=True), "compress must be one of None, 'kv', 'x', 'all', got True"),
    "chunk": (dict(chunk=0), "chunk must be at least 1, got 0"),
    "segment": (dict(segment=0), "segment must be at least 1, got 0"),
    "pin": (dict(pin=True), "pin must be False without a CUDA device, got True"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects(name, decoder):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=f"^OffloadedCache: {re.escape(message)}$"):
        OffloadedCache(decoder("llama"), **changes)


@pytest.mark.slow
def test_a_real_model(smol):
    """SmolLM2-135M has groups of three heads: all is sent, unless one asks for a split."""
    model, text = smol
    decoder, ids = Decoder.from_hf(model), [text[:40].tolist(), text[100:120].tolist()]
    want = decoder.generate(ids, 10, eos=())
    for split in ("auto", 30):
        assert decoder.generate(ids, 10, eos=(), cache=cache_of(decoder, split)) == want
