import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import split_attn as reference
from fastops.testing import available, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("split_attn")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
op = torch.ops.fastops.split_attn


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name)


def make(b=2, h=3, a=20, n=12, c=40, d=64, *, device=CPU, dtype=torch.float32, seed=0):
    return reference.make_inputs(b, h, a, n, c, d, device, dtype, seed)


def mask_of(*shape, device=CPU, seed=1):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7).to(device)


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


def check(args, backend, **kwargs):
    got = fastops.split_attn(*args, **kwargs, backend=backend)
    assert reference.error(got, *args, **kwargs) <= reference.BUDGET
    return got


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_the_truth(name, dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    s = sample(name, device, dtype)
    out, lse = check(s.args, backend, **s.kwargs)
    q = s.args[0]
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_every_instruction_set(name, dtype, cpu_isa, poison):
    s = sample(name, CPU, dtype)
    check(s.args, "cpu", **s.kwargs)


@per_backend
def test_rows_that_see_no_key(backend, device, poison):
    q, k, v, kc, vc = make(device=device)
    mask = torch.zeros(2, 40, dtype=torch.bool, device=device)
    mask[0, 3] = True
    out, lse = fastops.split_attn(q, k[:, :, :0], v[:, :, :0], kc, vc, cached_mask=mask, backend=backend)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (lse[1] == -math.inf).all()
    torch.testing.assert_close(out[0], vc[0, :, 3:4].expand_as(out[0]))


@per_backend
@per_dtype
def test_equals_torch_on_joined_tensors(dtype, backend, device):
    skip_untrusted(backend, device, dtype)
    q, k, v, kc, vc = make(d=80, device=device, dtype=dtype)
    mask = mask_of(2, 40, device=device)
    out, _ = fastops.split_attn(q, k, v, kc, vc, cached_mask=mask, backend=backend)
    seen = torch.cat([mask.new_ones(2, 12), mask], 1)[:, None, None].expand(2, 3, 20, 52)
    want = F.scaled_dot_product_attention(
        *(t.double() for t in (q, torch.cat([k, kc], 2), torch.cat([v, vc], 2))), attn_mask=seen
    )
    torch.testing.assert_close(out.double(), want, rtol=0, atol=16 * torch.finfo(dtype).eps)


@per_backend
@pytest.mark.parametrize("cut", [0, 1, 17, 51, 52])
def test_any_split_equals_the_union(cut, backend, device):
    """The same 52 keys, split anywhere into active and cached, or attended in two parts and merged."""
    q, k, v, *_ = make(n=52, c=0, device=device)
    parts = k[:, :, :cut], v[:, :, :cut], k[:, :, cut:], v[:, :, cut:]
    got = fastops.split_attn(q, *parts, backend=backend)
    union = (q, k, v, k[:, :, :0], v[:, :, :0])
    assert reference.error(got, *union) <= reference.BUDGET
    first = fastops.split_attn(q, *parts[:2], k[:, :, :0], v[:, :, :0], backend=backend)
    second = fastops.split_attn(q, k[:, :, :0], v[:, :, :0], *parts[2:], backend=backend)
    assert reference.error(fastops.merge_state(*first, *second), *union) <= reference.BUDGET


@per_backend
def test_every_number_of_queries_and_keys(backend, device, poison):
    sizes = [*range(1, 19), *range(30, 35), *range(62, 68), 127, 128, 129]
    for size in sizes:
        check(make(1, 2, size, 5, 9, 16, device=device), backend)
        check(make(1, 1, 3, size, 7, 16, device=device), backend)
        check(make(1, 2, 3, 4, size, 16, device=device), backend, cached_mask=mask_of(1, size, device=device))


@per_backend
@pytest.mark.parametrize("d", [*range(1, 20), 24, 31, 33, 40, 47, 48, 63, 65, 72, 79, 81, 95, 97, 127, 129, 160, 255])
def test_every_head_dim(d, backend, device, poison):
    check(make(1, 2, 7, 5, 12, d, device=device), backend, cached_mask=mask_of(1, 12, device=device))


def strided(t):
    """Gaps of NaN between rows, heads and batches."""
    wide = torch.full([2 * size + 1 for size in t.shape[:3]] + [t.shape[3] + 5], math.nan, dtype=t.dtype)
    view = wide.to(t.device)[1::2, 1::2, 1::2, 2 : 2 + t.shape[3]]
    return view.copy_(t)


def shifted(t):
    return torch.cat([t.new_full((3,), math.nan), t.reshape(-1)])[3:].reshape(t.shape)


@per_backend
@per_dtype
@pytest.mark.parametrize("d", [64, 80])
def test_strides(d, dtype, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    args = make(d=d, device=device, dtype=dtype)
    mask = mask_of(2, 3, 40, device=device)
    for change in (
        strided,
        shifted,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1].expand_as(t),
        lambda t: t[:, :1].expand_as(t),
        lambda t: t[:, :, :1].expand_as(t),
    ):
        check([change(t) for t in args], backend, cached_mask=mask)
    for twin in (
        mask.transpose(1, 2).contiguous().transpose(1, 2),
        fastops.testing.non_contiguous(mask),
        mask[:, :1].expand_as(mask),
        mask[:1, 0].expand(2, 40),
        mask[:, 0].T.contiguous().T,
    ):
        check(args, backend, cached_mask=twin)


@per_backend
def test_rows_do_not_influence_each_other(backend, device):
    q, *rest = make(device=device)
    want = fastops.split_attn(q, *rest, backend=backend)
    spoilt = q.clone()
    spoilt[1, 2, 5] = math.nan
    out, lse = fastops.split_attn(spoilt, *rest, backend=backend)
    assert out[1, 2, 5].isnan().all()
    assert lse[1, 2, 5].isnan()
    out[1, 2, 5], lse[1, 2, 5] = want[0][1, 2, 5], want[1][1, 2, 5]
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@per_backend
def test_a_nan_key_that_takes_part_shows(backend, device):
    q, k, v, kc, vc = make(device=device)
    kc[0, 0, 39] = math.nan
    out, lse = fastops.split_attn(q, k, v, kc, vc, backend=backend)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


@per_dtype
@pytest.mark.parametrize("cached", [4, 5, 64, 65])
def test_an_infinite_value_stays_infinite(cached, dtype, cpu_isa):
    q, k, v, kc, vc = make(n=0, c=cached, dtype=dtype)
    vc[0, 0, -1, 2] = math.inf
    out, _ = fastops.split_attn(q, k, v, kc, vc, backend="cpu")
    assert (out[0, 0, :, 2] == math.inf).all()
    assert out.isnan().sum() == 0


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(0, high) for high in (2, 3, 70, 70, 150))),
    d=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(sizes, d, dtype, masked, spread, seed):
    q, *rest = make(*sizes, d, dtype=dtype, seed=seed)
    kwargs = {"cached_mask": mask_of(sizes[0], sizes[4], seed=seed)} if masked else {}
    check((q * spread, *rest), None, **kwargs)


@per_backend
def test_deterministic(backend, device):
    args = make(a=70, n=64, c=130, d=80, device=device, dtype=torch.float16)
    first, *others = (fastops.split_attn(*args, backend=backend) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@per_backend
def test_autocast_changes_nothing(backend, device):
    args = make(device=device)
    want = fastops.split_attn(*args, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = fastops.split_attn(*args, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


Q, K, C = torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 5, 16), torch.zeros(2, 3, 7, 16)
BAD = {
    "q dtype": (dict(q=Q.int()), "q must be float32, float16 or bfloat16, got int32"),
    "q float64": (dict(q=Q.double()), "q must be float32, float16 or bfloat16, got float64"),
    "q dims": (dict(q=Q[0]), "q must be [B, H, A, D], got [3, 4, 16]"),
    "q wide": (dict(q=torch.zeros(2, 3, 4, 257)), "q must have a last dimension from 1 to 256, got 257"),
    "q no width": (dict(q=Q[..., :0]), "q must have a last dimension from 1 to 256, got 0"),
    "q stride": (dict(q=torch.zeros(2, 3, 16, 4).mT), "q must have a contiguous last dimension, got stride 4"),
    "k device": (dict(k_active=K.to("meta")), "k_active must be on cpu like q, got meta"),
    "k dtype": (dict(k_active=K.half()), "k_active must be float32 like q, got float16"),
    "k heads": (dict(k_active=K[:, :2]), "k_active must be [2, 3, A', 16], got [2, 2, 5, 16]"),
    "k dims": (dict(k_active=K[0]), "k_active must be [2, 3, A', 16], got [3, 5, 16]"),
    "v rows": (dict(v_active=K[:, :, :4]), "v_active must be [2, 3, 5, 16], got [2, 3, 4, 16]"),
    "v width": (dict(v_active=K[..., :8]), "v_active must be [2, 3, 5, 16], got [2, 3, 5, 8]"),
    "cached batch": (dict(k_cached=C[:1]), "k_cached must be [2, 3, C, 16], got [1, 3, 7, 16]"),
    "cached stride": (
        dict(k_cached=C.mT.contiguous().mT), "k_cached must have a contiguous last dimension, got stride 7",
    ),
    "cached v": (dict(v_cached=K), "v_cached must be [2, 3, 7, 16], got [2, 3, 5, 16]"),
    "cached v dtype": (dict(v_cached=C.bfloat16()), "v_cached must be float32 like q, got bfloat16"),
    "mask device": (
        dict(cached_mask=torch.ones(2, 7, dtype=torch.bool, device="meta")),
        "cached_mask must be on cpu like q, got meta",
    ),
    "mask dtype": (dict(cached_mask=torch.ones(2, 7)), "cached_mask must be bool, got float32"),
    "mask size": (
        dict(cached_mask=torch.ones(2, 6, dtype=torch.bool)),
        "cached_mask must be [2, 7] or [2, 3, 7], got [2, 6]",
    ),
    "mask heads": (
        dict(cached_mask=torch.ones(2, 1, 7, dtype=torch.bool)),
        "cached_mask must be [2, 7] or [2, 3, 7], got [2, 1, 7]",
    ),
    "mask dims": (
        dict(cached_mask=torch.ones(7, dtype=torch.bool)), "cached_mask must be [2, 7] or [2, 3, 7], got [7]",
    ),
}  # fmt: skip


def bad_arguments(name, device="cpu"):
    given = {"q": Q, "k_active": K, "v_active": K, "k_cached": C, "v_cached": C, **BAD[name][0]}
    return {k: v if v.device.type == "meta" else v.to(device) for k, v in given.items()}


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.split_attn(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::split_attn: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    arguments, context = bad_arguments(name), torch.no_grad()
    call = functools.partial(fastops.explain, "split_attn") if path == "explain" else op
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        call(**arguments)
    assert str(error.value) == f"fastops::split_attn: {BAD[name][1]}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["mar", "odd", "no_key", "no_query", "nothing_cached_mask"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device), torch.float32)
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(q, k, v, kc, vc, mask):
        out, lse = fastops.split_attn(q, k, v, kc, vc, cached_mask=mask)
        return out * 2, lse

    with fastops.use_backend("split_attn", backend):
        for b, h, a, n, c in ((2, 3, 20, 12, 40), (3, 4, 7, 33, 65), (4, 5, 9, 10, 50)):
            args = make(b, h, a, n, c, 32, device=device)
            mask = mask_of(b, c, device=device)
            out, lse = f(*args, mask)
            assert reference.error((out / 2, lse), *args, cached_mask=mask) <= reference.BUDGET
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_cost_counts_the_tensors(name, dtype):
    s = sample(name, CPU, dtype)
    out, lse = reference.split_attn(*s.args, **s.kwargs)
    tensors = [out, lse, *s.args, *(v for v in s.kwargs.values() if isinstance(v, torch.Tensor))]
    cost = reference.cost(*s.args, **s.kwargs)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert cost.flops == 4 * out.numel() * (s.args[1].shape[2] + s.args[3].shape[2])


@per_dtype
def test_error_sees_one_wrong_element(dtype):
    args = make(dtype=dtype)
    kwargs = {"cached_mask": mask_of(2, 40)}
    out, lse = reference.split_attn(*args, **kwargs)
    assert reference.error((out, lse), *args, **kwargs) <= reference.BUDGET
    bad = out.clone()
    bad[1, 1, 7, 3] += 0.05 if dtype == torch.bfloat16 else 0.01
    assert reference.error((bad, lse), *args, **kwargs) > reference.BUDGET
    bad = lse.clone()
    bad[0, 2, 9] += 1e-4
    assert reference.error((out, bad), *args, **kwargs) > reference.BUDGET
    ignored = reference.split_attn(*args)  # the mask forgotten
    assert reference.error(ignored, *args, **kwargs) > reference.BUDGET


def test_what_is_tuned_is_what_is_looked_up(monkeypatch):
    page = pytest.importorskip("fastops.triton_ops.split_attn")
    asked = []
    monkeypatch.setattr(page._tuned, "lookup", lambda *a: asked.append((dict(a[2]), a[3])) or dict(page.DEFAULT))
    for case in fastops._registry.registry["split_attn"].tuning(torch.device("meta")):
        page.config_for(case.args[0], case.args[1].shape[2] + case.args[3].shape[2])
        key, size_log2 = asked.pop()
        assert key == case.key
        assert size_log2 == case.size.bit_length() - 1


def test_the_bare_op_is_a_constant():
    q, *rest = make()
    assert not any(t.requires_grad for t in op(q.requires_grad_(), *rest))


def test_explain():
    explanation = fastops.explain("split_attn", *make())
    if explanation.backend == "cpu":
        assert "threads" in explanation.config


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"])
def test_captures_in_a_cuda_graph(backend):
    args = make(a=64, n=64, c=256, device="cuda", dtype=torch.bfloat16)
    mask = mask_of(2, 256, device="cuda")
    fastops.split_attn(*args, cached_mask=mask, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fastops.split_attn(*args, cached_mask=mask, backend=backend)
    args[0].neg_()
    mask.logical_not_()
    graph.replay()
    assert reference.error(got, *args, cached_mask=mask) <= reference.BUDGET


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton"])
def test_more_than_2_to_the_31_elements(backend):
    room = torch.full((2**31 + 2**20,), math.nan, device="cuda", dtype=torch.bfloat16)
    q, *given = make(2, 1, 64, 64, 256, 64, device="cuda", dtype=torch.bfloat16)
    far = [
        torch.as_strided(room, t.shape, (2**31, 2**18, 256, 1), 64 * i).copy_(t) for i, t in enumerate(given)
    ]  # the second batch starts 2^31 elements after the first
    check((q, *far), backend)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["triton"])
def test_runs_on_the_tensor_s_device(backend):
    args = make(device="cuda:1", dtype=torch.bfloat16)
    out, _ = check(args, backend)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
