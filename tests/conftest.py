import copy

import pytest
import torch

import fastops.testing
from fastops.cli import smollm2

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


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark what runs on a GPU, skip what this machine cannot run, and say why."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, torch.device) and value.type == "cuda" for value in parameters):
            item.add_marker(pytest.mark.gpu)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpu") and devices < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multi_gpu") and devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))


@pytest.fixture(autouse=True)
def forget_compiled(request):
    """Tests that compile share code objects, and torch.compile keeps only so many variants of one."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    with fastops.testing.poison():
        yield


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "scalar"])
def cpu_isa(request):
    """Every instruction set of the CPU kernels that this machine has."""
    extension = fastops._extension.C
    if extension is None:
        pytest.skip("fastops._C was not built")
    before = extension.cpu_isa()
    if extension.limit_cpu_isa(request.param) != request.param:
        extension.limit_cpu_isa(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    extension.limit_cpu_isa(before)


@pytest.fixture(scope="session")
def smol():
    """(SmolLM2-135M-Instruct in fp32, the tokens of a real text: chapters of the Python language reference)."""
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where others use the cores, two threads that wait for each other are many times slower
    try:
        model, tokenizer = smollm2.load(smollm2.gguf_file(), torch.device("cpu"), torch.float32)
        yield model, tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0]
    except smollm2.Missing as missing:
        pytest.skip(str(missing))
    finally:
        torch.set_num_threads(threads)


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
