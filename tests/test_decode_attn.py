import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import fastops
from fastops.reference import decode_attn as reference
from fastops.reference import tree_build
from fastops.testing import available, non_contiguous, trusted

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
WHERE = available("decode_attn")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), WHERE, ids=[f"{backend}-{device.type}" for backend, device in WHERE]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def find(name, device=CPU, dtype=torch.float32):
    return next((s.args, s.kwargs) for s in reference.samples(device, dtype) if s.name == name)


def make(lengths=(40, 9, 64), hq=4, hkv=2, d=64, rows=1, *, device="cpu", dtype=torch.float32, **kwargs):
    """((q, k_cache, v_cache, lengths), keyword arguments)."""
    block, tree = kwargs.pop("block", 0), kwargs.pop("tree", False)
    seed = kwargs.pop("seed", 0)
    args, table = reference.random_inputs(
        tuple(lengths), hq, hkv, d, rows, torch.device(device), dtype, block=block, seed=seed
    )
    if table is not None:
        kwargs["block_table"] = table
    if tree:
        kwargs["tree_mask"] = tree_build.tree_build(tree_build.random_parents(len(lengths), rows, seed))[0].to(device)
    return args, kwargs


def run(sample, backend=None):
    args, kwargs = sample
    return fastops.decode_attn(*args, **kwargs, backend=backend)


def error(got, sample):
    args, kwargs = sample
    return reference.error(got, *args, **kwargs)


def equal(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def interpreted(backend, device):
    """Triton's interpreter takes seconds for what a kernel does in microseconds: sweeps are thinned out there."""
    return backend == "triton" and device.type == "cpu"


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_matches_the_truth(name, dtype, poison):
    for backend, device in available("decode_attn"):
        if not trusted(backend, device, dtype):
            continue
        sample = find(name, device, dtype)
        out, lse = run(sample, backend)
        q = sample[0][0]
        assert (out.dtype, out.device, out.shape) == (dtype, q.device, q.shape)
        assert (lse.dtype, lse.device, lse.shape) == (torch.float32, q.device, q.shape[:3])
        assert out.is_contiguous()
        assert error((out, lse), sample) <= reference.BUDGET, backend


@per_dtype
def test_every_instruction_set(dtype, cpu_isa, poison):
    if "cpu" not in fastops._registry.registry["decode_attn"].available(CPU):
        pytest.skip("no compiled CPU kernel")
    for s in reference.samples(CPU, dtype):
        sample = (s.args, s.kwargs)
        assert error(run(sample, "cpu"), sample) <= reference.BUDGET, s.name


@per_backend
def test_every_length(backend, device, poison):
    for first in (0, 120) if interpreted(backend, device) else range(0, 140, 20):
        sample = make(range(first, first + 20), 4, 2, device=device, dtype=torch.float16)
        assert error(run(sample, backend), sample) <= reference.BUDGET, first


@per_backend
def test_every_number_of_rows(backend, device, poison):
    for rows in (1, 5, 17, 64) if interpreted(backend, device) else [*range(1, 18), 31, 32, 33, 63, 64]:
        for tree in (False, True):
            sample = make((70, rows), 3, 1, 64, rows, device=device, dtype=torch.float16, tree=tree)
            assert error(run(sample, backend), sample) <= reference.BUDGET, (rows, tree)


@per_backend
@pytest.mark.parametrize("d", [*range(1, 18), 31, 63, 64, 65, 72, 80, 96, 100, 127, 128, 160, 192, 255, 256])
def test_head_sizes(d, backend, device, poison):
    if interpreted(backend, device) and d not in (1, 33, 64, 80, 256):
        pytest.skip("a few are enough for the interpreter")
    sample = make((33, 5), 2, 1, d, 2, device=device, dtype=torch.float16)
    assert error(run(sample, backend), sample) <= reference.BUDGET


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 200), max_size=4),
    hkv=st.integers(1, 3),
    group=st.integers(1, 9),
    d=st.sampled_from([16, 64, 80, 128]),
    rows=st.integers(0, 64),
    tree=st.booleans(),
    block=st.sampled_from([0, 1, 16, 24]),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.floats(1, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_shape(lengths, hkv, group, d, rows, tree, block, window, softcap, dtype, seed):
    """On the backend that would be chosen."""
    q_lens = torch.tensor([(seed + 7 * b) % (rows + 1) for b in range(len(lengths))], dtype=torch.int32)
    sample = make(
        lengths, hkv * group, hkv, d, rows, dtype=dtype, tree=tree, block=block, seed=seed,
        window=window, softcap=softcap, q_lens=q_lens,
    )  # fmt: skip
    assert error(run(sample), sample) <= reference.BUDGET


@per_backend
def test_equals_torch(backend, device):
    (q, k, v, lengths), _ = make((40, 9, 64), 4, 2, rows=5, device=device)
    out, _ = run(((q, k, v, lengths), {}), backend)
    for b, length in enumerate(lengths.tolist()):
        seen = torch.arange(length) <= torch.arange(length - 5, length)[:, None]
        keys, values = k[b : b + 1, :, :length], v[b : b + 1, :, :length]
        want = functional.scaled_dot_product_attention(
            q[b : b + 1], keys, values, attn_mask=seen.to(device), enable_gqa=True
        )
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-5, atol=1e-5)


def test_a_chain_is_causal():
    """A tree that is a chain, ragged or not, is no tree."""
    lengths = torch.tensor([5, 64, 17], dtype=torch.int32)
    parents = torch.arange(-1, 16, dtype=torch.int32).expand(3, 17)
    for q_lens in (None, torch.tensor([3, 17, 9], dtype=torch.int32)):
        (q, k, v, _), _ = make((70, 70, 70), rows=17)
        mask, _ = tree_build.tree_build(parents, q_lens=q_lens)
        for window in (None, 6):
            options = dict(q_lens=q_lens, window=window)
            plain = fastops.decode_attn(q, k, v, lengths, **options)
            assert equal(fastops.decode_attn(q, k, v, lengths, tree_mask=mask, **options), plain)


def views_of(cache):
    """The same [B, Hkv, S, D] in other layouts; what lies between is NaN."""
    yield cache.transpose(1, 2).contiguous().transpose(1, 2)
    yield cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wide = torch.full((*cache.shape[:3], cache.shape[3] + 5), float("nan"), dtype=cache.dtype, device=cache.device)
    wide[..., 3:-2] = cache
    yield wide[..., 3:-2]
    yield cache.flip(0).contiguous().flip(0)


@per_backend
@per_dtype
def test_strides(dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    (q, k, v, lengths), kwargs = make((40, 9, 70), 6, 2, 64, 3, device=device, dtype=dtype, tree=True)
    kwargs = {key: non_contiguous(value) for key, value in kwargs.items()}
    want = run(((q, k, v, lengths), kwargs), backend)
    projected = torch.cat([q.transpose(1, 2), q.transpose(1, 2)], dim=2)[:, :, 6:].transpose(1, 2)  # as of a fused qkv
    for keys, values in zip(views_of(k), views_of(v), strict=True):
        sample = ((projected, keys, values, non_contiguous(lengths)), kwargs)
        got = run(sample, backend)
        assert got[0].is_contiguous()
        assert error(got, sample) <= reference.BUDGET
    both = torch.stack([k, v])
    assert equal(run(((q, both[0], both[1], lengths), kwargs), backend), want)


@per_backend
def test_strided_pages(backend, device, poison):
    (q, k, v, lengths), kwargs = make((40, 9, 70), 4, 2, 64, 3, device=device, dtype=torch.float16, block=16)
    kwargs["block_table"] = non_contiguous(kwargs["block_table"])
    both = torch.stack([k, v], dim=1)  # [n_blocks, 2, block, Hkv, D], as some servers have them
    heads_first = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v)]
    for keys, values in ((both[:, 0], both[:, 1]), heads_first):
        sample = ((q, keys, values, lengths), kwargs)
        assert error(run(sample, backend), sample) <= reference.BUDGET


@per_backend
def test_expanded_caches(backend, device):
    """A prompt that all sequences share, once in memory."""
    (q, k, v, lengths), _ = make((50, 50, 50), device=device)
    shared = (q, k[:1].expand(k.shape), v[:1].expand(v.shape), lengths)
    assert error(run((shared, {}), backend), (shared, {})) <= reference.BUDGET


@per_backend
@pytest.mark.parametrize("rows", [1, 6])
def test_the_batch_may_be_permuted(rows, backend, device):
    """A sequence's result is the same bit for bit wherever, and beside whom, it stands."""
    lengths = (300, 1, 64, 0, 129, 1000)
    (q, k, v, n), kwargs = make(lengths, 4, 2, rows=rows, device=device, dtype=torch.float16, tree=rows > 1)
    out, lse = run(((q, k, v, n), kwargs), backend)
    order = torch.tensor([3, 5, 0, 4, 1, 2], device=device)
    moved = ((q[order], k[order], v[order], n[order]), {key: value[order] for key, value in kwargs.items()})
    assert equal(run(moved, backend), (out[order], lse[order]))


@per_backend
def test_deterministic(backend, device):
    sample = make((900, 64, 1300), 4, 2, rows=6, device=device, dtype=torch.float16, tree=True)
    first = run(sample, backend)
    assert all(equal(run(sample, backend), first) for _ in range(2))


@per_backend
def test_infinite_scores(backend, device):
    """A key whose score is -inf has no weight; NaN in a row of q stays in its row."""
    (q, k, v, lengths), _ = make((40, 33), 2, 1, rows=2, device=device)
    q[...] = q.abs()
    k[0, 0, 7] = -float("inf")
    spoilt = q.clone()
    spoilt[1, 1, 0] = float("nan")
    (out, lse), (got, _) = (run(((x, k, v, lengths), {}), backend) for x in (q, spoilt))
    keep = torch.arange(k.shape[2]) != 7
    want, want_lse = reference.decode_attn(q, k[:, :, keep], v[:, :, keep], lengths - 1)
    torch.testing.assert_close(out[0, :, 1], want[0, :, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0, :, 1], want_lse[0, :, 1], rtol=1e-5, atol=1e-5)
    assert got[1, 1, 0].isnan().all()
    assert torch.equal(got[1, 0], out[1, 0])
    assert torch.equal(got[1, 1, 1], out[1, 1, 1])


@pytest.mark.parametrize("name", ["gqa", "tree"])
def test_autocast_and_gradients_change_nothing(name):
    (q, *rest), kwargs = find(name)
    want = run(((q, *rest), kwargs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(((q.requires_grad_(), *rest), kwargs))
    assert equal(got, want)
    assert not got[0].requires_grad


def caches(*shape, dtype=torch.float32, device="cpu"):
    return dict(k_cache=torch.zeros(shape, dtype=dtype, device=device), v_cache=torch.zeros(shape, dtype=dtype))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Of q [2, 4, 3, 64], caches [2, 2, 40, 64], lengths [2].
BAD = {
    "q dtype": (dict(q=torch.zeros(2, 4, 3, 64).double()), "q must be float32, float16 or bfloat16, got float64"),
    "q dims": (dict(q=torch.zeros(2, 4, 64)), "q must be [B, Hq, T, D], got [2, 4, 64]"),
    "no head": (dict(q=torch.zeros(2, 4, 3, 0)), "q must have a head size from 1 to 256, got 0"),
    "wide head": (dict(q=torch.zeros(2, 4, 3, 257)), "q must have a head size from 1 to 256, got 257"),
    "many rows": (
        dict(q=torch.zeros(2, 4, 65, 64)), "q must have at most 64 rows a sequence (prefill_attn takes more), got 65",
    ),
    "q strides": (
        dict(q=torch.zeros(2, 4, 64, 3).mT),
        "q must be contiguous in its last dimension, got strides [768, 192, 1, 3]",
    ),
    "k device": (dict(k_cache=torch.zeros(2, 2, 40, 64, device="meta")), "k_cache must be on cpu like q, got meta"),
    "k dtype": (dict(k_cache=torch.zeros(2, 2, 40, 64).half()), "k_cache must be float32 like q, got float16"),
    "k dims": (caches(2, 40, 64), "k_cache must be [B, Hkv, S_cap, D], got [2, 40, 64]"),
    "page dims": (
        dict(**caches(2, 40, 64), block_table=torch.zeros(2, 3, dtype=torch.int32)),
        "k_cache must be [n_blocks, block, Hkv, D], got [2, 40, 64]",
    ),
    "k strides": (
        dict(k_cache=torch.zeros(2, 2, 64, 40).mT),
        "k_cache must be contiguous in its last dimension, got strides [5120, 2560, 1, 40]",
    ),
    "v dtype": (dict(v_cache=torch.zeros(2, 2, 40, 64).bfloat16()), "v_cache must be float32 like q, got bfloat16"),
    "v shape": (
        dict(v_cache=torch.zeros(2, 2, 41, 64)), "v_cache must be [2, 2, 40, 64] like k_cache, got [2, 2, 41, 64]",
    ),
    "v strides": (
        dict(v_cache=torch.zeros(2, 2, 64, 40).mT),
        "v_cache must be contiguous in its last dimension, got strides [5120, 2560, 1, 40]",
    ),
    "head size": (caches(2, 2, 40, 32), "k_cache must have the head size of q, 64, got 32"),
    "head ratio": (caches(2, 3, 40, 64), "q must have a multiple of k_cache's 3 heads, got 4"),
    "no kv heads": (caches(2, 0, 40, 64), "q must have a multiple of k_cache's 0 heads, got 4"),
    "batch": (caches(3, 2, 40, 64), "k_cache must have B = 2 sequences, got 3"),
    "table dtype": (
        dict(**caches(9, 16, 2, 64), block_table=torch.zeros(2, 3, dtype=torch.int64)),
        "block_table must be int32, got int64",
    ),
    "table shape": (
        dict(**caches(9, 16, 2, 64), block_table=torch.zeros(3, 3, dtype=torch.int32)),
        "block_table must be [B, max_blocks] = [2, max_blocks], got [3, 3]",
    ),
    "table device": (
        dict(**caches(9, 16, 2, 64), block_table=torch.zeros(2, 3, dtype=torch.int32, device="meta")),
        "block_table must be on cpu like q, got meta",
    ),
    "softcap": (dict(softcap=0.0), "softcap must be greater than 0, got 0.0"),
    "window": (dict(window=0), "window must be at least 1, got 0"),
    "lengths dtype": (dict(lengths=torch.tensor([3, 3])), "lengths must be int32, got int64"),
    "lengths shape": (dict(lengths=ints(3)), "lengths must be [B] = [2], got [1]"),
    "lengths dims": (dict(lengths=ints(3, 3)[None]), "lengths must be [B] = [2], got [1, 2]"),
    "lengths device": (
        dict(lengths=torch.zeros(2, dtype=torch.int32, device="meta")), "lengths must be on cpu like q, got meta",
    ),
    "q_lens dtype": (dict(q_lens=torch.tensor([3, 3])), "q_lens must be int32, got int64"),
    "q_lens shape": (dict(q_lens=ints(3)), "q_lens must be [B] = [2], got [1]"),
    "mask dtype": (dict(tree_mask=torch.zeros(2, 3, dtype=torch.int32)), "tree_mask must be int64, got int32"),
    "mask shape": (
        dict(tree_mask=torch.zeros(2, 4, dtype=torch.int64)), "tree_mask must be [B, T] = [2, 3], got [2, 4]",
    ),
    "mask device": (
        dict(tree_mask=torch.zeros(2, 3, dtype=torch.int64, device="meta")),
        "tree_mask must be on cpu like q, got meta",
    ),
}  # fmt: skip

# Wrong values inside tensors: always refused on the CPU, under debug_checks on a GPU.
BAD_VALUES = {
    "length beyond": (dict(lengths=ints(3, 41)), "lengths must be from 0 to 40, got 41"),
    "length negative": (dict(lengths=ints(-1, 3)), "lengths must be from 0 to 40, got -1"),
    "q_lens beyond": (dict(q_lens=ints(4, 3)), "q_lens must be from 0 to 3, got 4"),
    "q_lens negative": (dict(q_lens=ints(3, -2)), "q_lens must be from 0 to 3, got -2"),
    "table too short": (
        dict(**caches(9, 16, 2, 64), block_table=torch.zeros(2, 3, dtype=torch.int32), lengths=ints(3, 49)),
        "lengths must be from 0 to 48, got 49",
    ),
    "page beyond": (
        dict(**caches(9, 16, 2, 64), block_table=ints(0, 9, 99, 1, 2, 99).reshape(2, 3), lengths=ints(17, 9)),
        "block_table must be from 0 to 8, got 9",
    ),
    "page negative": (
        dict(**caches(9, 16, 2, 64), block_table=ints(0, 1, 99, -1, 2, 99).reshape(2, 3), lengths=ints(17, 9)),
        "block_table must be from 0 to 8, got -1",
    ),
}  # fmt: skip


def bad_call(changes, device="cpu"):
    whole = {
        "q": torch.zeros(2, 4, 3, 64),
        **{name: torch.zeros(2, 2, 40, 64) for name in ("k_cache", "v_cache")},
        "lengths": ints(30, 3),
        **changes,
    }
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for key, value in whole.items()
    }


@pytest.mark.parametrize("name", [*BAD, *BAD_VALUES])
def test_rejects(name):
    changes, message = {**BAD, **BAD_VALUES}[name]
    for backend, device in available("decode_attn"):
        arguments = bad_call(changes, device)
        where = "on cuda:0" if device.type == "cuda" else "on cpu"
        context = fastops.debug_checks() if name in BAD_VALUES else torch.no_grad()
        with context, pytest.raises(RuntimeError) as raised:
            fastops.decode_attn(**arguments, backend=backend)
        assert str(raised.value) == "fastops::decode_attn: " + message.replace("on cpu", where), backend


@pytest.mark.parametrize("name", BAD_VALUES)
def test_the_cpu_always_checks_values(name):
    changes, message = BAD_VALUES[name]
    for backend, device in available("decode_attn"):
        if device.type == "cpu":
            with pytest.raises(RuntimeError) as raised:
                fastops.decode_attn(**bad_call(changes), backend=backend)
            assert str(raised.value) == f"fastops::decode_attn: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    changes, message = BAD[name]
    arguments, context, call = bad_call(changes), torch.no_grad(), torch.ops.fastops.decode_attn
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif path == "explain":
        call = functools.partial(fastops.explain, "decode_attn")
    with context, pytest.raises(RuntimeError) as raised:
        call(**arguments)
    assert str(raised.value) == f"fastops::decode_attn: {message}"


def with_values(arguments):
    """The same call with numbers in its tensors of zeros."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(value.shape, generator=generator).to(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in arguments.items()
    }


def kernels_beyond_the_checks():
    """(device, call) of what runs without the CPU's checks of values: GPU kernels, and Triton's in its interpreter."""
    for backend, device in available("decode_attn"):
        if device.type == "cuda" and backend != "reference":
            yield device, functools.partial(fastops.decode_attn, backend=backend)
        elif interpreted(backend, device):
            yield device, fastops._registry.registry["decode_attn"].triton_member("launch")


@pytest.mark.parametrize("name", BAD_VALUES)
def test_triton_and_cuda_kernels_skip_bad_values(name):
    """The sequence with the bad length, or the keys of the bad page, count for nothing; the others are as ever."""
    for device, call in kernels_beyond_the_checks():
        arguments = with_values(bad_call(BAD_VALUES[name][0], device))
        got = call(**arguments)
        if name.startswith("q_lens"):  # a sequence with a number of rows that cannot be has none
            bad = int(name == "q_lens negative")
            assert bool((got[0][bad] == 0).all())
            assert bool((got[1][bad] == -torch.inf).all())
            arguments["q_lens"][bad] = 0
        assert bool((got[0] != 0).any())
        assert reference.error(got, **arguments) <= reference.BUDGET


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["gqa", "paged", "tree", "everything", "no_rows", "no_sequences"])
def test_opcheck(name, device):
    args, kwargs = find(name, torch.device(device))
    args = [torch.nan_to_num(a) if a.is_floating_point() else a for a in args]  # opcheck compares with torch.equal
    torch.library.opcheck(torch.ops.fastops.decode_attn.default, args, kwargs)


@per_backend
def test_sizes_do_not_recompile(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(q, k, v, lengths, mask):
        return fastops.decode_attn(q, k, v, lengths, tree_mask=mask)[0] * 2

    with fastops.use_backend("decode_attn", backend):
        for lengths, rows in (((40, 9, 64), 5), ((30, 77), 7), ((11, 90, 8, 50, 3), 3)):
            (q, k, v, n), kwargs = make(lengths, rows=rows, device=device, tree=True)
            assert torch.equal(f(q, k, v, n, kwargs["tree_mask"]), run(((q, k, v, n), kwargs))[0] * 2)
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_cost(name):
    (q, k, v, lengths), kwargs = find(name, dtype=torch.bfloat16)
    cost = reference.cost(q, k, v, lengths, **kwargs)
    hkv, d = k.shape[2 if "block_table" in kwargs else 1], q.shape[3]
    keys = sum(min(n, kwargs["window"] + q.shape[2] - 1) if "window" in kwargs else n for n in lengths.tolist())
    least = 4 * keys * hkv * d + 4 * q.numel() + 4 * q.shape[:3].numel()
    assert least <= cost.bytes <= least + 16 * q.shape[0] * (1 + q.shape[2]) + 4 * (keys + q.shape[0])
    assert cost.flops == 4 * keys * q.shape[1] * q.shape[2] * d


@per_dtype
def test_error_sees_one_wrong_element(dtype):
    sample = make((300, 70), rows=2, dtype=dtype)
    out, lse = run(sample, "reference")
    assert error((out, lse), sample) <= reference.BUDGET
    for step in (0, 5):
        bad = out.clone()
        at = bad.abs().flatten().topk(10).indices[step]
        bad.view(-1)[at] *= 1.04 if dtype == torch.bfloat16 else 1.01
        assert error((bad, lse), sample) > reference.BUDGET
    off = lse.clone()
    off[1, 1, 1] += 3e-5
    assert error((out, off), sample) > reference.BUDGET
    (q, k, v, lengths), kwargs = sample
    fewer = run(((q, k, v, lengths - torch.tensor([0, 1], dtype=torch.int32)), kwargs), "reference")
    assert error(fewer, sample) > reference.BUDGET


def gpu_kernels():
    return [backend for backend, device in available("decode_attn") if device.type == "cuda" and backend != "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_captures_in_a_cuda_graph(rows):
    for backend in gpu_kernels():
        args, kwargs = make((300, 64, 2000), 8, 2, 128, rows, device="cuda", dtype=torch.bfloat16, tree=rows > 1)
        q, k, v, lengths = args
        k.nan_to_num_()
        v.nan_to_num_()
        run((args, kwargs), backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run((args, kwargs), backend)
        q.neg_()
        lengths.copy_(torch.tensor([1200, 70, 64], dtype=torch.int32))  # a replay reads what the lengths are then
        graph.replay()
        assert error(out, (args, kwargs)) <= reference.BUDGET


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    for backend in gpu_kernels():
        k = torch.randn(2, 1, 2**23 + 5, 128, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(2, 4, 1, 128, device="cuda", dtype=torch.bfloat16)
        lengths = torch.tensor([70, 2**23 + 5], dtype=torch.int32, device="cuda")
        last = torch.full_like(lengths, 2**23)
        got = fastops.decode_attn(q, k, k, torch.minimum(lengths, last + 5), window=1000, backend=backend)
        tail = k[1:, :, -1000:]
        assert error((got[0][1:], got[1][1:]), ((q[1:], tail, tail, last[1:] * 0 + 1000), {})) <= reference.BUDGET


@pytest.mark.multi_gpu
def test_runs_on_the_tensor_s_device():
    for backend in gpu_kernels():
        sample = make((40, 300), device="cuda:1", dtype=torch.bfloat16)
        assert error(run(sample, backend), sample) <= reference.BUDGET
        assert torch.cuda.current_device() == 0
