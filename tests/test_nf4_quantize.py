import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import nf4_dequant as dequant_reference
from fastops.reference import nf4_quantize as reference
from fastops.testing import available, non_contiguous, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("nf4_quantize")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SAMPLES = [s.name for s in reference.samples(torch.device("cpu"), torch.float32)]
op = torch.ops.fastops.nf4_quantize
CPU = torch.device("cpu")


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name)


def weights(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_reference(name, dtype, backend, device, poison):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    s = sample(name, device, dtype)
    packed, absmax = fastops.nf4_quantize(*s.args, **s.kwargs, backend=backend)
    assert (packed.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    assert packed.device == absmax.device == s.args[0].device
    assert reference.error((packed, absmax), *s.args, **s.kwargs) == 0


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_every_instruction_set_gives_the_same_bits(name, dtype, cpu_isa, poison):
    s = sample(name, CPU, dtype)
    assert reference.error(fastops.nf4_quantize(*s.args, **s.kwargs, backend="cpu"), *s.args, **s.kwargs) == 0


@per_backend
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(blocksize, backend, device, poison):
    w = weights(5, 2511, device=device)
    assert reference.error(fastops.nf4_quantize(w, blocksize, backend=backend), w, blocksize) == 0


@per_backend
@pytest.mark.parametrize("n", [*range(1, 70), 2047, 2048, 2049, 4097, 8193])
def test_lengths(n, backend, device, poison):
    w = weights(n, device=device)
    assert reference.error(fastops.nf4_quantize(w, 32, backend=backend), w, 32) == 0


@per_backend
@per_dtype
def test_strided_and_misaligned_weights(dtype, backend, device):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    w = weights(33, 130, dtype=dtype, device=device)
    want = reference.nf4_quantize(w.cpu())
    for twin in (non_contiguous(w), w.t().contiguous().t(), torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w)):
        packed, absmax = fastops.nf4_quantize(twin, backend=backend)
        assert torch.equal(packed.cpu(), want[0])
        assert torch.equal(absmax.cpu(), want[1])


@per_backend
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-45])
@pytest.mark.parametrize("columns", [64, 65, 70, 71])
def test_extreme_values(columns, value, backend, device):
    w = weights(1, columns, device=device)
    w[0, -3] = value
    assert reference.error(fastops.nf4_quantize(w, backend=backend), w) == 0


@per_backend
def test_a_nan_among_the_codes_sorts_last(backend, device):
    code = torch.linspace(-1, 1, 16)
    code[[3, 9]] = float("nan")
    w = weights(5, 67, device=device)
    got = fastops.nf4_quantize(w, code=code.to(device), backend=backend)
    assert reference.error(got, w, code=code.to(device)) == 0
    assert not set(dequant_reference.unpack(got[0].cpu(), w.numel()).tolist()) & {3, 9}  # no number is nearest to a NaN


@per_backend
def test_values_on_every_decision_boundary(backend, device):
    """A value equal to a midpoint takes the lower code, the next one above it the higher."""
    bounds, _ = reference.midpoints(dequant_reference.code_table(None, CPU))
    one = torch.ones(1)
    w = torch.cat([one, bounds, torch.nextafter(bounds, one), torch.nextafter(bounds, -one), one.expand(18)]).to(device)
    packed, absmax = fastops.nf4_quantize(w, backend=backend)
    nibbles = dequant_reference.unpack(packed.cpu(), w.numel())
    assert absmax.item() == 1
    assert nibbles[1:16].tolist() == list(range(15))
    assert nibbles[16:31].tolist() == list(range(1, 16))
    assert nibbles[31:46].tolist() == list(range(15))


@per_backend
def test_every_half_precision_value(backend, device):
    """All fp16 values in [-1, 1], each in a block whose absmax is 1, so that the value itself meets every boundary."""
    bits = torch.arange(0, 0x3C00 + 1, dtype=torch.int32)
    values = torch.cat([bits, bits | 0x8000]).to(torch.uint16).view(torch.float16)
    values = torch.cat([values, values.new_zeros(-values.numel() % 63)]).view(-1, 63)
    w = torch.cat([values.new_ones(values.shape[0], 1), values], dim=1).to(device)
    assert reference.error(fastops.nf4_quantize(w, backend=backend), w) == 0


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    blocksize=st.sampled_from([32, 64, 128]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_stays_within_half_a_step(n, blocksize, scale, seed, dtype):
    """|w - dequant(quantize(w))| is at most half the widest gap between codes, times the block's absmax."""
    w = (weights(n, seed=seed) * scale).to(dtype)
    packed, absmax = fastops.nf4_quantize(w, blocksize)
    again = fastops.nf4_dequant(packed, absmax, [n], torch.float32, blocksize)
    code = dequant_reference.code_table(None, CPU)
    widest = (code[1:] - code[:-1]).max() / 2
    limit = widest * absmax.repeat_interleave(blocksize)[:n] * (1 + 1e-6)
    assert ((w.float() - again).abs() <= limit + 1e-37).all()


@per_backend
@per_dtype
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(256, 256), (33, 65), (7, 9), (1, 4097)], ids=str)
def test_equals_bitsandbytes_on_the_cpu(shape, quant_type, dtype, backend, device):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(*shape, dtype=dtype)
    want, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type)
    packed, absmax = fastops.nf4_quantize(w.to(device), code=state.code.to(device), backend=backend)
    assert torch.equal(packed.cpu(), want.flatten())
    assert torch.equal(absmax.cpu(), state.absmax)


@pytest.mark.gpu
@per_dtype
def test_equals_bitsandbytes_on_the_gpu_but_for_boundaries(dtype):
    """Its CUDA kernel multiplies differently: a nibble may differ where the value lies within 2 ulp of a midpoint."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(1024, 1024, dtype=dtype, device="cuda")
    want, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    packed, absmax = fastops.nf4_quantize(w)
    assert torch.equal(absmax, state.absmax)
    ours, theirs = (dequant_reference.unpack(p, w.numel()) for p in (packed, want.flatten()))
    scaled = (w.float().flatten().view(-1, 64) / absmax[:, None]).flatten()
    bounds, _ = reference.midpoints(dequant_reference.code_table(None, w.device))
    near = ((scaled[:, None] - bounds).abs() <= 2 * torch.finfo(torch.float32).eps * bounds.abs()).any(dim=1)
    assert ((ours == theirs) | near).all()


@pytest.mark.parametrize("shape", [(256, 256), (33, 65), (7, 9), (300, 64)], ids=str)
def test_double_quantisation_is_as_good_as_bitsandbytes(shape):
    """Same map, offset and scales; its C++ search is not always the nearest value, so ours may only be closer."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weights(*shape)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed, absmax, dq = fastops.nf4_quantize(w, double_quant=True)
    assert torch.equal(dq["absmax_code"], state.state2.code)
    assert torch.equal(dq["absmax_scale"], state.state2.absmax)
    assert torch.equal(dq["absmax_offset"], state.offset)
    exact = fastops.nf4_quantize(w)[1]
    scale = dq["absmax_scale"].repeat_interleave(256)[: absmax.numel()]
    ours, theirs = (dq["absmax_code"][a.long()] * scale + dq["absmax_offset"] for a in (absmax, state.absmax))
    assert ((ours - exact).abs() <= (theirs - exact).abs() * (1 + 1e-6) + 1e-7).all()
    assert (absmax == state.absmax).float().mean() > 0.99 or absmax.numel() == 1
    again = fastops.nf4_dequant(packed, absmax, shape, torch.float32, **dq)
    assert (w - again).abs().mean() < 0.1


def test_double_quantisation_compiles_and_shares_nothing():
    w = weights(64, 65)
    want = fastops.nf4_quantize(w, double_quant=True)
    with torch.inference_mode():
        assert torch.equal(fastops.nf4_quantize(w, double_quant=True)[1], want[1])
    packed, absmax, dq = torch.compile(fastops.nf4_quantize, fullgraph=True, backend="aot_eager")(w, double_quant=True)
    assert torch.equal(packed, want[0])
    assert torch.equal(absmax, want[1])
    dq["absmax_code"].zero_()
    assert fastops.nf4_quantize(w, double_quant=True)[2]["absmax_code"].any()


def test_double_quantisation_of_nothing():
    packed, absmax, dq = fastops.nf4_quantize(torch.zeros(0, 64), double_quant=True)
    assert packed.numel() == absmax.numel() == 0
    assert fastops.nf4_dequant(packed, absmax, [0, 64], torch.float32, **dq).shape == (0, 64)


BAD = {
    "w dtype": (dict(w=torch.zeros(64, dtype=torch.int8)), "w must be float32, float16 or bfloat16, got int8"),
    "w float64": (
        dict(w=torch.zeros(64, dtype=torch.float64)),
        "w must be float32, float16 or bfloat16, got float64",
    ),
    "blocksize": (dict(blocksize=63), "blocksize must be a power of two from 32 to 4096, got 63"),
    "blocksize 0": (dict(blocksize=0), "blocksize must be a power of two from 32 to 4096, got 0"),
    "code size": (dict(code=torch.zeros(17)), "code must have 16 elements, got 17"),
    "code dtype": (dict(code=torch.zeros(16).half()), "code must be float32, got float16"),
    "code device": (dict(code=torch.zeros(16, device="meta")), "code must be on cpu like w, got meta"),
}  # fmt: skip


def bad_arguments(name, device="cpu"):
    moved = {"w": torch.zeros(64), "blocksize": 64, **BAD[name][0]}
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in moved.items()}


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.nf4_quantize(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::nf4_quantize: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake"])
def test_rejects_without_a_named_backend(name, path):
    arguments = bad_arguments(name)
    context = torch.no_grad()
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        op(**arguments)
    assert str(error.value) == f"fastops::nf4_quantize: {BAD[name][1]}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["matrix", "fp4", "odd", "empty"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device), torch.float32)
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(w):
        packed, absmax = fastops.nf4_quantize(w * 2)
        return packed, absmax / 2

    with fastops.use_backend("nf4_quantize", backend):
        for shape in ((64, 96), (33, 128), (65, 131)):
            w = weights(*shape, device=device)
            packed, absmax = f(w)
            assert reference.error((packed, absmax), w) == 0
    assert compiler.frame_count == 1


@per_backend
def test_deterministic(backend, device):
    w = weights(257, 129, device=device)
    first, second = (fastops.nf4_quantize(w, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_cost_counts_the_tensors(name, dtype):
    s = sample(name, CPU, dtype)
    tensors = [*reference.nf4_quantize(*s.args, **s.kwargs), s.args[0], *s.kwargs.values()]
    assert reference.cost(*s.args, **s.kwargs).bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_error_counts_what_differs():
    w = weights(4, 64)
    packed, absmax = reference.nf4_quantize(w)
    packed[5] ^= 1
    absmax[2] += 1
    assert reference.error((packed, absmax), w) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captures_in_a_cuda_graph(backend):
    w = weights(256, 512, device="cuda")
    code = torch.linspace(-1, 1, 16, device="cuda")
    fastops.nf4_quantize(w, code=code, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastops.nf4_quantize(w, code=code, backend=backend)
    w.neg_()
    graph.replay()
    assert reference.error(out, w, code=code) == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_runs_on_the_tensor_s_device(backend):
    w = weights(64, 128, device="cuda:1")
    packed, absmax = fastops.nf4_quantize(w, backend=backend)
    assert packed.device == absmax.device == torch.device("cuda:1")
    assert reference.error((packed, absmax), w) == 0
    assert torch.cuda.current_device() == 0
