import copy
import functools
import re

import pytest
import torch

from fastops.models import Decoder, OneToken, Sampling, UpfrontCache
from fastops.testing import devices

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "opt"]
per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)


@pytest.mark.parametrize("family", FAMILIES)
@per_device
def test_greedy_tokens_equal_hugging_face_s(family, device, hf, prompts, greedy, same_tokens):
    model, ids = copy.deepcopy(hf(family)).to(device), prompts(6)
    want = greedy(model, ids, 40)
    decoder = Decoder.from_hf(model)
    same = functools.partial(same_tokens, model, ids, want)
    same(decoder.generate(ids, 40, eos=()))
    same_tokens(model, ids[3:4], want[3:4], decoder.generate(ids[3:4], 40, eos=()))
    for chunk in (1, 7, 31):
        same(decoder.generate(ids, 40, eos=(), chunk=chunk))
    if device.type == "cuda":
        same(decoder.generate(ids, 40, eos=(), graphs=False))


def test_a_tensor_of_prompts(hf):
    decoder = Decoder.from_hf(hf("llama"))
    ids = torch.randint(97, (3, 5))
    assert decoder.generate(ids, 6, eos=()) == decoder.generate(ids.tolist(), 6, eos=())


def test_nothing_to_do(hf):
    decoder = Decoder.from_hf(hf("llama"))
    assert decoder.generate([], 5) == []
    assert decoder.generate([[1, 2], [3]], 0) == [[], []]


def test_eos_ends_a_sequence_and_no_other(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    ids = prompts(4)
    whole = decoder.generate(ids, 30, eos=())
    end = whole[1][11]
    got = decoder.generate(ids, 30, eos=end)
    for tokens, full in zip(got, whole, strict=True):
        assert tokens == (full[: full.index(end)] if end in full else full)
    assert len(got[1]) <= 11
    both = (whole[0][3], end)
    assert decoder.generate(ids, 30, eos=both)[0] == whole[0][: min(whole[0].index(t) for t in both if t in whole[0])]


def test_the_model_s_own_eos_is_the_default(hf):
    decoder = Decoder.from_hf(hf("llama"))
    token = decoder.generate([[7, 8]], 8, eos=())[0][4]
    ending = Decoder.from_hf(hf("llama", eos_token_id=token))
    assert ending.architecture.eos == (token,)
    assert token not in ending.generate([[7, 8]], 8)[0]


def test_streams_as_it_generates(hf, prompts):
    decoder = Decoder.from_hf(hf("llama"))
    ids = prompts(3)
    whole = decoder.generate(ids, 12, eos=())
    steps = list(decoder.stream(ids, 12, eos=()))
    assert len(steps) == 12
    assert all(len(step) == 3 and all(len(new) == 1 for new in step) for step in steps)
    assert [[step[b][0] for step in steps] for b in range(3)] == whole
    few = decoder.stream(ids, 1000 - 900, eos=())
    assert [next(few)[0], next(few)[0]] == [[t] for t in whole[0][:2]]  # a reader may leave at any time
    few.close()
    assert decoder.generate(ids, 12, eos=()) == whole


def test_a_cache_may_be_used_again(hf, prompts):
    decoder, cache = Decoder.from_hf(hf("llama")), UpfrontCache(capacity=60)
    first = decoder.generate(prompts(3), 20, eos=(), cache=cache)
    memory = cache.k[0].data_ptr()
    other = decoder.generate(prompts(3, seed=1), 20, eos=(), cache=cache)
    assert cache.k[0].data_ptr() == memory
    assert decoder.generate(prompts(3), 20, eos=(), cache=cache) == first != other
    with pytest.raises(ValueError, match=r"cache must have a capacity of at least 62 rows, got 60"):
        decoder.generate([[1] * 43], 20, cache=cache)


class Tokenizer:
    """A letter a token."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(c) - 32 for c in text]})

    def decode(self, tokens, **options):
        return "".join(chr(t + 32) for t in tokens)


def test_text(hf):
    decoder = Decoder.from_hf(hf("llama"), tokenizer=Tokenizer())
    whole = decoder.generate("Hello", 30, eos=())
    assert isinstance(whole, str)
    assert len(whole) == 30
    assert decoder.generate(["Hello", "x"], 30, eos=())[0] == whole
    assert decoder.generate([[ord(c) - 32 for c in "Hello"]], 30, eos=()) == [[ord(c) - 32 for c in whole]]


def test_stop_strings(hf):
    decoder = Decoder.from_hf(hf("llama"), tokenizer=Tokenizer())
    whole = decoder.generate("Hello", 30, eos=())
    stop = whole[9:12]
    first = whole.index(stop)
    assert decoder.generate("Hello", 30, eos=(), stop=stop) == whole[:first]
    assert decoder.generate("Hello", 30, eos=(), stop=["never there", stop]) == whole[:first]
    tokens = decoder.generate([decoder.tokenizer("Hello").input_ids], 30, eos=(), stop=stop)[0]
    assert decoder.tokenizer.decode(tokens) == whole[: first + 3]  # token ids keep what completed it


def test_progress_shows_and_changes_nothing(hf, capsys):
    decoder = Decoder.from_hf(hf("llama"))
    assert decoder.generate([[1, 2]], 5, eos=(), progress=True) == decoder.generate([[1, 2]], 5, eos=())


def test_decodings_plug_in(hf, prompts):
    """A decoding that emits what it likes, in pieces of several tokens."""

    class Pairs(OneToken):
        width = 2

        def step(self, text):
            first = super().step(text).clone()
            return torch.cat([first, super().step(text)], dim=1)

    decoder = Decoder.from_hf(hf("llama"))
    assert decoder.generate(prompts(3), 21, eos=(), decoding=Pairs()) == decoder.generate(prompts(3), 21, eos=())


BAD = {
    "empty prompt": (dict(prompts=[[1], []]), "prompts[1] must have at least 1 token, got none"),
    "no ids": (dict(prompts=[1, 2]), "prompts must be a list of prompts, each a list of token ids, got a list of ids"),
    "text": (dict(prompts="Hello"), "prompts must be token ids for a decoder without a tokenizer, got text"),
    "vocabulary": (dict(prompts=[[1, 97]]), "prompts[0] must hold token ids from 0 to 96, got 97"),
    "negative": (dict(prompts=[[3], [-1]]), "prompts[1] must hold token ids from 0 to 96, got -1"),
    "long prompt": (
        dict(prompts=[[1] * 157]), "prompts[0] must leave room for 5 new tokens in 160 positions, got 157 tokens",
    ),
    "max_new_tokens": (dict(max_new_tokens=-1), "max_new_tokens must be 0 or more, got -1"),
    "chunk": (dict(chunk=0), "chunk must be at least 1, got 0"),
    "temperature": (dict(temperature=-0.5), "temperature must be 0 or more, got -0.5"),
    "top_k": (dict(temperature=1.0, top_k=0), "top_k must be at least 1, got 0"),
    "top_p": (dict(temperature=1.0, top_p=0.0), "top_p must be greater than 0 and at most 1, got 0.0"),
    "stop": (dict(stop="x"), "stop must be empty for a decoder without a tokenizer, got ['x']"),
    "empty stop": (dict(stop=["", "x"]), "stop must hold strings of at least one character, got ['', 'x']"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_rejects(name, call, hf):
    changes, message = BAD[name]
    decoder = Decoder.from_hf(hf("llama"))
    with pytest.raises(ValueError, match=f"^Decoder: {re.escape(message)}$"):
        getattr(decoder, call)(**{"prompts": [[1, 2]], "max_new_tokens": 5, **changes})


def test_the_last_position_is_used(hf):
    decoder = Decoder.from_hf(hf("llama"))
    assert len(decoder.generate([[1] * 156], 5, eos=())[0]) == 5


class TestSampling:
    def test_seeds(self, hf, prompts):
        decoder = Decoder.from_hf(hf("llama"))
        options = dict(eos=(), temperature=2.0)
        a, b, c = (decoder.generate(prompts(3), 20, seed=s, **options) for s in (1, 1, 2))
        assert a == b != c

    @per_device
    def test_the_distribution(self, device):
        logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -9.0], device=device)
        sampling = Sampling(temperature=1.5, seed=3)
        drawn = sampling(logits.expand(200_000, 5), sampling.generator(device))
        got = torch.bincount(drawn, minlength=5) / 200_000
        want = (logits / 1.5).softmax(0)
        assert (got - want).abs().max() < 5 * (0.25 / 200_000) ** 0.5

    def test_top_k_and_top_p(self):
        logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -9.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
        keep = Sampling(temperature=1.0, top_k=2).filtered(logits).isfinite()
        assert keep.tolist() == [[True, False, False, True, False], [True, True, True, True, True]]  # ties stay
        keep = Sampling(temperature=1.0, top_p=0.7).filtered(logits).isfinite()  # 0.66 and 0.24 of the first row
        assert keep.tolist() == [[True, False, False, True, False], [False, False, True, False, False]]
        keep = Sampling(temperature=1.0, top_p=1e-9).filtered(logits).isfinite()
        assert keep.sum(-1).tolist() == [1, 1]
        both = Sampling(temperature=1.0, top_k=3, top_p=0.99).filtered(logits).isfinite()
        assert both[0].tolist() == [True, True, False, True, False]

    def test_greedy_needs_no_numbers(self):
        sampling = Sampling()
        assert sampling.generator(torch.device("cpu")) is None
        assert sampling(torch.tensor([[0.0, 3.0, 1.0]])).tolist() == [1]

    def test_a_low_temperature_is_greedy(self, hf, prompts):
        decoder = Decoder.from_hf(hf("llama"))
        want = decoder.generate(prompts(2), 20, eos=())
        assert decoder.generate(prompts(2), 20, eos=(), temperature=1e-4) == want
        assert decoder.generate(prompts(2), 20, eos=(), temperature=5.0, top_k=1) == want


@pytest.mark.slow
@per_device
def test_smollm2_gives_hugging_face_s_tokens(device, smol, greedy, same_tokens):
    """256 tokens in fp32: alone, and ragged with three others."""
    model, text = smol
    ids = [text[at : at + n].tolist() for at, n in ((0, 64), (100, 7), (300, 128), (500, 33))]
    model = model if device.type == "cpu" else copy.deepcopy(model).to(device)
    want = greedy(model, ids, 256)
    decoder = Decoder.from_hf(model)
    same_tokens(model, ids[:1], want[:1], decoder.generate(ids[:1], 256, eos=()))
    same_tokens(model, ids, want, decoder.generate(ids, 256, eos=()))
