import copy

import pytest
import torch

# A Hugging Face model of each family that is small and has every feature of it: ratios of heads, windows, biases.
SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=160)
GATED = dict(SIZES, intermediate_size=96, num_key_value_heads=2)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", GATED),
    "llama3": ("Llama", dict(GATED, rope_parameters=LLAMA3_ROPE, attention_bias=True, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(GATED, head_dim=24, sliding_window=5)),
    "qwen2": ("Qwen2", dict(GATED, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(GATED, head_dim=32)),
    "opt": ("OPT", dict(SIZES, ffn_dim=96, word_embed_proj_dim=64)),
}


@pytest.fixture(scope="session")
def hf():
    """(name, config changes) -> the model, with weights large enough that its tokens differ."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(name="llama", **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            kind, sizes = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05)
            made[key] = model
        return made[key]

    return make


@pytest.fixture(scope="session")
def greedy():
    """(model, prompts of any lengths, new tokens) -> what transformers' generate() makes of each prompt alone."""

    def tokens(model, prompts, new):
        out = []
        model.generation_config.eos_token_id = None  # nothing ends a sequence early
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            text = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            out.append(text[0, len(prompt) :].tolist())
        return out

    return tokens


@pytest.fixture(scope="session")
def same_tokens():
    """(model, prompts, its tokens, ours): equal up to where the model itself sees two tokens as equally likely.

    On a GPU another order of sums decides between logits that differ by their rounding errors.
    """

    def check(model, prompts, want, got):
        for prompt, theirs, ours in zip(prompts, want, got, strict=True):
            assert len(theirs) == len(ours)
            for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
                if a != b:
                    ids = torch.tensor([prompt + theirs[:i]], device=model.device)
                    logits = copy.deepcopy(model).double()(ids).logits[0, -1]
                    assert float(logits[a] - logits[b]) < 1e-5 * float(logits.abs().max()), i
                    assert model.device.type == "cuda"
                    break

    return check


@pytest.fixture
def prompts():
    """(number, vocabulary) -> ragged prompts of 1, 2, ... random tokens and a longer one."""

    def make(count=4, vocabulary=97, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = [1, 13, 2, 30, 7, 21][:count]
        return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]

    return make
