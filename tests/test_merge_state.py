import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import merge_state as reference
from fastops.testing import available, non_contiguous, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("merge_state")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
op = torch.ops.fastops.merge_state


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name).args


def make(*leading, d=64, device=CPU, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    o_a, o_b = (torch.randn(*leading, d, generator=generator).to(device, dtype) for _ in range(2))
    lse_a, lse_b = ((torch.randn(leading, generator=generator) * spread).to(device) for _ in range(2))
    return o_a, lse_a, o_b, lse_b


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


def check(args, backend):
    got = fastops.merge_state(*args, backend=backend)
    assert reference.error(got, *args) <= reference.BUDGET
    return got


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_the_truth(name, dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    args = sample(name, device, dtype)
    o, lse = check(args, backend)
    assert (o.shape, o.dtype, o.device) == (args[0].shape, dtype, args[0].device)
    assert (lse.shape, lse.dtype) == (args[1].shape, torch.float32)
    assert o.is_contiguous()
    assert lse.is_contiguous()


@per_backend
def test_empty_states(backend, device):
    o_a, lse_a, o_b, lse_b = make(3, 2, device=device)
    lse_a[0], lse_b[1] = -math.inf, -math.inf
    lse_a[2] = lse_b[2] = -math.inf
    o_a[0] = o_b[1] = o_a[2] = o_b[2] = math.nan
    o, lse = fastops.merge_state(o_a, lse_a, o_b, lse_b, backend=backend)
    assert torch.equal(o[0], o_b[0])
    assert torch.equal(lse[0], lse_b[0])
    assert torch.equal(o[1], o_a[1])
    assert torch.equal(lse[1], lse_a[1])
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert (lse[2] == -math.inf).all()


@per_backend
@per_dtype
def test_equals_attention_over_the_union(dtype, backend, device):
    """Values as logits' weights: merging softmax averages of two sets is the average over both."""
    skip_untrusted(backend, device, dtype)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(4, 9, 16, generator=generator, dtype=torch.float64)

    def state(some):
        p = scores[:, some].softmax(-1)
        o = (p[..., None] * values[:, some]).sum(1)
        return o.to(device, dtype), scores[:, some].logsumexp(-1).float().to(device)

    o, lse = fastops.merge_state(*state(slice(0, 3)), *state(slice(3, 9)), backend=backend)
    want, want_lse = state(slice(0, 9))
    torch.testing.assert_close(o.double(), want.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse, want_lse)


@per_backend
@pytest.mark.parametrize("d", [*range(1, 19), 63, 65, 80, 96, 127, 255, 257, 1000])
def test_every_width(d, backend, device, poison):
    check(make(2, 5, d=d, device=device), backend)


@per_backend
def test_every_number_of_rows(backend, device, poison):
    for rows in [*range(1, 20), 63, 64, 65, 127, 129]:
        check(make(rows, device=device), backend)


@per_backend
@per_dtype
def test_strides(dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    o_a, lse_a, o_b, lse_b = make(2, 3, 5, 7, d=40, device=device, dtype=dtype)

    def gaps(t):
        wide = torch.full([2 * size for size in t.shape[:-1]] + [t.shape[-1] + 3], math.nan, dtype=t.dtype)
        return wide.to(t.device)[::2, ::2, ::2, ::2, 1:-2].copy_(t)

    for change, of_lse in (
        (gaps, non_contiguous),
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.mT.contiguous().mT),
        (lambda t: t[:, :1].expand_as(t), lambda t: t[:1].expand_as(t)),
        (lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].reshape(t.shape), lambda t: t),
    ):
        args = change(o_a), of_lse(lse_a), change(o_b), of_lse(lse_b)
        check(args, backend)
        check(tuple(t[0] for t in args), backend)
        check(tuple(t[0, 0, 0] for t in args), backend)


@per_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_do_not_influence_each_other(value, backend, device):
    o_a, lse_a, o_b, lse_b = make(5, 6, device=device)
    want = fastops.merge_state(o_a, lse_a, o_b, lse_b, backend=backend)
    lse_b[2, 3] = value
    o, lse = fastops.merge_state(o_a, lse_a, o_b, lse_b, backend=backend)
    assert not o[2, 3].isfinite().any()
    assert not lse[2, 3].isfinite()
    o[2, 3], lse[2, 3] = want[0][2, 3], want[1][2, 3]
    assert torch.equal(o, want[0])
    assert torch.equal(lse, want[1])


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 6), max_size=4),
    d=st.integers(0, 130),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(leading, d, dtype, spread, seed):
    check(make(*leading, d=d, dtype=dtype, spread=spread, seed=seed), None)


@per_backend
def test_deterministic_and_symmetric(backend, device):
    args = make(30, 20, device=device, dtype=torch.float16)
    first, second = (fastops.merge_state(*args, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    swapped = fastops.merge_state(*args[2:], *args[:2], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, swapped, strict=True))


STATE, LSE = torch.zeros(2, 3, 16), torch.zeros(2, 3)
BAD = {
    "o_a dtype": (dict(o_a=STATE.int()), "o_a must be float32, float16 or bfloat16, got int32"),
    "o_a scalar": (dict(o_a=torch.zeros(())), "o_a must have at least 1 dimension, got 0"),
    "o_a stride": (
        dict(o_a=torch.zeros(2, 3, 32)[..., ::2]), "o_a must have a contiguous last dimension, got stride 2",
    ),
    "o_b device": (dict(o_b=STATE.to("meta")), "o_b must be on cpu like o_a, got meta"),
    "o_b dtype": (dict(o_b=STATE.half()), "o_b must be float32 like o_a, got float16"),
    "o_b shape": (dict(o_b=STATE[:1]), "o_b must be [2, 3, 16] like o_a, got [1, 3, 16]"),
    "o_b stride": (
        dict(o_b=torch.zeros(2, 3, 32)[..., ::2]), "o_b must have a contiguous last dimension, got stride 2",
    ),
    "lse_a device": (dict(lse_a=LSE.to("meta")), "lse_a must be on cpu like o_a, got meta"),
    "lse_a dtype": (dict(lse_a=LSE.double()), "lse_a must be float32, got float64"),
    "lse_a shape": (dict(lse_a=LSE[..., None]), "lse_a must be [2, 3], got [2, 3, 1]"),
    "lse_b dtype": (dict(lse_b=LSE.half()), "lse_b must be float32, got float16"),
    "lse_b shape": (dict(lse_b=LSE[0]), "lse_b must be [2, 3], got [3]"),
}  # fmt: skip


def bad_arguments(name, device="cpu"):
    given = {"o_a": STATE, "lse_a": LSE, "o_b": STATE, "lse_b": LSE, **BAD[name][0]}
    return {k: v if v.device.type == "meta" else v.to(device) for k, v in given.items()}


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.merge_state(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::merge_state: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    arguments, context = bad_arguments(name), torch.no_grad()
    call = functools.partial(fastops.explain, "merge_state") if path == "explain" else op
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        call(**arguments)
    assert str(error.value) == f"fastops::merge_state: {BAD[name][1]}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["mar", "row", "five", "both_empty", "no_rows"])
def test_opcheck(name, device):
    torch.library.opcheck(op.default, sample(name, torch.device(device), torch.float32))


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(*args):
        o, lse = fastops.merge_state(*args)
        return o * 2, lse

    with fastops.use_backend("merge_state", backend):
        for leading in ((2, 3), (5, 4), (7, 9)):
            args = make(*leading, device=device)
            o, lse = f(*args)
            assert reference.error((o / 2, lse), *args) <= reference.BUDGET
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_cost_counts_the_tensors(name, dtype):
    args = sample(name, CPU, dtype)
    tensors = [*reference.merge_state(*args), *args]
    assert reference.cost(*args).bytes == sum(t.numel() * t.element_size() for t in tensors)


@per_dtype
def test_error_sees_one_wrong_element(dtype):
    args = make(5, 6, dtype=dtype)
    o, lse = reference.merge_state(*args)
    assert reference.error((o, lse), *args) <= reference.BUDGET
    bad = o.clone()
    bad[1, 2, 3] += 0.05 if dtype == torch.bfloat16 else 0.01
    assert reference.error((bad, lse), *args) > reference.BUDGET
    bad = lse.clone()
    bad[3, 3] += 1e-5
    assert reference.error((o, bad), *args) > reference.BUDGET
    assert reference.error(((args[0] + args[2]) / 2, lse), *args) > reference.BUDGET  # the weights forgotten


def test_what_is_tuned_is_what_is_looked_up(monkeypatch):
    page = pytest.importorskip("fastops.triton_ops.merge_state")
    asked = []
    monkeypatch.setattr(page._tuned, "lookup", lambda *a: asked.append((dict(a[2]), a[3])) or dict(page.DEFAULT))
    for case in fastops._registry.registry["merge_state"].tuning(torch.device("meta")):
        page.config_for(case.args[0])
        key, size_log2 = asked.pop()
        assert key == case.key
        assert size_log2 == case.size.bit_length() - 1


def test_the_bare_op_is_a_constant():
    o_a, *rest = make(2, 3)
    assert not any(t.requires_grad for t in op(o_a.requires_grad_(), *rest))


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    args = make(16, 64, device="cuda", dtype=torch.bfloat16)
    fastops.merge_state(*args, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastops.merge_state(*args, backend="triton")
    args[0].neg_()
    graph.replay()
    assert reference.error(got, *args) <= reference.BUDGET


@pytest.mark.multi_gpu
def test_runs_on_the_tensor_s_device():
    o, _ = check(make(8, 9, device="cuda:1", dtype=torch.bfloat16), "triton")
    assert o.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
