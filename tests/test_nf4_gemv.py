"""nf4_gemv, nf4_linear and nf4_linear_dx: every test that makes sense for each of them, on every backend."""

import doctest
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import fastops
from fastops.reference import nf4_gemv as reference
from fastops.reference._truth import truth
from fastops.reference.nf4_dequant import nf4_dequant, random_inputs
from fastops.testing import available, non_contiguous, trusted

OPS = ("nf4_gemv", "nf4_linear", "nf4_linear_dx")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRUTH = {op: truth(op, "nf4_gemv") for op in OPS}
CPU = torch.device("cpu")


def backends(*ops):
    """Parametrises over (op, backend, device)."""
    combinations = [(op, *where) for op in ops for where in available(op)]
    ids = [f"{op}-{backend}-{device.type}" for op, backend, device in combinations]
    return pytest.mark.parametrize(("op", "backend", "device"), combinations, ids=ids)


per_backend = backends(*OPS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SAMPLES = [(op, s.name) for op in OPS for s in TRUTH[op].samples(CPU, torch.float32)]


def run(op, sample, **more):
    args, kwargs = sample
    return getattr(fastops, op)(*args, **kwargs, **more)


def error(op, got, sample):
    args, kwargs = sample
    return TRUTH[op].error(got, *args, **kwargs)


def find(op, name, device, dtype):
    return next((s.args, s.kwargs) for s in TRUTH[op].samples(device, dtype) if s.name == name)


def make(
    op,
    n=70,
    k=96,
    rows=(5,),
    blocksize=64,
    *,
    device="cpu",
    dtype=torch.float32,
    bias=False,
    double_quant=False,
    seed=0,
):
    """(args, kwargs) of a call of `op`; one row for nf4_gemv."""
    packed, absmax, kwargs = random_inputs(n * k, blocksize, torch.device(device), double_quant=double_quant, seed=seed)
    given, wanted = (n, k) if op == "nf4_linear_dx" else (k, n)
    rows = (1,) if op == "nf4_gemv" else rows
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, given, generator=generator).to(device, dtype)
    if bias and op != "nf4_linear_dx":
        kwargs["bias"] = torch.randn(n, generator=generator).to(device, dtype)
    return (x, packed, absmax, wanted, blocksize), kwargs


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


@pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op}-{name}" for op, name in SAMPLES])
@per_dtype
def test_matches_the_truth(op, name, dtype, poison):
    for backend, device in available(op):
        if not trusted(backend, device, dtype):
            continue
        (x, _, _, wanted, _), _ = sample = find(op, name, device, dtype)
        got = run(op, sample, backend=backend)
        assert (got.dtype, got.device) == (dtype, x.device)
        assert got.shape == (*x.shape[:-1], wanted)
        assert got.is_contiguous()
        assert error(op, got, sample) <= TRUTH[op].budget, backend


@pytest.mark.parametrize("op", OPS)
@per_dtype
def test_every_instruction_set(op, dtype, cpu_isa, poison):
    if "cpu" not in fastops._registry.registry[op].available(CPU):
        pytest.skip("no compiled CPU kernel")
    for s in TRUTH[op].samples(CPU, dtype):
        sample = (s.args, s.kwargs)
        assert error(op, run(op, sample, backend="cpu"), sample) <= TRUTH[op].budget, s.name


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@per_backend
def test_blocksizes(blocksize, op, backend, device, poison):
    for k in (513, 544):  # blocks that start anywhere, and at a word
        sample = make(op, 37, k, (3,), blocksize, device=device, dtype=torch.float16, double_quant=True)
        assert error(op, run(op, sample, backend=backend), sample) <= TRUTH[op].budget


@per_backend
def test_every_number_of_inputs_and_outputs(op, backend, device, poison):
    sizes = [*range(1, 36), *range(63, 67), *range(127, 131), 255, 257]
    for n, k in [(3, size) for size in sizes] + [(size, 34) for size in sizes]:
        sample = make(op, n, k, (2,), 32, device=device, bias=True)
        assert error(op, run(op, sample, backend=backend), sample) <= TRUTH[op].budget, (n, k)


@backends("nf4_linear", "nf4_linear_dx")
def test_every_number_of_rows(op, backend, device, poison):
    for rows in [*range(36), *range(63, 67), *range(127, 131), 257]:
        sample = make(op, 21, 70, (rows,), device=device, dtype=torch.float16, bias=True)
        assert error(op, run(op, sample, backend=backend), sample) <= TRUTH[op].budget, rows


@settings(deadline=None, max_examples=60)
@given(
    op=st.sampled_from(OPS),
    n=st.integers(0, 90),
    k=st.integers(0, 200),
    rows=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(op, n, k, rows, blocksize, dtype, bias, double_quant, seed):
    """On the backend that would be chosen, against the weights that nf4_dequant makes."""
    sample = make(op, n, k, rows, blocksize, dtype=dtype, bias=bias, double_quant=double_quant, seed=seed)
    (x, packed, absmax, *_), kwargs = sample
    got = run(op, sample)
    assert error(op, got, sample) <= TRUTH[op].budget
    scales = {key: value for key, value in kwargs.items() if key != "bias"}
    w = nf4_dequant(packed, absmax, (n, k), torch.float64, blocksize, **scales)
    want = x.double() @ w if op == "nf4_linear_dx" else x.double() @ w.T + kwargs.get("bias", torch.zeros(n)).double()
    distance = (got.double() - want).norm()
    assert distance <= 4 * torch.finfo(dtype).eps * want.norm() + 1e-4 * torch.finfo(dtype).eps * got.numel()


@per_backend
@per_dtype
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_and_strided_inputs(offset, dtype, op, backend, device, poison):
    skip_untrusted(backend, device, dtype)
    (x, packed, absmax, *rest), kwargs = make(
        op, 65, 130, (3, 2), device=device, dtype=dtype, bias=True, double_quant=True
    )

    def shifted(t):
        return torch.cat([t.new_full((offset,), 3), t.reshape(-1)])[offset:].reshape(t.shape)

    def everywhere(change):
        spread = {key: change(value) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        return (change(x), change(packed), change(absmax), *rest), spread

    for moved in (
        everywhere(shifted),
        everywhere(non_contiguous),
        ((x[..., :1].expand(x.shape), packed, absmax, *rest), kwargs),
        ((x.mT.contiguous().mT, packed.reshape(5, -1).T.contiguous().T, absmax, *rest), kwargs),
    ):
        got = run(op, moved, backend=backend)
        assert got.is_contiguous()
        assert error(op, got, moved) <= TRUTH[op].budget


@backends("nf4_linear", "nf4_linear_dx")
@per_dtype
@pytest.mark.parametrize("rows", [2, 5, 33])
def test_rows_do_not_influence_each_other(rows, dtype, op, backend, device):
    skip_untrusted(backend, device, dtype)
    (x, *rest), kwargs = make(op, 70, 96, (rows,), device=device, dtype=dtype)
    want = run(op, ((x, *rest), kwargs), backend=backend)
    for value in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[1] = value
        got = run(op, ((spoilt, *rest), kwargs), backend=backend)
        others = [i for i in range(rows) if i != 1]
        assert torch.equal(got[others], want[others])
        assert not got[1].isfinite().any()


@backends("nf4_gemv", "nf4_linear")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_scale_spoils_its_output_only(value, op, backend, device):
    (x, packed, absmax, *rest), kwargs = make(op, 20, 128, device=device)
    want = run(op, ((x, packed, absmax, *rest), kwargs), backend=backend)
    spoilt = absmax.clone()
    spoilt[7] = value  # blocks of 64: in row 3
    got = run(op, ((x, packed, spoilt, *rest), kwargs), backend=backend)
    others = [i for i in range(20) if i != 3]
    assert torch.equal(got[:, others], want[:, others])
    assert not got[:, 3].isfinite().any()


@per_backend
def test_deterministic(op, backend, device):
    sample = make(op, 301, 1030, (17,), device=device, dtype=torch.float16, double_quant=True)
    first, *others = (run(op, sample, backend=backend) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def dq(**changes):
    """A double quantisation of 96 blocks."""
    whole = dict(absmax=torch.zeros(96, dtype=torch.uint8), absmax_code=torch.zeros(256), absmax_scale=torch.zeros(1))
    return {**whole, **changes}


# Of a weight [64, 96]; "{x}" and "{other}" stand for the names in each schema.
BAD = {
    "x dtype": (dict(x=torch.zeros(1, 96).double()), "{x} must be float32, float16 or bfloat16, got float64"),
    "x integer": (dict(x=torch.zeros(1, 96).int()), "{x} must be float32, float16 or bfloat16, got int32"),
    "x scalar": (dict(x=torch.zeros(())), "{x} must have at least 1 dimension, got 0"),
    "negative size": (dict(other=-1), "{other} must not be negative, got -1"),
    "packed device": (
        dict(packed=torch.zeros(3072, dtype=torch.uint8, device="meta")),
        "packed must be on cpu like {x}, got meta",
    ),
    "too many weights": (
        dict(other=2**62), f"{{other}} must give a weight of fewer than 2^63 elements, got {2**62}",
    ),
    "packed dtype": (dict(packed=torch.zeros(3072)), "packed must be uint8, got float32"),
    "packed too short": (
        dict(packed=torch.zeros(3071, dtype=torch.uint8)),
        "packed must have ceil(n / 2) = 3072 elements for n = 6144 weights, got 3071",
    ),
    "packed too long": (
        dict(packed=torch.zeros(64, 49, dtype=torch.uint8)),
        "packed must have ceil(n / 2) = 3072 elements for n = 6144 weights, got 3136",
    ),
    "no weights": (dict(other=0), "packed must have ceil(n / 2) = 0 elements for n = 0 weights, got 3072"),
    "absmax device": (dict(absmax=torch.zeros(96, device="meta")), "absmax must be on cpu like packed, got meta"),
    "absmax dtype": (
        dict(absmax=torch.zeros(96, dtype=torch.float16)),
        "absmax must be float32, or uint8 together with absmax_code and absmax_scale, got float16",
    ),
    "absmax uint8 alone": (
        dict(absmax=torch.zeros(96, dtype=torch.uint8)),
        "absmax must be float32, or uint8 together with absmax_code and absmax_scale, got uint8",
    ),
    "absmax too short": (
        dict(absmax=torch.zeros(95)),
        "absmax must have ceil(n / blocksize) = 96 elements for n = 6144 weights, got 95",
    ),
    "blocksize 48": (dict(blocksize=48), "blocksize must be a power of two from 32 to 4096, got 48"),
    "blocksize 16": (dict(blocksize=16), "blocksize must be a power of two from 32 to 4096, got 16"),
    "blocksize -64": (dict(blocksize=-64), "blocksize must be a power of two from 32 to 4096, got -64"),
    "blocksize 8192": (dict(blocksize=8192), "blocksize must be a power of two from 32 to 4096, got 8192"),
    "code size": (dict(code=torch.zeros(15)), "code must have 16 elements, got 15"),
    "code dtype": (dict(code=torch.zeros(16, dtype=torch.float64)), "code must be float32, got float64"),
    "double quant without scale": (
        dq(absmax_scale=None), "absmax_code and absmax_scale must be given together, got only absmax_code",
    ),
    "offset alone": (
        dq(absmax_code=None, absmax_scale=None, absmax_offset=torch.zeros(1)),
        "absmax_code and absmax_scale must be given together, got only absmax_offset",
    ),
    "double quant of fp32": (dq(absmax=torch.zeros(96)), "absmax must be uint8, got float32"),
    "absmax_code size": (dq(absmax_code=torch.zeros(16)), "absmax_code must have 256 elements, got 16"),
    "absmax_scale size": (
        dq(absmax_scale=torch.zeros(2)),
        "absmax_scale must have ceil(n_blocks / absmax_blocksize) = 1 elements, got 2",
    ),
    "absmax_offset size": (dq(absmax_offset=torch.zeros(2)), "absmax_offset must have 1 element, got 2"),
    "absmax_blocksize": (
        dq(absmax_blocksize=100), "absmax_blocksize must be a power of two from 32 to 4096, got 100",
    ),
}  # fmt: skip
BAD_BIAS = {
    "bias device": (dict(bias=torch.zeros(64, device="meta")), "bias must be on cpu like x, got meta"),
    "bias dtype": (dict(bias=torch.zeros(64).half()), "bias must be float32, got float16"),
    "bias size": (dict(bias=torch.zeros(63)), "bias must have out_features = 64 elements, got 63"),
}
BAD_ROWS = {
    "two rows": (dict(x=torch.zeros(2, 96)), "x must hold one row, got [2, 96]"),
    "no row": (dict(x=torch.zeros(1, 0, 96)), "x must hold one row, got [1, 0, 96]"),
}
FAULTS = [(op, name) for op in OPS for name in BAD]
FAULTS += [(op, name) for op in OPS[:2] for name in BAD_BIAS] + [("nf4_gemv", name) for name in BAD_ROWS]
per_fault = pytest.mark.parametrize(("op", "name"), FAULTS, ids=[f"{op}-{name}" for op, name in FAULTS])


def bad_call(op, name, device="cpu"):
    """(keyword arguments of the call, the whole message)."""
    changes, message = {**BAD, **BAD_BIAS, **BAD_ROWS}[name]
    left, other = ("dy", "in_features") if op == "nf4_linear_dx" else ("x", "out_features")
    (x, packed, absmax, wanted, blocksize), _ = make(op, 64, 96)
    given = {**dict(x=x, packed=packed, absmax=absmax, other=wanted, blocksize=blocksize), **changes}
    if op == "nf4_linear_dx" and given["x"].shape[-1:] == (96,):
        given["x"] = given["x"][..., :64]
    given = {{"x": left, "other": other}.get(key, key): value for key, value in given.items()}
    given = {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for key, value in given.items()
    }
    return given, f"fastops::{op}: {message.format(x=left, other=other)}"


@per_fault
def test_rejects(op, name):
    for backend, device in available(op):
        arguments, message = bad_call(op, name, device)
        with pytest.raises(RuntimeError) as raised:
            getattr(fastops, op)(**arguments, backend=backend)
        where = "on cuda:0" if device.type == "cuda" else "on cpu"
        assert str(raised.value) == message.replace("on cpu", where), backend


@per_fault
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(op, name, path):
    arguments, message = bad_call(op, name)
    context = torch.no_grad()
    call = getattr(torch.ops.fastops, op)
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif path == "explain":
        call = functools.partial(fastops.explain, op)
    with context, pytest.raises(RuntimeError) as raised:
        call(**arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["vector", "bias", "user_code", "odd_double_quant", "no_outputs", "no_inputs"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, name, device):
    args, kwargs = find(op, name, torch.device(device), torch.float32)
    torch.library.opcheck(getattr(torch.ops.fastops, op).default, args, kwargs)


@backends("nf4_linear", "nf4_linear_dx")
def test_rows_do_not_recompile(op, backend, device):
    compiler = CompileCounter()
    (_, packed, absmax, wanted, blocksize), kwargs = make(op, device=device, double_quant=True)

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(x):
        return getattr(fastops, op)(x, packed, absmax, wanted, blocksize, **kwargs) * 2

    with fastops.use_backend(op, backend):
        for rows in (3, 7, 40):
            (x, *rest), _ = make(op, rows=(rows, 2), device=device, double_quant=True)
            assert torch.equal(f(x), run(op, ((x, *rest), kwargs)) * 2)
    assert compiler.frame_count == 1


@per_backend
def test_weights_do_not_recompile(op, backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(x, packed, absmax, like):
        return getattr(fastops, op)(x, packed, absmax, like.shape[0]) + like

    with fastops.use_backend(op, backend):
        for n, k in ((48, 160), (32, 130), (65, 132)):  # no size equals another one by chance
            args, kwargs = make(op, n, k, (3, 7), device=device)
            got = f(*args[:3], torch.ones(args[3], device=device))
            assert torch.equal(got, run(op, (args, kwargs)) + 1)
    assert compiler.frame_count == 1


@pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op}-{name}" for op, name in SAMPLES])
def test_cost_counts_the_tensors(op, name):
    args, kwargs = find(op, name, CPU, torch.bfloat16)
    out = getattr(reference, op)(*args, **kwargs)
    tensors = [out, *(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))]
    cost = TRUTH[op].cost(*args, **kwargs)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert cost.flops == 2 * out.numel() * args[0].shape[-1]


@pytest.mark.parametrize("op", OPS)
@per_dtype
def test_error_sees_one_wrong_element(op, dtype, monkeypatch):
    sample = make(op, 130, 300, (5,), dtype=dtype, bias=True, double_quant=True)
    good = getattr(reference, op)(*sample[0], **sample[1])
    whole = error(op, good, sample)
    assert whole <= TRUTH[op].budget
    monkeypatch.setattr(reference, "CHUNK", 1000)  # a few rows of odd length at a time
    assert error(op, good, sample) == pytest.approx(whole, rel=1e-6)
    bad = good.clone()
    largest = bad.abs().argmax()
    bad.view(-1)[largest] *= 1.04 if dtype == torch.bfloat16 else 1.01
    assert error(op, bad, sample) > TRUTH[op].budget
    assert error(op, torch.zeros_like(good), sample) > TRUTH[op].budget
    with pytest.raises(ValueError, match="shape"):
        error(op, good[..., :-1], sample)


# Gradients


@backends("nf4_linear", "nf4_gemv")
@per_dtype
@pytest.mark.parametrize("rows", [(), (7,), (2, 3), (0,)], ids=str)
def test_gradients(rows, dtype, op, backend, device):
    skip_untrusted(backend, device, dtype)
    if op == "nf4_gemv" and rows not in ((), (7,)):
        pytest.skip("one row")
    args, kwargs = make(op, 70, 96, rows, device=device, dtype=dtype, bias=True, double_quant=True)
    x, bias = args[0].requires_grad_(), kwargs["bias"].requires_grad_()
    y = run(op, (args, kwargs), backend=backend)
    assert torch.equal(y, run(op, ((x.detach(), *args[1:]), {**kwargs, "bias": bias.detach()}), backend=backend))
    dy = torch.randn(*y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    y.backward(non_contiguous(dy))
    scales = {key: value for key, value in kwargs.items() if key != "bias"}
    assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
    assert TRUTH["nf4_linear_dx"].error(x.grad, dy, *args[1:3], 96, args[4], **scales) <= 4
    torch.testing.assert_close(bias.grad, dy.reshape(-1, 70).double().sum(0).to(dtype))


@backends("nf4_linear", "nf4_gemv")
def test_gradients_equal_those_of_dense_weights(op, backend, device):
    args, kwargs = make(op, 33, 101, (2, 3), device=device, bias=True)
    kwargs["bias"] = kwargs["bias"].reshape(1, -1)
    weight = nf4_dequant(*args[1:3], (33, 101), torch.float64, 64)
    ours = [args[0].requires_grad_(), kwargs["bias"].requires_grad_()]
    dense = [t.detach().double().requires_grad_() for t in ours]
    run(op, (args, kwargs), backend=backend).square().sum().backward()
    functional.linear(dense[0], weight, dense[1].reshape(-1)).square().sum().backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", OPS[:2])
def test_only_what_asks_gets_a_gradient(op):
    (x, *rest), kwargs = make(op, bias=True)
    bias = kwargs.pop("bias")
    assert run(op, ((x, *rest), kwargs), bias=bias).grad_fn is None
    y = run(op, ((x, *rest), kwargs), bias=bias.requires_grad_())
    y.sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full_like(bias, x.shape[0]))
    x.requires_grad_()
    with torch.no_grad():
        assert run(op, ((x, *rest), kwargs)).grad_fn is None
    with torch.inference_mode():
        assert run(op, ((x, *rest), kwargs)).grad_fn is None
    run(op, ((x, *rest), kwargs)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("op", OPS)
def test_the_bare_op_is_a_constant(op):
    (x, *rest), kwargs = make(op)
    assert not getattr(torch.ops.fastops, op)(x.requires_grad_(), *rest, **kwargs).requires_grad
    if op == "nf4_linear_dx":
        assert not run(op, ((x, *rest), kwargs)).requires_grad


@pytest.mark.parametrize("op", OPS[:2])
def test_a_second_derivative_is_refused(op):
    (x, *rest), kwargs = make(op)
    y = run(op, ((x.requires_grad_(), *rest), kwargs))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_functional_gradient():
    (x, *rest), _ = make("nf4_linear")
    got = torch.func.grad(lambda x: fastops.nf4_linear(x, *rest).sum())(x)
    x.requires_grad_()
    fastops.nf4_linear(x, *rest).sum().backward()
    assert torch.equal(got, x.grad)


@per_backend
def test_autocast_changes_nothing(op, backend, device):
    (x, *rest), kwargs = make(op, device=device)
    want = run(op, ((x, *rest), kwargs), backend=backend)
    x.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(op, ((x, *rest), kwargs), backend=backend)
        if got.requires_grad:
            got.sum().backward()
    assert torch.equal(got, want)
    assert op == "nf4_linear_dx" or x.grad.dtype == torch.float32


@backends("nf4_linear", "nf4_gemv")
@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
def test_gradients_compile(named, op, backend, device):
    compiler = CompileCounterWithBackend("aot_eager")
    (_, packed, absmax, wanted, blocksize), kwargs = make(op, device=device, bias=True, double_quant=True)
    bias = kwargs.pop("bias")
    chosen = backend if named else None

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(x, bias):
        y = getattr(fastops, op)(x, packed, absmax, wanted, blocksize, bias=bias, **kwargs, backend=chosen)
        return y.square().sum()

    with fastops.use_backend(op, None if named else backend):
        for rows in (3, 7, 40):
            x = make(op, rows=(rows, 2), device=device)[0][0].requires_grad_()
            b = bias.clone().requires_grad_()
            got = torch.autograd.grad(f(x, b), (x, b))
            y = getattr(fastops, op)(x, packed, absmax, wanted, blocksize, bias=b, **kwargs, backend=chosen)
            want = torch.autograd.grad(y.square().sum(), (x, b))
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert compiler.frame_count == 1


# What surrounds them


def test_the_page_finds_what_each_op_owns():
    """Ops that share a page each find their own there, and else the family's."""
    assert TRUTH["nf4_linear"].cost is TRUTH["nf4_gemv"].cost is reference.cost
    assert TRUTH["nf4_linear"].error is reference.error
    assert TRUTH["nf4_linear_dx"].error is reference.nf4_linear_dx_error
    assert TRUTH["nf4_linear_dx"].samples is reference.nf4_linear_dx_samples
    assert {t.budget for t in TRUTH.values()} == {4.0}


@pytest.mark.parametrize("op", OPS)
def test_triton_finds_each_op_s_launch(op, monkeypatch):
    class Page:
        launch = "nf4_gemv"
        nf4_linear_launch = "nf4_linear"
        nf4_linear_dx_launch = "nf4_linear_dx"

    machinery = fastops._registry.registry[op]
    monkeypatch.setattr(machinery, "triton_page", lambda: Page)
    assert machinery.triton_member("launch") == op


@pytest.mark.parametrize("op", OPS)
def test_explain(op):
    args, kwargs = make(op, bias=True)
    for backend, device in available(op):
        if device.type == "cpu":
            assert str(fastops.explain(op, *args, **kwargs, backend=backend)).startswith(f"fastops::{op} on cpu")


def test_the_docstring_s_example():
    names = {"fastops": fastops, "weight": torch.randn(20, 64), "x": torch.randn(3, 64), "bias": torch.randn(20)}
    (example,) = doctest.DocTestFinder(recurse=False).find(fastops.nf4_linear, "nf4_linear", globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    got = example.globs["y"]
    assert (got - functional.linear(names["x"], names["weight"], names["bias"])).norm() < 0.3 * got.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_captures_in_a_cuda_graph(rows, op, backend):
    sample = make(op, 256, 512, (rows,), device="cuda", dtype=torch.bfloat16, bias=True, double_quant=True)
    run(op, sample, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(op, sample, backend=backend)
    x, packed = sample[0][:2]
    packed.bitwise_xor_(0x5A)
    x.neg_()
    out.zero_()
    graph.replay()
    assert error(op, out, sample) <= TRUTH[op].budget


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_more_than_2_to_the_31_weights(rows, op, backend):
    if op == "nf4_gemv" and rows > 1:
        pytest.skip("one row")
    n, k = 2**16 + 1, 2**15 + 64
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(n * k // 64, device="cuda")
    given, wanted = (n, k) if op == "nf4_linear_dx" else (k, n)
    x = torch.randn(rows, given, device="cuda", dtype=torch.bfloat16)
    sample = ((x, packed, absmax, wanted, 64), {})
    assert error(op, run(op, sample, backend=backend), sample) <= TRUTH[op].budget


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS[1:])
def test_more_than_2_to_the_31_outputs(op, backend):
    rows, wide, narrow = 2**16 + 1, 2**15, 32
    n, k = (narrow, wide) if op == "nf4_linear_dx" else (wide, narrow)
    (x, *rest), _ = make(op, n, k, (rows,), device="cuda", dtype=torch.bfloat16)
    got = run(op, ((x, *rest), {}), backend=backend)
    for some in (slice(0, 8), slice(rows - 8, rows)):
        assert error(op, got[some], ((x[some], *rest), {})) <= TRUTH[op].budget


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_tensor_s_device(op, backend):
    sample = make(op, 128, 256, device="cuda:1", dtype=torch.bfloat16)
    assert torch.cuda.current_device() == 0
    got = run(op, sample, backend=backend)
    assert got.device == torch.device("cuda:1")
    assert error(op, got, sample) <= TRUTH[op].budget
    assert torch.cuda.current_device() == 0
