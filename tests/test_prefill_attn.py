import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import fastops
from fastops.reference import decode_attn as decode_reference
from fastops.reference import prefill_attn as reference
from fastops.testing import available, non_contiguous, trusted

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
WHERE = available("prefill_attn")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), WHERE, ids=[f"{backend}-{device.type}" for backend, device in WHERE]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def find(name, device=CPU, dtype=torch.float32):
    return next((s.args, s.kwargs) for s in reference.samples(device, dtype) if s.name == name)


def make(rows, lengths, hq=4, hkv=2, d=64, *, device="cpu", dtype=torch.float32, block=0, seed=0, **kwargs):
    device = torch.device(device)
    (_, k, v, n), table = decode_reference.random_inputs(
        tuple(lengths), hq, hkv, d, 0, device, dtype, block=block, seed=seed
    )
    q = torch.randn(sum(rows), hq, d, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)
    starts = torch.tensor([0, *rows], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    if table is not None:
        kwargs["block_table"] = table
    return (q, k, v, starts, n, max(rows, default=0)), kwargs


def run(sample, backend=None):
    args, kwargs = sample
    return fastops.prefill_attn(*args, **kwargs, backend=backend)


def error(got, sample):
    args, kwargs = sample
    return reference.error(got, *args, **kwargs)


def equal(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_matches_the_truth(name, dtype, poison):
    for backend, device in available("prefill_attn"):
        if not trusted(backend, device, dtype):
            continue
        sample = find(name, device, dtype)
        out, lse = run(sample, backend)
        q = sample[0][0]
        assert (out.dtype, out.device, out.shape) == (dtype, q.device, q.shape)
        assert (lse.dtype, lse.device, lse.shape) == (torch.float32, q.device, q.shape[:2])
        assert error((out, lse), sample) <= reference.BUDGET, backend


@per_dtype
def test_every_instruction_set(dtype, cpu_isa, poison):
    if "cpu" not in fastops._registry.registry["prefill_attn"].available(CPU):
        pytest.skip("no compiled CPU kernel")
    for s in reference.samples(CPU, dtype):
        sample = (s.args, s.kwargs)
        assert error(run(sample, "cpu"), sample) <= reference.BUDGET, s.name


@per_backend
def test_every_number_of_rows(backend, device, poison):
    for first in (1, 63) if backend == "triton" and device.type == "cpu" else (1, 15, 31, 63, 127):
        rows = range(first, first + 4)
        sample = make(rows, [n + 11 * (n % 3) for n in rows], 3, 1, device=device, dtype=torch.float16)
        assert error(run(sample, backend), sample) <= reference.BUDGET, first


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=4),
    hkv=st.integers(1, 3),
    group=st.integers(1, 5),
    d=st.sampled_from([16, 64, 80, 128]),
    block=st.sampled_from([0, 1, 16, 24]),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.floats(1, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_shape(shapes, hkv, group, d, block, window, softcap, dtype, seed):
    """On the backend that would be chosen."""
    rows, before = [n for n, _ in shapes], [m for _, m in shapes]
    sample = make(
        rows, [n + m for n, m in shapes], hkv * group, hkv, d,
        dtype=dtype, block=block, seed=seed, window=window, softcap=softcap,
    )  # fmt: skip
    assert error(run(sample), sample) <= reference.BUDGET, before


@per_backend
def test_equals_torch(backend, device):
    (q, k, v, starts, lengths, most), _ = make((40, 9), (40, 64), 4, 2, device=device)
    out, _ = run(((q, k, v, starts, lengths, most), {}), backend)
    for b, (first, last) in enumerate(((0, 40), (40, 49))):
        n, length = last - first, int(lengths[b])
        seen = torch.arange(length) <= torch.arange(length - n, length)[:, None]
        want = functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None], k[b : b + 1, :, :length], v[b : b + 1, :, :length],
            attn_mask=seen.to(device), enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(out[first:last].transpose(0, 1)[None], want, rtol=1e-5, atol=1e-5)


@per_backend
def test_equals_decode_attn(backend, device):
    """The same rows, few of them, through the op for few rows."""
    (q, k, v, starts, lengths, most), _ = make((6, 6, 6), (40, 9, 6), device=device)
    out, lse = run(((q, k, v, starts, lengths, most), {}), backend)
    packed = q.unflatten(0, (3, 6)).transpose(1, 2).contiguous()
    few, few_lse = fastops.decode_attn(packed, k, v, lengths)
    torch.testing.assert_close(out.unflatten(0, (3, 6)).transpose(1, 2), few, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.unflatten(0, (3, 6)).transpose(1, 2), few_lse, rtol=1e-5, atol=1e-5)


@per_backend
def test_strides(backend, device, poison):
    (q, k, v, starts, lengths, most), _ = make((40, 9, 1), (64, 9, 30), 6, 2, device=device, dtype=torch.float16)
    fused = torch.cat([q, q[:, :4]], dim=1)[:, :6]  # as of a fused qkv
    for keys, values in (
        (k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(1, 2).contiguous().transpose(1, 2)),
        torch.stack([k, v]).unbind(),
        torch.cat([k, v], dim=-1).chunk(2, dim=-1),
    ):
        sample = ((fused, keys, values, non_contiguous(starts), non_contiguous(lengths), most), {})
        got = run(sample, backend)
        assert got[0].is_contiguous()
        assert error(got, sample) <= reference.BUDGET


@per_backend
def test_chunks_give_what_the_whole_gives(backend, device):
    (q, k, v, _, _, _), _ = make((150,), (150,), device=device)
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    whole, whole_lse = fastops.prefill_attn(q, k, v, ints([0, 150]), ints([150]), 150, backend=backend)
    for size in (40, 149) if backend == "triton" and device.type == "cpu" else (40, 64, 149, 1):
        for first in range(0, 150, size):
            last = min(first + size, 150)
            out, lse = fastops.prefill_attn(
                q[first:last], k, v, ints([0, last - first]), ints([last]), size, backend=backend
            )
            torch.testing.assert_close(out, whole[first:last], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse, whole_lse[first:last], rtol=1e-5, atol=1e-5)


@per_backend
def test_sequences_do_not_influence_each_other(backend, device):
    rows, lengths = (65, 1, 30, 129), (65, 200, 64, 300)
    (q, k, v, starts, n, most), kwargs = make(rows, lengths, device=device, dtype=torch.float16)
    out, lse = run(((q, k, v, starts, n, most), kwargs), backend)
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    for b in range(4):
        some = slice(sum(rows[:b]), sum(rows[: b + 1]))
        order = [b, (b + 1) % 4]  # in another place, beside another one
        parts = [q[sum(rows[:i]) : sum(rows[: i + 1])] for i in order]
        cu = ints([0, rows[order[0]], rows[order[0]] + rows[order[1]]])
        got = run(((torch.cat(parts), k[order], v[order], cu, n[order], most), kwargs), backend)
        assert torch.equal(got[0][: rows[b]], out[some])
        assert torch.equal(got[1][: rows[b]], lse[some])


@per_backend
def test_deterministic(backend, device):
    sample = make((200, 64, 90), (200, 300, 95), device=device, dtype=torch.float16)
    first = run(sample, backend)
    assert all(equal(run(sample, backend), first) for _ in range(2))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Of q [7, 4, 64], caches [2, 2, 40, 64], cu_q_lens (0, 4, 7), lengths (30, 3), at most 4 rows. What the checks share
# with decode_attn is proven there.
BAD = {
    "q dims": (dict(q=torch.zeros(2, 4, 7, 64)), "q must be [N, Hq, D], got [2, 4, 7, 64]"),
    "q dtype": (dict(q=torch.zeros(7, 4, 64).double()), "q must be float32, float16 or bfloat16, got float64"),
    "head ratio": (dict(q=torch.zeros(7, 3, 64)), "q must have a multiple of k_cache's 2 heads, got 3"),
    "v shape": (
        dict(v_cache=torch.zeros(2, 2, 41, 64)), "v_cache must be [2, 2, 40, 64] like k_cache, got [2, 2, 41, 64]",
    ),
    "table shape": (
        dict(
            k_cache=torch.zeros(9, 16, 2, 64), v_cache=torch.zeros(9, 16, 2, 64),
            block_table=torch.zeros(6, dtype=torch.int32),
        ),
        "block_table must be [B, max_blocks] = [2, max_blocks], got [6]",
    ),
    "lengths dims": (dict(lengths=ints(30, 3)[None]), "lengths must be [B], got [1, 2]"),
    "lengths dtype": (dict(lengths=torch.tensor([30, 3])), "lengths must be int32, got int64"),
    "batch": (dict(lengths=ints(30, 3, 3)), "k_cache must have B = 3 sequences, got 2"),
    "cu dtype": (dict(cu_q_lens=torch.tensor([0, 4, 7])), "cu_q_lens must be int32, got int64"),
    "cu shape": (dict(cu_q_lens=ints(0, 7)), "cu_q_lens must be [B + 1] = [3], got [2]"),
    "cu device": (
        dict(cu_q_lens=torch.zeros(3, dtype=torch.int32, device="meta")), "cu_q_lens must be on cpu like q, got meta",
    ),
    "max_q_len": (dict(max_q_len=-1), "max_q_len must not be negative, got -1"),
    "softcap": (dict(softcap=-2.0), "softcap must be greater than 0, got -2.0"),
    "window": (dict(window=0), "window must be at least 1, got 0"),
}  # fmt: skip
BAD_VALUES = {
    "cu start": (dict(cu_q_lens=ints(1, 4, 7)), "cu_q_lens must rise from 0 to N = 7, got [1, 4, 7]"),
    "cu end": (dict(cu_q_lens=ints(0, 4, 8)), "cu_q_lens must rise from 0 to N = 7, got [0, 4, 8]"),
    "cu falls": (dict(cu_q_lens=ints(0, 9, 7)), "cu_q_lens must rise from 0 to N = 7, got [0, 9, 7]"),
    "too many rows": (dict(max_q_len=3), "the differences of cu_q_lens must be from 0 to 3, got 4"),
    "length beyond": (dict(lengths=ints(41, 3)), "lengths must be from 0 to 40, got 41"),
}


def bad_call(changes, device="cpu"):
    whole = {
        "q": torch.zeros(7, 4, 64),
        **{name: torch.zeros(2, 2, 40, 64) for name in ("k_cache", "v_cache")},
        "cu_q_lens": ints(0, 4, 7),
        "lengths": ints(30, 3),
        "max_q_len": 4,
        **changes,
    }
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for key, value in whole.items()
    }


@pytest.mark.parametrize("name", [*BAD, *BAD_VALUES])
def test_rejects(name):
    changes, message = {**BAD, **BAD_VALUES}[name]
    for backend, device in available("prefill_attn"):
        where = "on cuda:0" if device.type == "cuda" else "on cpu"
        context = fastops.debug_checks() if name in BAD_VALUES else torch.no_grad()
        with context, pytest.raises(RuntimeError) as raised:
            fastops.prefill_attn(**bad_call(changes, device), backend=backend)
        assert str(raised.value) == "fastops::prefill_attn: " + message.replace("on cpu", where), backend


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    changes, message = BAD[name]
    arguments, context, call = bad_call(changes), torch.no_grad(), torch.ops.fastops.prefill_attn
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif path == "explain":
        call = functools.partial(fastops.explain, "prefill_attn")
    with context, pytest.raises(RuntimeError) as raised:
        call(**arguments)
    assert str(raised.value) == f"fastops::prefill_attn: {message}"


@pytest.mark.parametrize("name", BAD_VALUES)
def test_the_triton_kernel_skips_bad_values(name):
    """A sequence whose rows or length cannot be counts for nothing; the others are as ever, on GPUs and interpreted."""
    for backend, device in available("prefill_attn"):
        if backend == "reference" or (device.type == "cpu" and backend != "triton"):
            continue
        arguments = bad_call(BAD_VALUES[name][0], device)
        generator = torch.Generator().manual_seed(0)
        for key in ("q", "k_cache", "v_cache"):
            arguments[key] = torch.randn(arguments[key].shape, generator=generator).to(device)
        got = fastops._registry.registry["prefill_attn"].triton_member("launch")(**arguments)
        assert reference.error(got, **arguments) <= reference.BUDGET
        assert bool((got[0] != 0).any()) == (name != "cu falls")  # there no sequence is left


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["chunk", "paged", "everything", "no_rows", "no_sequences"])
def test_opcheck(name, device):
    args, kwargs = find(name, torch.device(device))
    args = [torch.nan_to_num(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    torch.library.opcheck(torch.ops.fastops.prefill_attn.default, args, kwargs)


@per_backend
def test_sizes_do_not_recompile(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(q, k, v, starts, lengths):
        return fastops.prefill_attn(q, k, v, starts, lengths, q.shape[0])[0] * 2

    with fastops.use_backend("prefill_attn", backend):
        for rows in ((40, 9, 1, 2, 3), (30, 7, 5), (11, 9, 8, 5, 1, 1)):  # no size equals another one by chance
            lengths = [n + 7 for n in rows]
            (q, k, v, starts, n, _), _ = make(rows, lengths, device=device)
            want = run(((q, k, v, starts, n, q.shape[0]), {}))[0] * 2
            assert torch.equal(f(q, k, v, starts, n), want)
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_cost_counts_what_is_seen(name):
    args, kwargs = find(name)
    ones = tuple(torch.ones_like(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    _, lse = reference.prefill_attn(ones[0] * 0, *ones[1:], **{k: v for k, v in kwargs.items() if k != "softcap"})
    seen = float(lse.double().exp().sum())  # equal scores: e^lse keys
    assert reference.cost(*args, **kwargs).flops == pytest.approx(4 * args[0].shape[2] * seen, rel=1e-5)


@per_dtype
def test_error_sees_one_wrong_element(dtype):
    sample = make((70, 30), (200, 30), dtype=dtype)
    out, lse = run(sample, "reference")
    bad = out.clone()
    bad.view(-1)[bad.abs().argmax()] *= 1.04 if dtype == torch.bfloat16 else 1.01
    assert error((out, lse), sample) <= reference.BUDGET < error((bad, lse), sample)
    (q, *rest), kwargs = make((3,), (3,))
    more = torch.cat([q, q])  # three rows of no sequence
    good = fastops.prefill_attn(q, *rest, backend="reference")
    padded = torch.cat([good[0], torch.zeros_like(q)]), torch.cat([good[1], torch.full_like(good[1], -torch.inf)])
    assert error(padded, ((more, *rest), kwargs)) <= reference.BUDGET
    assert error((torch.cat([good[0], q]), padded[1]), ((more, *rest), kwargs)) == float("inf")


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    for backend, device in available("prefill_attn"):
        if device.type != "cuda" or backend == "reference":
            continue
        args, kwargs = make((300, 64), (700, 64), 8, 2, 128, device="cuda", dtype=torch.bfloat16)
        run((args, kwargs), backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run((args, kwargs), backend)
        args[0].neg_()
        graph.replay()
        assert error(out, (args, kwargs)) <= reference.BUDGET
