"""The column schedule: weights in host memory, sent once a step for several batches; the tokens of a plain decoder."""

import pytest
import torch

from fastops.methods import OffloadedWeights, _kvpr_weights, generate_column, kvpr
from fastops.methods._kvpr_plan import Rates, Shape, column_seconds
from fastops.methods._kvpr_profile import Profile
from fastops.methods.kvpr import HostMemoryError, OffloadedCache
from fastops.models import Decoder
from fastops.testing import devices

PROFILE = Profile({1 << 12: 5e8, 1 << 20: 2e9}, 1e10, 1e10)  # arithmetic enough that a split pays
per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)


@pytest.fixture(autouse=True)
def one_thread():
    """Where others use the cores, two threads that wait for each other are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches_of(prompts):
    """A ragged batch, one prompt alone, and two of a length."""
    return [prompts(4), prompts(4, seed=1)[3:], [p[:9] for p in prompts(4, seed=2) if len(p) > 9]]


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3", "opt"])
@per_device
def test_tokens_are_those_of_each_batch_alone(family, device, hf, prompts):
    decoder = Decoder.from_hf(hf(family), device=device)
    batches = batches_of(prompts)
    want = [decoder.generate(batch, 12, eos=()) for batch in batches]
    weights = OffloadedWeights(decoder)
    for split in ("column", 0, 5, 1000):
        got = generate_column(weights, batches, 12, split=split, eos=(), profile=PROFILE, segment=8)
        assert got == want, split


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_number_of_layers_takes_turns_in_two_buffers(layers, hf, prompts):
    decoder = Decoder.from_hf(hf("llama", num_hidden_layers=layers))
    batches = batches_of(prompts)
    want = [decoder.generate(batch, 9, eos=()) for batch in batches]
    assert generate_column(OffloadedWeights(decoder), batches, 9, split=7, eos=()) == want


def test_samples_and_ends_are_those_of_each_batch_alone(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    batches, how = batches_of(prompts), dict(temperature=0.9, top_k=20, seed=3)
    weights = OffloadedWeights(decoder)
    want = [decoder.generate(batch, 12, eos=(), **how) for batch in batches]
    assert generate_column(weights, batches, 12, split=0, eos=(), **how) == want
    end = want[0][0][4]
    want = [decoder.generate(batch, 12, eos=end, **how) for batch in batches]
    assert generate_column(weights, batches, 12, split=0, eos=end, **how) == want
    assert len(want[0][0]) < 12


def test_a_layer_s_weights_are_sent_once_a_step(hf, prompts, monkeypatch):
    decoder = Decoder.from_hf(hf("llama"))
    weights, sent = OffloadedWeights(decoder), []
    fetch = weights._fetch
    monkeypatch.setattr(weights, "_fetch", lambda staging, layer: (sent.append(layer), fetch(staging, layer)))
    generate_column(weights, batches_of(prompts), 4, split=0, eos=())
    assert sent == [0, *[1, 2, 0] * 4]  # a pass of the prompts and three steps; the last is for a step that may come
    layer = sum(getattr(decoder.blocks[0], name).weight_bytes for name in _kvpr_weights.PRODUCTS)
    assert weights.layer_bytes == layer


def test_the_device_holds_two_layers(hf):
    decoder = Decoder.from_hf(hf("llama", num_hidden_layers=4))
    weights = OffloadedWeights(decoder)
    held = sum(b.numel() for block in weights.decoder.blocks for b in block.buffers() if b.dim() == 2)
    assert held == 0
    assert len(weights._staging) == 2


def test_the_split_is_where_link_and_arithmetic_meet(hf, prompts):
    decoder = Decoder.from_hf(hf("opt"))
    cache = OffloadedCache(decoder, "column", weights=5e4, profile=PROFILE)
    cache.start(decoder.architecture, 4, 100, decoder.device, decoder.dtype)
    plan, rates = cache.plan(90), cache.rates(90)
    times = [column_seconds(cache.shape, rates, 90, split, 5e4) for split in range(91)]
    assert plan.seconds == min(times)
    assert times[plan.split] == min(times)
    heavier = OffloadedCache(decoder, "column", weights=5e6, profile=PROFILE)
    heavier.start(decoder.architecture, 4, 100, decoder.device, decoder.dtype)
    assert heavier.plan(90).split >= plan.split  # the longer the link is busy, the more is recomputed for nothing
    assert column_seconds(Shape(1, 8, 8), Rates(1.0, 1.0), 3, 0, 7.0) == 3 * 32 + 7


def test_nothing_to_do(hf):
    weights = OffloadedWeights(Decoder.from_hf(hf("llama")))
    assert generate_column(weights, [], 5) == []
    assert generate_column(weights, [[], [[1, 2]]], 0) == [[], [[]]]
    (none, some) = generate_column(weights, [[], [[1, 2]]], 3, split=0, eos=())
    assert none == []
    assert len(some[0]) == 3


def test_what_is_refused(hf, monkeypatch):
    model = hf("llama")
    with pytest.raises(ValueError, match=r"^OffloadedCache: decoder must have dense weights .*, got NF4"):
        OffloadedWeights(Decoder.from_hf(model, weights="nf4"))
    with pytest.raises(HostMemoryError, match=r"must have 0\.\d+ MB for the weights, got 0\.001 MB \(host_limit\)"):
        OffloadedWeights(Decoder.from_hf(model), host_limit=1000)
    monkeypatch.setattr(_kvpr_weights, "available_memory", lambda: (5 << 20, "the machine"))
    with pytest.raises(HostMemoryError, match=r"for the weights, got 0\.000 MB \(the machine\)"):
        OffloadedWeights(Decoder.from_hf(model))
    monkeypatch.undo()
    weights = OffloadedWeights(Decoder.from_hf(model))
    with pytest.raises(ValueError, match=r"prompts\[0\] must have at least 1 token, got none"):
        generate_column(weights, [[[1]], [[]]], 3)
    with pytest.raises(ValueError, match="split must be one of"):
        generate_column(weights, [[[1]]], 3, split="rows")


def test_a_failed_pass_leaves_weights_that_serve_again(hf, prompts, monkeypatch):
    decoder = Decoder.from_hf(hf("llama"))
    weights, batches = OffloadedWeights(decoder), batches_of(prompts)
    with monkeypatch.context() as patch:
        patch.setattr(kvpr, "append_rows", lambda *args: (_ for _ in ()).throw(RuntimeError("device error")))
        with pytest.raises(RuntimeError, match="device error"):
            generate_column(weights, batches, 5, split=0)
    want = [decoder.generate(batch, 5, eos=()) for batch in batches]
    assert generate_column(weights, batches, 5, split=0, eos=()) == want


@pytest.mark.gpu
def test_weights_may_come_from_a_decoder_that_the_gpu_never_held(hf, prompts):
    decoder = Decoder.from_hf(hf("llama3"))
    batches = batches_of(prompts)
    want = [decoder.to("cuda").generate(batch, 9, eos=()) for batch in batches]
    weights = OffloadedWeights(decoder.cpu(), "cuda")
    assert generate_column(weights, batches, 9, split=5, eos=()) == want
