import copy
import re

import pytest
import torch
from torch import nn

from fastops.models import Decoder, FullAttention, Rows, UpfrontCache
from fastops.models._linear import Dense, Nf4
from fastops.reference.nf4_dequant import nf4_dequant
from fastops.testing import available, devices

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "opt"]
per_family = pytest.mark.parametrize("family", FAMILIES)
per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)


def cloned(model, device):
    return copy.deepcopy(model).to(device)


@per_family
@per_device
def test_logits_equal_hugging_face_s(family, device, hf):
    model = cloned(hf(family), device)
    tokens = torch.randint(97, (3, 33), generator=torch.Generator().manual_seed(1)).to(device)
    want = model(tokens).logits
    got = Decoder.from_hf(model)(tokens)
    scale = model.double()(tokens).logits.abs().max()
    assert (got - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale


@per_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_no_worse_than_hugging_face_s(family, dtype, hf):
    tokens = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))
    truth = cloned(hf(family), "cpu").to(dtype).double()(tokens).logits  # the rounded weights, exactly
    theirs = cloned(hf(family), "cpu").to(dtype)(tokens).logits.double()
    ours = Decoder.from_hf(hf(family), dtype=dtype)(tokens).double()
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


@per_family
def test_nf4_weights_are_those_that_nf4_dequant_makes(family, hf):
    decoder = Decoder.from_hf(hf(family), weights="nf4", blocksize=32)
    dense = copy.deepcopy(decoder)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, Nf4):
            shape = (layer.out_features, layer.weights // layer.out_features)
            weight = nf4_dequant(layer.packed, layer.absmax, shape, torch.float32, layer.blocksize)
            dense.set_submodule(name, Dense(weight, layer.bias))
    assert sum(isinstance(m, Nf4) for m in decoder.modules()) == 4 * 3
    tokens = torch.randint(97, (2, 20))
    torch.testing.assert_close(decoder(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    assert decoder.step_bytes < Decoder.from_hf(hf(family)).step_bytes


def test_a_head_in_4_bits(hf):
    whole = Decoder.from_hf(hf("llama3"), weights="nf4")
    small = Decoder.from_hf(hf("llama3"), weights="nf4", nf4_head=True)
    assert isinstance(small.head, Nf4)
    assert torch.equal(whole.head.weight, whole.embedding)
    a, b = whole(torch.tensor([[5, 6]])), small(torch.tensor([[5, 6]]))
    assert 0 < (a - b).norm() < 0.3 * a.norm()


@per_family
def test_passes_of_any_size_give_the_same(family, hf):
    """A prompt at once, in chunks, token by token, and with rows that do not count."""
    decoder = Decoder.from_hf(hf(family))
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(2))
    want = decoder(tokens)
    for sizes in ([24], [1] * 24, [5, 1, 10, 8], [23, 1]):
        cache, done, got = UpfrontCache(), 0, []
        cache.start(decoder.architecture, 2, 24, decoder.device, decoder.dtype)
        for size in sizes:
            rows = Rows.next(cache.lengths) if size == 1 else Rows.packed([done] * 2, [size] * 2, decoder.device)
            part = tokens[:, done : done + size].reshape(-1)
            hidden = decoder.hidden(part, rows, cache, FullAttention())
            got.append(decoder.head(hidden).unflatten(0, (2, size)))
            done += size
            assert cache.lengths.tolist() == [done, done]
        torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_tree_of_rows(family, hf):
    """Each path of a draft tree has the logits of the same tokens in a row."""
    from fastops import tree_build

    decoder = Decoder.from_hf(hf(family))
    prefix, nodes = torch.randint(97, (1, 9)), torch.randint(97, (1, 6))
    parent = torch.tensor([[-1, 0, 0, 1, 2, 4]], dtype=torch.int32)
    mask, depth = tree_build(parent)
    cache = UpfrontCache()
    cache.start(decoder.architecture, 1, 20, decoder.device, decoder.dtype)
    decoder.hidden(prefix[0], Rows.packed([0], [9], decoder.device), cache, FullAttention())
    rows = Rows.tree(cache.lengths.clone(), mask, depth)
    got = decoder.head(decoder.hidden(nodes[0], rows, cache, FullAttention()))
    assert cache.lengths.tolist() == [15]
    for path in ([0, 1, 3], [0, 2, 4, 5]):
        want = decoder(torch.cat([prefix, nodes[:, path]], dim=1))[0, 9:]
        torch.testing.assert_close(got[path], want, rtol=1e-4, atol=1e-4)


def test_compiled_glue(hf):
    model = hf("qwen3")
    tokens = torch.randint(97, (2, 20))
    plain, fused = Decoder.from_hf(model), Decoder.from_hf(model, compiled=True)
    torch.testing.assert_close(fused(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def test_the_source_stays_as_it_is(hf):
    model = copy.deepcopy(hf("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = Decoder.from_hf(model, weights="nf4", dtype=torch.bfloat16)
    decoder(torch.tensor([[1, 2, 3]]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert decoder.dtype == torch.bfloat16


class TestFolders:
    def test_a_saved_model(self, hf, tmp_path):
        hf("qwen2").save_pretrained(tmp_path)
        decoder = Decoder.from_pretrained(tmp_path, dtype=torch.float32)
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        torch.testing.assert_close(decoder(tokens), Decoder.from_hf(hf("qwen2"))(tokens))
        assert decoder.tokenizer is None
        assert Decoder.from_pretrained(tmp_path, weights="nf4").dtype == torch.bfloat16

    def test_missing_tensors(self, hf, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        hf("llama").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = safetensors.load_file(file)
        for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
            del tensors[name]
        safetensors.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"path must hold every tensor .* got none for .*up_proj.weight, model.norm"
        ):
            Decoder.from_pretrained(tmp_path)

    def test_no_such_path(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path must be a model folder or a GGUF file, got .*nowhere"):
            Decoder.from_pretrained(tmp_path / "nowhere")

    def test_a_family_is_refused_before_its_weights_are_read(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        transformers.MixtralConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model must be one of llama, .*, got mixtral"):
            Decoder.from_pretrained(tmp_path)


REFUSED = {
    "family": ("GPT2", {}, "model must be one of llama, mistral, qwen2, qwen3, opt, got gpt2"),
    "experts": (
        "Qwen3Moe", dict(num_experts=4), "model must be one of llama, mistral, qwen2, qwen3, opt, got qwen3_moe",
    ),
    "alibi": ("Bloom", {}, "model must be one of llama, mistral, qwen2, qwen3, opt, got bloom"),
    "rope": (
        "Llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "model must have a rope_type of default, linear, llama3, yarn, got 'dynamic'",
    ),
    "activation": ("Llama", dict(hidden_act="gelu"), "model must have the activation silu, got 'gelu'"),
    "post_norm": (
        "OPT", dict(do_layer_norm_before=False),
        "model must have its norms before the attention (do_layer_norm_before), got False",
    ),
    "projection": (
        "OPT", dict(word_embed_proj_dim=32, hidden_size=64),
        "model must have embeddings as wide as its layers (word_embed_proj_dim), got 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    transformers = pytest.importorskip("transformers")
    kind, changes, message = REFUSED[name]

    class Model(nn.Module):
        config = getattr(transformers, f"{kind}Config")(**changes)

    with pytest.raises(ValueError, match=f"^Decoder: {re.escape(message)}$"):
        Decoder.from_hf(Model())


def test_refuses_other_weights(hf):
    with pytest.raises(ValueError, match="weights must be one of dense, nf4, got 'int8'"):
        Decoder.from_hf(hf("llama"), weights="int8")
    quantised = copy.deepcopy(hf("llama"))
    quantised.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"linear layers must be dense nn.Linear, got Identity"):
        Decoder.from_hf(quantised)
    with pytest.raises(ValueError, match="model must hold values, got one on the meta device"):
        Decoder.from_hf(copy.deepcopy(hf("llama")).to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_dense_layers(dtype, rows):
    """As functional.linear, also copied, moved and cast."""
    weight, bias, x = torch.randn(33, 70), torch.randn(33), torch.randn(rows, 70)
    layer = Dense(weight.to(dtype), bias.to(dtype))
    assert torch.equal(layer.weight, weight.to(dtype))
    assert layer.weight_bytes == 33 * 70 * dtype.itemsize
    truth = nn.functional.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    for same in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to("cpu")):
        got = same(x.to(dtype))
        assert got.dtype == dtype
        assert (got.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()
    wide = copy.deepcopy(layer).double()
    assert torch.equal(wide.weight, weight.to(dtype).double())


def test_memory(hf):
    """Of a model with tied weights: where a kernel wants panels the head is laid out apart."""
    copies = 2 if ("cpu", torch.device("cpu")) in available("dense_linear") else 1
    for kind, per_weight in (("dense", 4), ("nf4", 0.5 + 4 / 64)):
        linear, whole = Decoder.from_hf(hf("llama3"), weights=kind).memory
        weights = 3 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
        assert linear == weights * per_weight
        embedding, norms = 4 * 97 * 64, 4 * (2 * 3 + 1) * 64
        assert whole == linear + copies * embedding + norms + 4 * 8  # and 8 rotary frequencies
