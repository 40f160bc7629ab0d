"""Whole models: one that transformers loads in 4 bits, and SmolLM2 on real text, computed and trained."""

import copy

import pytest
import torch
from torch import nn

from fastops.cli._measure import perplexity
from fastops.methods import Nf4Linear, accelerate_bitsandbytes, bitsandbytes_state_dict, quantize_model

transformers = pytest.importorskip("transformers")


def quiet(folder, **kwargs):
    transformers.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(str(folder), dtype=torch.float32, device_map="cpu", **kwargs)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_that_transformers_loads_in_4_bits(double_quant, tmp_path):
    pytest.importorskip("bitsandbytes")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attention_bias=True,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    theirs, done = quiet(tmp_path / "dense", quantization_config=options), []
    accelerate_bitsandbytes(theirs, progress=lambda *counts: done.append(counts))
    assert done[-1] == (14, 14)
    ids = torch.randint(128, (2, 9))
    with torch.no_grad():
        want = theirs(ids).logits
        again = copy.deepcopy(theirs)
        for name, layer in list(again.named_modules()):
            if name.endswith("_proj"):
                again.set_submodule(name, Nf4Linear.from_bitsandbytes(layer).to_linear())
        torch.testing.assert_close(again(ids).logits, want)
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert out.shape == (2, 14)

        # Its checkpoint loads into our layers, and theirs from ours into transformers.
        theirs.save_pretrained(tmp_path / "theirs")
        ours = quantize_model(dense, double_quant=double_quant)
        for buffer in (b for m in ours.modules() if isinstance(m, Nf4Linear) for b in m.buffers()):
            buffer.zero_()
        entries = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
        ours.load_state_dict(entries, strict=False)  # the tied head is in there once
        torch.testing.assert_close(ours(ids).logits, want)
        ours.config.quantization_config = options
        ours.save_pretrained(tmp_path / "ours", state_dict=bitsandbytes_state_dict(ours))
        torch.testing.assert_close(accelerate_bitsandbytes(quiet(tmp_path / "ours"))(ids).logits, want)


@pytest.mark.slow
def test_perplexity_is_that_of_the_dequantised_dense_weights(smol):
    model, ids = smol
    nf4 = quantize_model(copy.deepcopy(model))
    dense = copy.deepcopy(nf4)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, Nf4Linear):
            dense.set_submodule(name, layer.to_linear())
    got, want = (perplexity(m, ids[:512], window=256) for m in (nf4, dense))
    assert got == pytest.approx(want, rel=1e-3)
    assert 5 < want < 50  # it is a language model still


@pytest.mark.slow
def test_lora_on_a_4bit_model_learns_a_real_text(smol):
    """QLoRA as its users have it: bitsandbytes' layers, PEFT's adapters on them, our products below."""
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes.nn")
    model, ids = copy.deepcopy(smol[0]), smol[1]
    quantize_model(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Nf4Linear):
            model.set_submodule(name, layer.to_bitsandbytes())
    accelerate_bitsandbytes(model)
    model.is_loaded_in_4bit = True  # as transformers says of what it loads
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.requires_grad_(False), config).train()
    assert sum(isinstance(m, bnb.Linear4bit) for m in model.modules()) == 210
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 2e6
    text = ids[:256].reshape(4, 64)
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(6):
        loss = model(input_ids=text, labels=text).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert isinstance(next(m for m in model.modules() if isinstance(m, bnb.Linear4bit)), nn.Linear)
