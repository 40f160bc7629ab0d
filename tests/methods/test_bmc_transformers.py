import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask  # noqa: E402

from fastops.methods import _bmc_profile, bmc  # noqa: E402
from fastops.methods._bmc_transformers import attention, mask  # noqa: E402
from fastops.testing import devices  # noqa: E402

per_device = pytest.mark.parametrize("device", devices(), ids=lambda d: d.type)
per_setting = pytest.mark.parametrize("setting", bmc.SETTINGS)
per_attention = pytest.mark.parametrize(
    ("setting", "name"),
    [("length_aware", "sdpa"), *((s, n) for s in bmc.SETTINGS for n in ("eager", "fastops"))],
)


@pytest.fixture(autouse=True)
def known_costs(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_bmc_profile, "measure", lambda shape, rows, width: bmc.Costs(1e-3, 2e-6, 1e-6))


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert bmc.register_attention() == "fastops"


@pytest.fixture
def model(hf):
    """(family, device, attention) -> a small model with that attention."""

    def make(family="llama", device="cpu", name="sdpa"):
        made = copy.deepcopy(hf(family)).to(device)
        made.generation_config.eos_token_id = None
        made.set_attn_implementation(name)
        return made

    return make


def generate(model, ids, mask=None, new=12, **options):
    ids = torch.tensor(ids, device=model.device)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask, device=model.device)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    ).tolist()  # fmt: skip


PADDED = [[0] * 6 + [5], [3, 8, 1, 40, 22, 9, 60], [0] * 3 + [7, 7, 2, 90]]
MASK = [[0] * 6 + [1], [1] * 7, [0] * 3 + [1] * 4]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@per_device
@per_attention
def test_same_tokens(family, device, name, setting, model):
    m = model(family, device, name)
    plain = model(family, device)
    for ids, seen in (([[5, 9, 2, 30]], None), (PADDED, MASK)):
        want = generate(plain, ids, seen)
        for r in (1, 5, 64, "auto"):
            cache = bmc.transformers_cache(m, r, setting=setting)
            assert generate(m, ids, seen, past_key_values=cache) == want, r
            assert cache.get_seq_length() == len(ids[0]) + 11
            held = cache.layers[0].keys.shape[2]
            assert held == cache.layers[-1].keys.shape[2] >= cache.get_seq_length()


@pytest.mark.slow
@per_setting
def test_a_real_model(smol, setting):
    model, tokens = smol
    model.set_attn_implementation("sdpa")
    ids = [[0] * 23 + tokens[:17].tolist(), tokens[100:140].tolist()]
    seen = [[0] * 23 + [1] * 17, [1] * 40]
    want = generate(model, ids, seen, 24)
    try:
        model.set_attn_implementation("fastops")
        assert generate(model, ids, seen, 24, past_key_values=bmc.transformers_cache(model, 7, setting=setting)) == want
        assert generate(model, ids, seen, 24) == want  # with transformers' own cache
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_our_attention_with_their_caches(family, kind, model):
    ours, plain = model(family, name="fastops"), model(family)
    for ids, seen in (([[5, 9, 2, 30]], None), (PADDED, MASK)):
        assert generate(ours, ids, seen, cache_implementation=kind) == generate(plain, ids, seen)


@per_setting
def test_beams_assistants_and_cut_texts(setting, model):
    m = model(name="fastops")
    for options in (dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(prompt_lookup_num_tokens=3)):
        ids = [[5, 9, 2, 30, 5, 9, 2]]
        cache = bmc.transformers_cache(m, 3, setting=setting)
        assert generate(m, ids, past_key_values=cache, **options) == generate(model(), ids, **options), options


def test_a_text_goes_on(model):
    """The cache of one text under the next tokens of it, and empty again."""
    m = model(name="fastops")
    cache = bmc.transformers_cache(m, 4)
    first = generate(m, [[5, 9, 2]], past_key_values=cache)
    more = [first[0] + [11, 12]]
    assert generate(m, more, past_key_values=cache) == generate(m, more)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(m, [[5, 9, 2]], past_key_values=cache) == first


def test_chunks_of_a_prompt(model):
    m, plain = model(name="fastops"), model()
    ids = torch.randint(97, (2, 70))
    want = plain(ids).logits
    for setting in bmc.SETTINGS:
        cache, got = bmc.transformers_cache(m, 2, setting=setting), []
        for part in ids.split([3, 1, 66], dim=1):
            got.append(m(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)


def test_a_limit(model):
    m = model()
    cache = bmc.transformers_cache(m, 4, limit=10)
    assert cache.get_max_length() == 10
    with pytest.raises(ValueError, match=r"^bmc: the cache is full: it has at most 10 rows, 11 are needed"):
        generate(m, [[5, 9, 2]], past_key_values=cache)
    assert cache.get_seq_length() == 10
    assert cache.layers[0].keys.shape[2] == 10
    assert bmc.transformers_cache(m).get_max_length() == -1


def test_memory_runs_out_while_growing(model, monkeypatch):
    from fastops.methods import _bmc_transformers

    m = model()
    cache = bmc.transformers_cache(m, 4)
    generate(m, [[5, 9, 2]], new=3, past_key_values=cache)
    before = [layer.keys[:, :, :5].clone() for layer in cache.layers]

    def short(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] no memory\nmore")

    grown = _bmc_transformers.grown
    monkeypatch.setattr(_bmc_transformers, "grown", short)
    with pytest.raises(MemoryError, match=r"^bmc: no memory to grow from 7 to 9 rows; the cache still holds its rows"):
        generate(m, [[5, 9, 2, 1, 1, 1, 1, 1]], new=3, past_key_values=cache)
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :5], old)
    monkeypatch.setattr(_bmc_transformers, "grown", grown)
    again = bmc.transformers_cache(m, 4)
    assert generate(m, [[5, 9, 2]], new=9, past_key_values=again) == generate(m, [[5, 9, 2]], new=9)


@pytest.mark.parametrize("options", [dict(r=0), dict(setting="x"), dict(limit=0)], ids=str)
def test_bad_options(options, model):
    with pytest.raises(ValueError, match=rf"^bmc: {next(iter(options))} must be"):
        bmc.transformers_cache(model(), **options)


def test_padded_caches_need_masks(model):
    with pytest.raises(ValueError, match=r"^bmc: the attention of model must mask .*: one of eager, fastops, got sdpa"):
        bmc.transformers_cache(model(name="sdpa"), setting="padded")


def test_masks():
    every = torch.ones(2, 9, dtype=torch.bool)
    padded = every.clone()
    padded[0, :3] = False
    sizes = dict(batch_size=2, q_length=4, kv_length=9, q_offset=5)
    assert mask(**sizes) is None
    assert mask(**sizes, attention_mask=every) is None
    assert mask(**sizes, local_size=10) is None
    assert mask(batch_size=2, q_length=1, kv_length=9, q_offset=8, attention_mask=every) is None
    for options in (
        dict(sizes, attention_mask=padded),
        dict(sizes, allow_is_causal_skip=False),
        dict(sizes, local_size=4, mask_function=chunked_causal_mask_function(4, torch.zeros(2, dtype=int))),
        dict(sizes, kv_length=12, attention_mask=every),  # rows behind the text
        dict(sizes, q_offset=torch.tensor(5)),
    ):
        got = mask(**options)
        want = sdpa_mask(**{**options, "allow_is_causal_skip": False})
        assert torch.equal(got, want)
        assert got.shape == (2, 1, 4, options["kv_length"])


class _Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def inputs(rows=5, keys=9, grad=False):
    torch.manual_seed(0)
    return [torch.randn(2, h, n, 16, requires_grad=grad) for h, n in ((4, rows), (2, keys), (2, keys))]


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_attention_is_theirs(rows):
    q, k, v = inputs(rows, rows + 3)
    seen = sdpa_mask(batch_size=2, q_length=rows, kv_length=rows + 3, q_offset=3, allow_is_causal_skip=False)
    want, _ = sdpa_attention_forward(_Layer(), q, k, v, seen, scaling=0.3)
    torch.testing.assert_close(attention(_Layer(), q, k, v, None, scaling=0.3)[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(_Layer(), q, k, v, seen, scaling=0.3)[0], want, rtol=1e-5, atol=1e-5)
    a_head = seen.expand(2, 4, rows, rows + 3).contiguous()
    torch.testing.assert_close(attention(_Layer(), q, k, v, a_head, scaling=0.3)[0], want, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_are_zero():
    q, k, v = inputs()
    seen = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    seen[1, :, :2] = False
    out = attention(_Layer(), q, k, v, seen)[0]
    assert not out[1, :2].any()
    assert out.isfinite().all()
    assert out[1, 2:].any()


def test_training_goes_to_theirs():
    for seen in (None, sdpa_mask(batch_size=2, q_length=5, kv_length=9, q_offset=4, allow_is_causal_skip=False)):
        ours, theirs = inputs(grad=True), inputs(grad=True)
        attention(_Layer(), *ours, seen)[0].square().sum().backward()
        full = sdpa_mask(batch_size=2, q_length=5, kv_length=9, q_offset=4, allow_is_causal_skip=False)
        sdpa_attention_forward(_Layer(), *theirs, full)[0].square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_encoders_go_to_theirs():
    q, k, v = inputs(9, 9)
    want, _ = sdpa_attention_forward(_Layer(), q, k, v, None, is_causal=False)
    torch.testing.assert_close(attention(_Layer(), q, k, v, None, is_causal=False)[0], want)
