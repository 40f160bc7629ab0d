import functools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.ops.dense_linear import dense_weight
from fastops.reference import dense_linear as reference
from fastops.testing import available, non_contiguous

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("dense_linear")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")
compiled = pytest.mark.skipif(("cpu", CPU) not in BACKENDS, reason="no compiled CPU kernel")
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
op = torch.ops.fastops.dense_linear


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name)


def make(rows, n, k, *, device=CPU, dtype=torch.float32, seed=0):
    """x, panels, n and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((rows, k), (n, k), (n,)))
    return x, fastops.dense_panels(weight), n, bias


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_within_the_error_budget(name, dtype, backend, device, poison):
    s = sample(name, device, dtype)
    got = fastops.dense_linear(*s.args, **s.kwargs, backend=backend)
    assert got.dtype == dtype
    assert got.shape == (*s.args[0].shape[:-1], s.args[2])
    assert reference.error(got, *s.args, **s.kwargs) <= reference.BUDGET


@per_dtype
@pytest.mark.parametrize(
    "name", ["vector", "rows_1", "rows_7", "rows_14", "rows_29", "long", "long_rows", "one_input", "blocks_of_rows"]
)
def test_every_instruction_set(name, dtype, cpu_isa):
    s = sample(name, CPU, dtype)
    got = fastops.dense_linear(*s.args, **s.kwargs, backend="cpu")
    assert reference.error(got, *s.args, **s.kwargs) <= reference.BUDGET


@compiled
@given(rows=st.integers(0, 40), n=st.integers(0, 70), k=st.integers(0, 1100), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_any_size(rows, n, k, seed):
    for dtype in DTYPES:
        x, panels, _, bias = make(rows, n, k, dtype=dtype, seed=seed)
        got = fastops.dense_linear(x, panels, n, bias=bias, backend="cpu")
        assert reference.error(got, x, panels, n, bias=bias) <= reference.BUDGET


@compiled
def test_positive_numbers_add_up_as_well():
    """A long sum of one sign, whose partial sums are large: the rounding errors of long chains show."""
    x, panels = torch.rand(3, 8000), torch.rand(1, 8000, 32)
    got = fastops.dense_linear(x, panels, 20, backend="cpu")
    assert reference.error(got, x, panels, 20) <= reference.BUDGET


@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 3), (32, 5), (33, 0), (70, 9)])
def test_panels_are_the_weight(n, k):
    weight = torch.randn(k, n).T
    panels = fastops.dense_panels(weight)
    assert panels.shape == (-(-n // 32), k, 32)
    assert panels.is_contiguous()
    assert torch.equal(dense_weight(panels, n), weight)
    assert panels.sum() == pytest.approx(weight.sum().item(), abs=1e-4)
    with pytest.raises(RuntimeError, match=re.escape("fastops::dense_panels: weight must be [N, K], got [3]")):
        fastops.dense_panels(torch.zeros(3))


@compiled
@per_dtype
@pytest.mark.parametrize("rows", [2, 5, 14, 15, 31])
def test_rows_do_not_influence_each_other(rows, dtype):
    x, panels, n, _ = make(rows, 70, 333, dtype=dtype)
    got = fastops.dense_linear(x, panels, n, backend="cpu")
    assert torch.equal(fastops.dense_linear(x.flip(0), panels, n, backend="cpu").flip(0), got)
    x[0] = float("nan")
    poisoned = fastops.dense_linear(x, panels, n, backend="cpu")
    assert poisoned[0].isnan().all()
    assert torch.equal(poisoned[1:], got[1:])


@compiled
@pytest.mark.parametrize("rows", [8, 300])
def test_repeats_and_does_not_depend_on_threads(rows):
    x, panels, n, bias = make(rows, 900, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(fastops.dense_linear(x, panels, n, bias=bias, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@per_backend
@per_dtype
def test_strided_and_misaligned(dtype, backend, device):
    x, panels, n, bias = make(6, 40, 96, device=device, dtype=dtype)
    want = fastops.dense_linear(x, panels, n, bias=bias, backend=backend)
    apart = torch.full((panels.numel() + 3,), float("nan"), device=device, dtype=dtype)[3:].view_as(panels)
    apart.copy_(panels)
    spread = torch.full((80,), float("nan"), device=device, dtype=dtype)[::2].copy_(bias)
    for some in (non_contiguous(x), x.T.contiguous().T):
        got = fastops.dense_linear(some, apart, n, bias=spread, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


@per_backend
def test_autocast_leaves_it_alone(backend, device):
    x, panels, n, _ = make(3, 20, 40, device=device)
    want = fastops.dense_linear(x, panels, n, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(fastops.dense_linear(x, panels, n, backend=backend), want)


X, P, B = torch.zeros(2, 8), torch.zeros(2, 8, 32), torch.zeros(40)
FORM = "panels must be [ceil(out_features / 32), K, 32] = [2, 8, 32], got "
BAD = {
    "x dtype": (dict(x=X.int()), "x must be float32, float16 or bfloat16, got int32"),
    "x dims": (dict(x=torch.zeros(())), "x must have at least 1 dimension, got 0"),
    "out_features": (dict(out_features=-1), "out_features must not be negative, got -1"),
    "panels device": (dict(panels=P.to("meta")), "panels must be on cpu like x, got meta"),
    "panels dtype": (dict(panels=P.half()), "panels must be float32, got float16"),
    "plain weight": (dict(panels=torch.zeros(40, 8)), FORM + "[40, 8]"),
    "panels width": (dict(panels=torch.zeros(2, 9, 32)), FORM + "[2, 9, 32]"),
    "panels count": (dict(panels=torch.zeros(3, 8, 32)), FORM + "[3, 8, 32]"),
    "panels stride": (dict(panels=torch.zeros(2, 32, 8).transpose(1, 2)), "panels must be contiguous"),
    "bias device": (dict(bias=B.to("meta")), "bias must be on cpu like x, got meta"),
    "bias dtype": (dict(bias=B.double()), "bias must be float32, got float64"),
    "bias size": (dict(bias=torch.zeros(4)), "bias must be [40], got [4]"),
    "bias dims": (dict(bias=torch.zeros(40, 1)), "bias must be [40], got [40, 1]"),
}


def bad_arguments(name, device="cpu"):
    given = {"x": X, "panels": P, "out_features": 40, "bias": B, **BAD[name][0]}
    return {
        k: v if not isinstance(v, torch.Tensor) or v.device.type == "meta" else v.to(device) for k, v in given.items()
    }


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.dense_linear(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::dense_linear: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    arguments, context = bad_arguments(name), torch.no_grad()
    call = functools.partial(fastops.explain, "dense_linear") if path == "explain" else op
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        call(**arguments)
    assert str(error.value) == f"fastops::dense_linear: {BAD[name][1]}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["vector", "rows_4", "rows_29", "tensor", "no_inputs", "no_outputs"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device), torch.float32)
    s.args[1].nan_to_num_()
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_once_for_any_number_of_rows(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(x, panels):
        return fastops.dense_linear(x, panels, 40, backend=backend) * 2

    for rows in (3, 7, 40):
        x, panels, n, _ = make(rows, 40, 24, device=device)
        torch.testing.assert_close(f(x, panels), F.linear(x, dense_weight(panels, n)) * 2, rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == 1


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    x, panels, n, bias = make(4, 64, 96, device="cuda")
    op(x, panels, n, bias=bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(x, panels, n, bias=bias)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(got, F.linear(x, dense_weight(panels, n), bias), rtol=1e-4, atol=1e-4)
