import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import attn_received as reference
from fastops.testing import available, non_contiguous, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("attn_received")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
op = torch.ops.fastops.attn_received


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name)


def make(b=2, h=3, g=5, s=40, d=64, *, device=CPU, dtype=torch.float32, seed=0):
    return reference.make_inputs(b, h, g, s, d, device, dtype, seed)


def mask_of(*shape, device=CPU, seed=1):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7).to(device)


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


def check(args, backend, **kwargs):
    got = fastops.attn_received(*args, **kwargs, backend=backend)
    assert reference.error(got, *args, **kwargs) <= reference.BUDGET
    return got


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_the_truth(name, dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    s = sample(name, device, dtype)
    got = check(s.args, backend, **s.kwargs)
    q, k = s.args
    assert (got.shape, got.dtype, got.device) == ((q.shape[0], k.shape[2]), torch.float32, q.device)
    assert got.is_contiguous()


@per_backend
def test_equals_the_softmax_written_out(backend, device):
    q, k = make(device=device)
    mask = mask_of(2, 40, device=device)
    scores = torch.einsum("bhgd,bhsd->bhgs", q.double(), k.double()) / 8
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    want = scores.softmax(-1).sum((1, 2))
    got = fastops.attn_received(q, k, mask=mask, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert (got[~mask] == 0).all()
    torch.testing.assert_close(got.sum(1), torch.full_like(got[:, 0], 15.0))


@per_backend
def test_every_number_of_queries_and_keys(backend, device, poison):
    for size in [*range(1, 20), 31, 32, 33, 63, 64, 65, 130]:
        check(make(1, 2, size, 37, 16, device=device), backend)
    for size in [*range(1, 20), 31, 33, 127, 128, 129, 511, 513, 1030]:
        check(make(1, 2, 3, size, 16, device=device), backend, mask=mask_of(1, size, device=device))


@per_backend
@pytest.mark.parametrize("d", [*range(1, 20), 31, 40, 48, 63, 65, 72, 79, 81, 97, 129, 255])
def test_every_head_dim(d, backend, device, poison):
    check(make(1, 2, 7, 12, d, device=device), backend, mask=mask_of(1, 12, device=device))


def strided(t):
    """Gaps of NaN between rows, heads and batches."""
    wide = torch.full([2 * size + 1 for size in t.shape[:3]] + [t.shape[3] + 5], math.nan, dtype=t.dtype)
    view = wide.to(t.device)[1::2, 1::2, 1::2, 2 : 2 + t.shape[3]]
    return view.copy_(t)


@per_backend
@per_dtype
def test_strides(dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    args = make(d=80, device=device, dtype=dtype)
    mask = mask_of(2, 40, device=device)
    for change in (
        strided,
        lambda t: torch.cat([t.new_full((3,), math.nan), t.reshape(-1)])[3:].reshape(t.shape),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1].expand_as(t),
        lambda t: t[:, :, :1].expand_as(t),
    ):
        check([change(t) for t in args], backend, mask=mask)
    for twin in (mask.T.contiguous().T, non_contiguous(mask), mask[:1], mask[0], mask[:, :1], mask[0, 0]):
        check(args, backend, mask=twin)


@per_backend
def test_equal_scores_are_shared_out_exactly(backend, device):
    """Where all scores are the same, an error of the sum would move every key alike, and nothing would average it."""
    for keys in (3, 7, 100, 149, 320):
        q, k = make(3, 3, 40, keys, 8, device=device)
        got = check((q * 0, k), backend)
        torch.testing.assert_close(got, torch.full_like(got, 120 / keys), rtol=5e-7, atol=0)


@per_backend
def test_batches_do_not_influence_each_other(backend, device):
    q, k = make(device=device)
    want = fastops.attn_received(q, k, backend=backend)
    spoilt = q.clone()
    spoilt[1, 2, 3] = math.nan
    got = fastops.attn_received(spoilt, k, backend=backend)
    assert torch.equal(got[0], want[0])
    assert got[1].isnan().all()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(0, high) for high in (3, 3, 40, 150))),
    d=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(sizes, d, dtype, masked, spread, seed):
    q, k = make(*sizes, d, dtype=dtype, seed=seed)
    kwargs = {"mask": mask_of(sizes[0], sizes[3], seed=seed)} if masked else {}
    check((q * spread, k), None, **kwargs)


@per_backend
def test_deterministic(backend, device):
    args = make(h=16, g=7, s=320, device=device, dtype=torch.float16)
    first, *others = (fastops.attn_received(*args, backend=backend) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 7, 16)
BAD = {
    "q dtype": (dict(q=Q.int()), "q must be float32, float16 or bfloat16, got int32"),
    "q dims": (dict(q=Q[0]), "q must be [B, H, G, D], got [3, 4, 16]"),
    "q wide": (dict(q=torch.zeros(2, 3, 4, 257)), "q must have a last dimension from 1 to 256, got 257"),
    "q stride": (dict(q=torch.zeros(2, 3, 16, 4).mT), "q must have a contiguous last dimension, got stride 4"),
    "k device": (dict(k=K.to("meta")), "k must be on cpu like q, got meta"),
    "k dtype": (dict(k=K.half()), "k must be float32 like q, got float16"),
    "k heads": (dict(k=K[:, :2]), "k must be [2, 3, S, 16], got [2, 2, 7, 16]"),
    "k stride": (dict(k=K.mT.contiguous().mT), "k must have a contiguous last dimension, got stride 7"),
    "mask device": (dict(mask=torch.ones(7, device="meta") > 0), "mask must be on cpu like q, got meta"),
    "mask dtype": (dict(mask=torch.ones(2, 7)), "mask must be bool, got float32"),
    "mask size": (dict(mask=torch.ones(2, 6) > 0), "mask must broadcast to [B, S] = [2, 7], got [2, 6]"),
    "mask batch": (dict(mask=torch.ones(3, 7) > 0), "mask must broadcast to [B, S] = [2, 7], got [3, 7]"),
    "mask dims": (dict(mask=torch.ones(1, 2, 7) > 0), "mask must broadcast to [B, S] = [2, 7], got [1, 2, 7]"),
}  # fmt: skip


def bad_arguments(name, device="cpu"):
    given = {"q": Q, "k": K, **BAD[name][0]}
    return {k: v if v.device.type == "meta" else v.to(device) for k, v in given.items()}


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.attn_received(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::attn_received: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    arguments, context = bad_arguments(name), torch.no_grad()
    call = functools.partial(fastops.explain, "attn_received") if path == "explain" else op
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        call(**arguments)
    assert str(error.value) == f"fastops::attn_received: {BAD[name][1]}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["mar", "d128", "whole_batch", "no_query", "no_key"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device), torch.float32)
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(q, k, mask):
        return fastops.attn_received(q, k, mask=mask) * 2

    with fastops.use_backend("attn_received", backend):
        for b, h, g, s in ((2, 3, 5, 40), (3, 4, 7, 33), (4, 5, 9, 50)):
            args, mask = make(b, h, g, s, 32, device=device), mask_of(b, s, device=device)
            assert reference.error(f(*args, mask) / 2, *args, mask=mask) <= reference.BUDGET
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_cost_counts_the_tensors(name, dtype):
    s = sample(name, CPU, dtype)
    out = reference.attn_received(*s.args, **s.kwargs)
    tensors = [out, *s.args, *(v for v in s.kwargs.values() if isinstance(v, torch.Tensor))]
    cost = reference.cost(*s.args, **s.kwargs)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert cost.flops == 2 * s.args[0].numel() * s.args[1].shape[2]


def test_error_sees_one_wrong_element():
    args, mask = make(), mask_of(2, 40)
    good = reference.attn_received(*args, mask=mask)
    assert reference.error(good, *args, mask=mask) <= reference.BUDGET
    bad = good.clone()
    bad[1, 7] += 1e-4
    assert reference.error(bad, *args, mask=mask) > reference.BUDGET
    assert reference.error(reference.attn_received(*args), *args, mask=mask) > reference.BUDGET  # the mask forgotten
    lost_head = reference.attn_received(*(t[:, :2] for t in args), mask=mask)
    assert reference.error(lost_head, *args, mask=mask) > reference.BUDGET


def test_what_is_tuned_is_what_is_looked_up(monkeypatch):
    page = pytest.importorskip("fastops.triton_ops.attn_received")
    asked = []
    monkeypatch.setattr(page._tuned, "lookup", lambda *a: asked.append((dict(a[2]), a[3])) or dict(page.DEFAULT))
    for case in fastops._registry.registry["attn_received"].tuning(torch.device("meta")):
        page.config_for(case.args[0], case.args[1].shape[2])
        key, size_log2 = asked.pop()
        assert key == case.key
        assert size_log2 == case.size.bit_length() - 1


def test_the_bare_op_is_a_constant():
    q, k = make()
    assert not op(q.requires_grad_(), k).requires_grad


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    q, k = make(h=16, g=7, s=320, device="cuda", dtype=torch.bfloat16)
    fastops.attn_received(q, k, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastops.attn_received(q, k, backend="triton")
    q.neg_()
    graph.replay()
    assert reference.error(got, q, k) <= reference.BUDGET


@pytest.mark.multi_gpu
def test_runs_on_the_tensor_s_device():
    args = make(device="cuda:1", dtype=torch.bfloat16)
    assert check(args, "triton").device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
