import dataclasses
import math
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastops.methods import _bmc_profile, _measured, bmc
from fastops.methods._bmc_model import SHARE
from fastops.models import Decoder, FullAttention, Rows
from fastops.ops.tree_build import tree_build
from fastops.reference import _attention
from fastops.testing import devices

per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)
per_setting = pytest.mark.parametrize("setting", bmc.SETTINGS)
COSTS = bmc.Costs(growth=1e-3, row_copied=2e-6, row_padded=1e-6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Measurements of the tests stay theirs."""
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))


@pytest.fixture
def known_costs(monkeypatch):
    """No measuring: COSTS."""
    monkeypatch.setattr(_bmc_profile, "measure", lambda shape, rows, width: COSTS)


def some_cache(setting="length_aware", batch=2, r=4, most=64, dtype=torch.float32, device="cpu", **options):
    cache = bmc.GrowingCache(r, setting=setting, **options)
    cache.start(_Sizes, batch, most, torch.device(device), dtype)
    return cache


class _Sizes:
    layers, heads, kv_heads, head_dim = 3, 4, 2, 16


def fill(cache, lengths, seed=0):
    """Rows for every layer, `lengths` more of each sequence; returns the keys that were given."""
    generator, given = torch.Generator().manual_seed(seed), []
    before = cache.lengths.tolist()
    cache.reserve(max(a + b for a, b in zip(before, lengths, strict=True)))
    rows = Rows.packed(before, lengths, cache.lengths.device)
    for layer in range(_Sizes.layers):
        k = torch.randn(sum(lengths), _Sizes.kv_heads, _Sizes.head_dim, generator=generator).to(cache.lengths.device)
        cache.append(layer, k, -k, rows)
        given.append(k)
    cache.advance(rows.after)
    return given


def rows_of(cache, layer):
    """The rows of each sequence, keys and values."""
    k, v, _ = cache.layer(layer)
    return [(k[b, :, :n].clone(), v[b, :, :n].clone()) for b, n in enumerate(cache.lengths.tolist())]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "opt"])
@per_device
@per_setting
def test_same_tokens_as_the_plain_cache(family, device, setting, hf, prompts, known_costs):
    decoder = Decoder.from_hf(hf(family), device=device)
    for texts in (prompts(4), prompts(4)[3:]):
        want = decoder.generate(texts, 24)
        for growth in bmc.GROWTHS:
            for r in (1, 7, 64, "auto", 1000) if family == "llama" else (7,):
                got = decoder.generate(texts, 24, **bmc.parts(setting, r, growth=growth))
                assert got == want, (growth, r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_caches(dtype, hf, prompts):
    """Where the attention is ours; torch's adds in an order that follows the capacity."""
    decoder = Decoder.from_hf(hf("llama"), dtype=dtype)
    assert decoder.generate(prompts(3), 20, **bmc.parts(r=3)) == decoder.generate(prompts(3), 20)


@pytest.mark.slow
def test_a_real_model(smol):
    model, tokens = smol
    decoder = Decoder.from_hf(model)
    texts = [tokens[a:b].tolist() for a, b in ((0, 40), (100, 117), (300, 301))]
    want = decoder.generate(texts, 32)
    for setting in bmc.SETTINGS:
        for r in (1, 7, "auto"):
            assert decoder.generate(texts, 32, **bmc.parts(setting, r)) == want, (setting, r)


def test_prompts_in_chunks(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    want = decoder.generate(prompts(4), 9)
    part = bmc.parts(r=2)
    assert decoder.generate(prompts(4), 9, chunk=5, **part) == want
    assert part["cache"].growths == 3  # 8 steps; two rows were there, and two come each time


@pytest.mark.gpu
def test_graphs_stay_valid_where_memory_is_mapped(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"), device="cuda")
    part = bmc.parts(r=3, growth="virtual")
    version = []
    for _ in decoder.stream(prompts(2), 40, eos=(), **part):
        version.append(part["cache"].version)
    assert len(set(version)) == 1
    assert part["cache"].growths > 3


@per_device
@per_setting
@pytest.mark.parametrize("growth", ["copy", "virtual"])
def test_growth_keeps_the_rows_and_nothing_else(device, setting, growth):
    cache = some_cache(setting, growth=growth, device=device.type)
    fill(cache, [5, 2])
    assert (cache.capacity, cache.growths) == (9, 0)
    before, version = rows_of(cache, 1), cache.version
    k, v, _ = cache.layer(1)
    if growth == "copy":
        k[1, :, 2:], v[1, :, 2:] = torch.nan, torch.nan  # behind the rows of a sequence: not to be moved
    cache.reserve(10)
    assert (cache.capacity, cache.growths) == (13, 1)
    for (k0, v0), (k1, v1) in zip(before, rows_of(cache, 1), strict=True):
        assert torch.equal(k0, k1)
        assert torch.equal(v0, v1)
    assert (cache.version > version) == (growth == "copy" or setting == "padded")
    if setting == "padded":
        k, v, _ = cache.layer(1)
        assert k.shape[2] == cache.capacity
        for b, n in enumerate(cache.lengths.tolist()):
            assert not k[b, :, n:].any()
            assert not v[b, :, n:].any()


def test_a_copy_every_step_and_none_at_all():
    every, none = some_cache(r=1), some_cache(r=64)
    for cache in (every, none):
        fill(cache, [5, 5])
        for step in range(20):
            fill(cache, [1, 1], step)
        assert cache.lengths.tolist() == [25, 25]
    assert (every.growths, none.growths) == (19, 0)
    assert none.capacity == 64  # the whole text, and no more
    row = 2 * 3 * 2 * 2 * 16 * 4
    assert every.memory == bmc.Memory(25 * row, 25 * row, 25 * row, sum(range(6, 25)) * row)
    assert none.memory == bmc.Memory(25 * row, 64 * row, 64 * row, 0)
    virtual = some_cache(r=8, growth="virtual")
    fill(virtual, [5, 5])
    assert virtual.memory == bmc.Memory(5 * row, 13 * row, 64 * row, 0)


def test_speculation_gets_room_for_its_rows():
    cache = some_cache(r=2, width=5)
    fill(cache, [4, 4])
    assert cache.capacity == 9
    cache.reserve(9)
    assert cache.growths == 0
    cache.reserve(10)
    assert cache.capacity == 10


def test_a_second_text_starts_empty(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    part = bmc.parts("padded", 5)
    first = decoder.generate(prompts(3), 12, **part)
    assert decoder.generate(prompts(4), 12, **part)[:3] == first
    assert decoder.generate(prompts(3), 12, **part) == first


def test_memory_runs_out_while_growing(monkeypatch):
    cache = some_cache(r=4)
    fill(cache, [7, 3])
    before = [rows_of(cache, layer) for layer in range(3)]
    grown, left = bmc.grown, [1]  # layers that there is memory for

    def short(*args):
        if not left[0]:
            raise torch.OutOfMemoryError("tried to allocate 1 MiB\nand more")
        left[0] -= 1
        return grown(*args)

    monkeypatch.setattr(bmc, "grown", short)
    with pytest.raises(MemoryError, match=r"^bmc: no memory to grow from 11 to 15 rows, 0\.0 MiB a layer"):
        cache.reserve(12)
    assert cache.capacity == 11
    for layer in range(3):
        for old, new in zip(before[layer], rows_of(cache, layer), strict=True):
            assert torch.equal(old[0], new[0])
    left[0] = 2  # of the layers, one has grown already
    cache.reserve(12)
    assert cache.capacity == 15
    fill(cache, [2, 2])
    assert [k.shape[2] for k in cache.k] == [15, 15, 15]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=0), 'r must be "auto" or at least 1, got 0'),
        (dict(r=-3), 'r must be "auto" or at least 1, got -3'),
        (dict(r="best"), "r must be \"auto\" or at least 1, got 'best'"),
        (dict(r=True), 'r must be "auto" or at least 1, got True'),
        (dict(setting="masked"), "setting must be one of padded, length_aware, got 'masked'"),
        (dict(growth="realloc"), "growth must be one of copy, virtual, off, got 'realloc'"),
        (dict(limit=0), "limit must be at least 1, got 0"),
        (dict(width=0), "width must be at least 1, got 0"),
        (dict(accepted=1.5), "accepted must be more than 0 and at most width, 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^bmc: {message}"):
        bmc.parts(**options)


def test_a_full_cache(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    with pytest.raises(ValueError, match=r"^bmc: limit must be at least the 49 rows of the text, got 20"):
        decoder.generate(prompts(4)[3:], 20, cache=bmc.GrowingCache(limit=20, growth="off"))
    cache = some_cache(most=12, growth="off")
    fill(cache, [10, 3])
    assert cache.capacity == 12
    with pytest.raises(ValueError, match=r"^bmc: the cache is full: it has 12 of at most 12 rows, 13 are needed"):
        cache.reserve(13)
    assert cache.lengths.tolist() == [10, 3]


def test_paged_caches_are_refused():
    table = torch.zeros(1, 1, dtype=torch.int32)
    cache = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16), table
    with pytest.raises(ValueError, match=r"^bmc: padded attention needs a contiguous cache, got a paged one"):
        bmc.PaddedAttention()(0, torch.zeros(1, 4, 16), cache, Rows.next(torch.zeros(1, dtype=torch.int32)), None)


def tree_rows(lengths, width, seed):
    generator = torch.Generator().manual_seed(seed)
    parent = torch.stack([
        torch.tensor([-1] + [int(torch.randint(i, (1,), generator=generator)) for i in range(1, width)])
        for _ in lengths
    ])  # fmt: skip
    mask, depth = tree_build(parent.int())
    return Rows.tree(torch.tensor(lengths, dtype=torch.int32), mask, depth)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["next", "tree"])
def test_padded_attention_is_attention(kind, window):
    lengths, heads, kv_heads, dim, capacity = [7, 0, 20], 6, 2, 32, 30
    rows = Rows.next(torch.tensor(lengths, dtype=torch.int32)) if kind == "next" else tree_rows(lengths, 9, 3)
    q = torch.randn(3 * rows.width, heads, dim)
    k, v = torch.randn(2, 3, kv_heads, capacity, dim)
    got = bmc.PaddedAttention()(0, q, (k, v, None), rows, window)
    want = FullAttention()(0, q, (k, v, None), rows, window)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    seen = _attention.visible(rows.after, None, rows.width, capacity, rows.tree_mask, window)
    assert torch.equal(bmc.visible(rows, capacity, window), seen)


def test_the_model_s_own_numbers():
    """Copies and padding bound by the same memory: 2048 new tokens, r near 64."""
    costs = bmc.Costs(growth=0.0, row_copied=2e-6, row_padded=1e-6)
    assert bmc.best_r(costs, 0, 2048) == 64
    assert bmc.overhead(costs, 64, 0, 2048) < min(bmc.overhead(costs, r, 0, 2048) for r in (1, 16, 256, 2048))
    assert bmc.best_r(bmc.Costs(1.0, 1e-6, 0.0), 100, 50) == 50  # padding is free: everything at once
    assert bmc.best_r(bmc.Costs(0.0, 0.0, 1e-6), 100, 50) == 1  # copies are


@settings(deadline=None)
@given(
    growth=st.floats(0, 1e-2),
    ratio=st.floats(0.01, 100),
    prompt=st.integers(0, 3000),
    new=st.integers(1, 1500),
    width=st.integers(1, 8),
    share=st.floats(0.2, 1),
)
def test_no_other_r_is_much_better(growth, ratio, prompt, new, width, share):
    """The formula against every r, played through; integer effects and tiles cost up to a quarter."""
    costs = bmc.Costs(growth, ratio * 1e-6, 1e-6)
    accepted = max(1.0, share * width)
    r = bmc.best_r(costs, prompt, new, width, accepted)
    assert width <= r <= max(width, new + width - 1)
    every = {n for n in range(width, new + width) if n < 40 or n % 16 == 0} | {new + width - 1}
    least = min(bmc.overhead(costs, n, prompt, new, width, accepted) for n in every)
    mine = bmc.overhead(costs, r, prompt, new, width, accepted)
    assert mine <= 1.25 * least + 40 * width * costs.row_padded * new / max(r, 1)


@settings(deadline=None)
@given(
    growth=st.floats(0, 1e-2),
    copied=st.floats(0, 1e-5),
    rows=st.integers(1, 10_000),
    step=st.floats(1e-4, 1e-1),
    extra=st.floats(0, 0.1),
)
def test_copies_take_a_hundredth_of_the_time_at_most(growth, copied, rows, step, extra):
    costs = bmc.Costs(growth, copied, 0.0)
    r = bmc.smallest_r(costs, rows, step, extra)
    seconds = growth + copied * rows + extra
    assert seconds <= SHARE * r * step * (1 + 1e-9)
    assume(r > 16)
    assert seconds > SHARE * (r - 16) * step * (1 - 1e-9)


def test_overhead_counts_what_the_cache_does():
    """Copies and padded rows of the schedule, against the cache itself."""
    copies, pads = bmc.Costs(0.0, 1.0, 0.0), bmc.Costs(0.0, 0.0, 1.0)
    for r in (1, 3, 16, 50):
        cache = some_cache(r=r, most=9 + 40)
        fill(cache, [9, 9])
        padded = 0
        for _ in range(40):
            fill(cache, [1, 1])
            padded += cache.capacity - int(cache.lengths[0])
        row = 2 * 3 * 2 * 2 * 16 * 4
        assert bmc.overhead(copies, r, 9, 40) == cache.memory.copied / row
        assert bmc.overhead(pads, r, 9, 40) == padded


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((COSTS, 0, 5, 5), "r must be at least 1, got 0"),
        ((COSTS, 3, 5, 5, 4), "r must be at least 4, got 3"),
        ((COSTS, 3, -1, 5), "prompt must be at least 0, got -1"),
        ((COSTS, 3, 5, 5, 2, 3.0), "accepted must be more than 0 and at most width, 2, got 3.0"),
    ],
)
def test_bad_arguments_of_the_model(args, message):
    with pytest.raises(ValueError, match=f"^bmc: {message}"):
        bmc.overhead(*args)


def test_a_step_takes_time():
    with pytest.raises(ValueError, match=r"^bmc: step must be more than 0 seconds, got 0"):
        bmc.smallest_r(COSTS, 5, 0.0)


@per_device
def test_costs_are_measured_once(device, monkeypatch):
    shape = _bmc_profile.Shape(2, 3, 4, 2, 16, device, torch.float32)
    costs = bmc.costs_of(shape, 100)
    assert min(costs.growth, costs.row_copied, costs.row_padded) >= 0
    assert costs.growth + 100 * costs.row_copied > 0
    monkeypatch.setattr(_bmc_profile, "measure", lambda *args: pytest.fail("measured again"))
    assert bmc.costs_of(shape, 128) == costs  # as of 65 to 128 rows
    with pytest.raises(pytest.fail.Exception, match="again"):
        bmc.costs_of(shape, 129)


def test_auto_follows_the_model(known_costs):
    cache = some_cache("padded", r="auto", most=1000)
    fill(cache, [300, 20])
    r = bmc.best_r(COSTS, 300, 700)
    assert cache.capacity == 300 + r
    cache = some_cache(r="auto", most=1000)
    fill(cache, [300, 20])
    assert cache.capacity == 300 + _bmc_profile.FIRST_ROWS
    cache._pace._steps.extend([0.02] * 5)
    cache._pace.extra = 0.05
    cache.reserve(300 + _bmc_profile.FIRST_ROWS)
    cache.reserve(300 + _bmc_profile.FIRST_ROWS + 1)
    held = 300 + _bmc_profile.FIRST_ROWS
    beside = 0.05 - COSTS.growth - held * COSTS.row_copied
    assert cache.capacity == held + bmc.smallest_r(COSTS, held, cache._pace.step, beside)


def test_the_first_chunk_of_a_long_text_is_a_share_of_it(known_costs):
    cache = some_cache(r="auto", most=6000)
    cache.reserve(5000)
    assert cache.capacity == 5000 + 5000 // 32


def test_what_is_remembered_survives_bad_files(tmp_path):
    made = []

    def measure():
        made.append(1)
        return COSTS

    def ask():
        return _measured.remembered("bmc", {"a": 1}, measure, dataclasses.asdict, lambda fields: bmc.Costs(**fields))

    assert [ask(), ask()] == [COSTS, COSTS]
    assert len(made) == 1
    (path,) = (tmp_path / "bmc").iterdir()
    good = path.read_text()
    for bad in (
        "{",
        "[]",
        "null",
        "",
        good.replace('"a"', '"b"'),
        good.replace("0.001", '"x"'),
        good.replace("0.001", "-1"),
    ):
        path.write_text(bad)
        assert ask() == COSTS
        assert path.read_text() == good
    assert len(made) == 8
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list((tmp_path / "bmc").iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert _measured.remembered("x", {}, lambda: 1.0, float, float) == 1.0


def test_the_pace_of_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_bmc_profile.time, "perf_counter", lambda: now[0])
    pace = _bmc_profile.Pace()
    assert pace.step is None
    for seconds, grows in ((0.0, False), (0.1, False), (0.1, True), (0.5, False), (0.1, False)):
        now[0] += seconds
        pace.tick(grows)
    assert math.isclose(pace.step, 0.1)
    assert math.isclose(pace.extra, 0.4)


def test_the_pace_leaves_out_what_others_do_between_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_bmc_profile.time, "perf_counter", lambda: now[0])
    pace = _bmc_profile.Pace()
    for grows in (False, False, True, False):
        pace.tick(grows)
        now[0] += 0.5 if grows else 0.1
        pace.done()
        now[0] += 3.0  # whoever reads the tokens takes their time
    assert math.isclose(pace.step, 0.1)
    assert math.isclose(pace.extra, 0.4)
