import functools
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import nf4_dequant as reference
from fastops.testing import available, non_contiguous, poison, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = available("nf4_dequant")
IDS = [f"{backend}-{device.type}" for backend, device in BACKENDS]
per_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=IDS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SAMPLES = [s.name for s in reference.samples(torch.device("cpu"), torch.float32)]
op = torch.ops.fastops.nf4_dequant


def sample(name, device, dtype):
    return next(s for s in reference.samples(device, dtype) if s.name == name)


def inputs(shape=(64, 96), blocksize=64, device="cpu", **flags):
    n = shape[0] * shape[1]
    packed, absmax, kwargs = reference.random_inputs(n, blocksize, torch.device(device), **flags)
    return (packed, absmax, list(shape), torch.float32, blocksize), kwargs


@per_backend
@per_dtype
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_reference(name, dtype, backend, device, poison):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    s = sample(name, device, dtype)
    got = fastops.nf4_dequant(*s.args, **s.kwargs, backend=backend)
    assert got.dtype == dtype
    assert list(got.shape) == s.args[2]
    assert got.device == s.args[0].device
    assert reference.error(got, *s.args, **s.kwargs) <= reference.BUDGET
    assert torch.equal(got, reference.nf4_dequant(*s.args, **s.kwargs))


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_every_instruction_set_gives_the_same_bits(name, dtype, cpu_isa, poison):
    s = sample(name, torch.device("cpu"), dtype)
    got = fastops.nf4_dequant(*s.args, **s.kwargs, backend="cpu")
    assert torch.equal(got, reference.nf4_dequant(*s.args, **s.kwargs))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@per_backend
def test_blocksizes(blocksize, backend, device):
    args, kwargs = inputs((37, 513), blocksize, device, double_quant=True)
    got = fastops.nf4_dequant(*args, **kwargs, backend=backend)
    assert torch.equal(got, reference.nf4_dequant(*args, **kwargs))


@per_backend
@pytest.mark.parametrize("n", [*range(1, 70), 2047, 2048, 2049, 8191, 8193, 16385])
def test_lengths(n, backend, device, poison):
    args, kwargs = inputs((1, n), 32, device)
    got = fastops.nf4_dequant(*args, **kwargs, backend=backend)
    assert torch.equal(got, reference.nf4_dequant(*args, **kwargs))


@per_backend
@per_dtype
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_and_strided_inputs(offset, dtype, backend, device):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    (packed, absmax, shape, _, blocksize), kwargs = inputs((65, 130), 64, device, double_quant=True)
    args = (packed, absmax, shape, dtype, blocksize)
    want = reference.nf4_dequant(*args, **kwargs)
    shifted = torch.cat([packed.new_full((offset,), 255), packed])[offset:]
    assert torch.equal(fastops.nf4_dequant(shifted, *args[1:], **kwargs, backend=backend), want)
    spread = {k: non_contiguous(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    got = fastops.nf4_dequant(non_contiguous(packed), non_contiguous(absmax), *args[2:], **spread, backend=backend)
    assert torch.equal(got, want)


@per_backend
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e-40, 3e38, -1.0])
@per_dtype
def test_extreme_scales(value, dtype, backend, device):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    (packed, absmax, shape, _, blocksize), _ = inputs((4, 64), 64, device)
    absmax[1] = value
    got = fastops.nf4_dequant(packed, absmax, shape, dtype, blocksize, backend=backend)
    want = reference.nf4_dequant(packed, absmax, shape, dtype, blocksize)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@per_backend
@per_dtype
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double_quant"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(256, 256), (33, 66), (64, 4096)], ids=str)
def test_equals_bitsandbytes(shape, quant_type, nested, dtype, backend, device):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=nested)
    dq = {}
    if nested:
        dq = {"absmax_code": state.state2.code, "absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
    got = fastops.nf4_dequant(packed, state.absmax, w.shape, dtype, 64, code=state.code, **dq, backend=backend)
    if device.type == "cpu" and dtype == torch.float16:
        state.dtype = torch.float32  # on some CPUs its fp16 arithmetic is not fp32 rounded once: take its fp32
    assert torch.equal(got, bnb.dequantize_4bit(packed, state).to(dtype))


BAD = {
    "packed dtype": (dict(packed=torch.zeros(3072)), "packed must be uint8, got float32"),
    "packed too short": (
        dict(packed=torch.zeros(3071, dtype=torch.uint8)),
        "packed must have ceil(n / 2) = 3072 elements for n = 6144 weights, got 3071",
    ),
    "packed too long": (
        dict(packed=torch.zeros(3073, dtype=torch.uint8)),
        "packed must have ceil(n / 2) = 3072 elements for n = 6144 weights, got 3073",
    ),
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
    "absmax device": (dict(absmax=torch.zeros(96, device="meta")), "absmax must be on cpu like packed, got meta"),
    "blocksize 48": (dict(blocksize=48), "blocksize must be a power of two from 32 to 4096, got 48"),
    "blocksize 16": (dict(blocksize=16), "blocksize must be a power of two from 32 to 4096, got 16"),
    "blocksize 0": (dict(blocksize=0), "blocksize must be a power of two from 32 to 4096, got 0"),
    "blocksize -64": (dict(blocksize=-64), "blocksize must be a power of two from 32 to 4096, got -64"),
    "blocksize 8192": (dict(blocksize=8192), "blocksize must be a power of two from 32 to 4096, got 8192"),
    "negative shape": (dict(shape=[-64, -96]), "shape must have no negative size, got [-64, -96]"),
    "overflowing shape": (
        dict(shape=[2**20, 2**44 + 1]),
        f"shape must have fewer than 2^63 weights, got [{2**20}, {2**44 + 1}]",
    ),
    "dtype": (dict(dtype=torch.int32), "dtype must be float32, float16 or bfloat16, got int32"),
    "code size": (dict(code=torch.zeros(15)), "code must have 16 elements, got 15"),
    "code dtype": (dict(code=torch.zeros(16, dtype=torch.float64)), "code must be float32, got float64"),
    "double quant without scale": (
        dict(absmax=torch.zeros(96, dtype=torch.uint8), absmax_code=torch.zeros(256)),
        "absmax_code and absmax_scale must be given together, got only absmax_code",
    ),
    "offset alone": (
        dict(absmax=torch.zeros(96, dtype=torch.uint8), absmax_offset=torch.zeros(1)),
        "absmax_code and absmax_scale must be given together, got only absmax_offset",
    ),
    "double quant of fp32": (
        dict(absmax_code=torch.zeros(256), absmax_scale=torch.zeros(1)),
        "absmax must be uint8, got float32",
    ),
    "absmax_code size": (
        dict(absmax=torch.zeros(96, dtype=torch.uint8), absmax_code=torch.zeros(16), absmax_scale=torch.zeros(1)),
        "absmax_code must have 256 elements, got 16",
    ),
    "absmax_scale size": (
        dict(absmax=torch.zeros(96, dtype=torch.uint8), absmax_code=torch.zeros(256), absmax_scale=torch.zeros(2)),
        "absmax_scale must have ceil(n_blocks / absmax_blocksize) = 1 elements, got 2",
    ),
    "absmax_offset size": (
        dict(
            absmax=torch.zeros(96, dtype=torch.uint8),
            absmax_code=torch.zeros(256),
            absmax_scale=torch.zeros(1),
            absmax_offset=torch.zeros(2),
        ),
        "absmax_offset must have 1 element, got 2",
    ),
    "absmax_blocksize": (
        dict(
            absmax=torch.zeros(96, dtype=torch.uint8),
            absmax_code=torch.zeros(256),
            absmax_scale=torch.zeros(1),
            absmax_blocksize=100,
        ),
        "absmax_blocksize must be a power of two from 32 to 4096, got 100",
    ),
}  # fmt: skip


def bad_arguments(name, device="cpu"):
    (packed, absmax, shape, dtype, blocksize), _ = inputs()
    given = dict(packed=packed, absmax=absmax, shape=shape, dtype=dtype, blocksize=blocksize)
    moved = {**given, **BAD[name][0]}
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in moved.items()}


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.nf4_dequant(**bad_arguments(name, device), backend=backend)
    assert str(error.value) == f"fastops::nf4_dequant: {message}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake"])
def test_rejects_without_a_named_backend(name, path):
    arguments = bad_arguments(name)
    message = BAD[name][1]
    if path == "fake":
        mode = FakeTensorMode()
        arguments = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        context = mode
    else:
        context = torch.no_grad()
    with context, pytest.raises(RuntimeError) as error:
        op(**arguments)
    assert str(error.value) == f"fastops::nf4_dequant: {message}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["matrix", "double_quant", "user_code", "odd", "empty"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device), torch.float32)
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(packed, absmax, x):
        return fastops.nf4_dequant(packed, absmax, [x.shape[0], x.shape[1]], torch.float16) + x

    with fastops.use_backend("nf4_dequant", backend):
        for shape in ((48, 160), (32, 128), (65, 130)):  # no size equals another one by chance
            (packed, absmax, *_), _ = inputs(shape, device=device)
            x = torch.ones(shape, dtype=torch.float16, device=device)
            want = reference.nf4_dequant(packed, absmax, shape, torch.float16) + 1
            assert torch.equal(f(packed, absmax, x), want)
    assert compiler.frame_count == 1


@per_backend
def test_deterministic(backend, device):
    args, kwargs = inputs((128, 1030), device=device, double_quant=True)
    runs = [fastops.nf4_dequant(*args, **kwargs, backend=backend) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", SAMPLES)
@per_dtype
def test_cost_counts_the_tensors(name, dtype):
    s = sample(name, torch.device("cpu"), dtype)
    out = reference.nf4_dequant(*s.args, **s.kwargs)
    tensors = [out, *(v for v in (*s.args, *s.kwargs.values()) if isinstance(v, torch.Tensor))]
    cost = reference.cost(*s.args, **s.kwargs)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert cost.flops >= out.numel()


def test_error_sees_one_wrong_element():
    s = sample("matrix", torch.device("cpu"), torch.bfloat16)
    good = reference.nf4_dequant(*s.args, **s.kwargs)
    assert reference.error(good, *s.args, **s.kwargs) <= reference.BUDGET
    bad = good.clone()
    bad[3, 7] *= 1.02
    assert reference.error(bad, *s.args, **s.kwargs) > reference.BUDGET
    assert reference.error(torch.zeros_like(good), *s.args, **s.kwargs) > reference.BUDGET


needs_pool = pytest.mark.skipif(fastops._extension.C is None, reason="the pool is in fastops._C")


@needs_pool
def test_large_results_are_reused_and_never_shared():
    """Large CPU results come from a pool: a freed one is handed out again, a live one never."""
    (packed, absmax, *_), _ = inputs((1024, 1024))
    args = (packed, absmax, [1024, 1024], torch.float32)
    first = fastops.nf4_dequant(*args)
    if first.untyped_storage().resizable():
        pytest.skip("torch 2.10 cannot call back when a tensor dies: no pool")
    kept, address = first.clone(), first.data_ptr()
    view = first[5:]
    del first
    others = [fastops.nf4_dequant(packed ^ i, absmax, [1024, 1024], torch.float32) for i in (1, 2, 3)]
    assert torch.equal(view, kept[5:])
    assert len({t.data_ptr() for t in others} | {address}) == 4
    assert not torch.equal(others[0], others[1])
    del view
    taken = []  # other tests may have left results of this size in the pool, at most 64
    while address not in {t.data_ptr() for t in taken} and len(taken) < 65:
        taken.append(fastops.nf4_dequant(*args))
    assert taken[-1].data_ptr() == address
    assert all(torch.equal(again, kept) for again in taken)


@needs_pool
def test_the_pool_survives_a_fork():
    (packed, absmax, *_), _ = inputs((1024, 1024))
    want = fastops.nf4_dequant(packed, absmax, [1024, 1024], torch.float32)
    torch.set_num_threads(1)  # torch's own thread pool does not survive a fork
    child = os.fork()
    if child == 0:
        same = torch.equal(fastops.nf4_dequant(packed, absmax, [1024, 1024], torch.float32), want)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_poison_reaches_large_results(poison):
    """Otherwise a kernel that writes nothing could pass on memory that holds the right answer already."""
    assert torch.empty(1 << 20).isnan().all()
    (packed, absmax, *_), _ = inputs((1024, 1024))
    result = fastops.nf4_dequant(packed, absmax, [1024, 1024], torch.float32)
    assert result.untyped_storage().resizable(), "a result of the pool, which torch does not fill"


def test_triton_table_is_the_reference_table():
    page = pytest.importorskip("fastops.triton_ops.nf4_dequant")
    assert page.NF4_CODE == reference.NF4_CODE


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captures_in_a_cuda_graph(backend):
    args, kwargs = inputs((256, 512), device="cuda", double_quant=True)
    fastops.nf4_dequant(*args, **kwargs, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastops.nf4_dequant(*args, **kwargs, backend=backend)
    args[0].bitwise_xor_(0x5A)
    out.zero_()
    graph.replay()
    assert torch.equal(out, reference.nf4_dequant(*args, **kwargs))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_2_to_the_31_weights(backend):
    n, blocksize = 2**31 + 4097, 64
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(-(-n // blocksize), device="cuda")
    got = fastops.nf4_dequant(packed, absmax, [n], torch.bfloat16, blocksize, backend=backend)
    tail = 2**20  # a whole number of blocks before the end
    start = (n - tail) // blocksize * blocksize
    want = reference.nf4_dequant(
        packed[start // 2 :], absmax[start // blocksize :], [n - start], torch.bfloat16, blocksize
    )
    assert torch.equal(got[start:], want)
    assert torch.equal(
        got[:tail], reference.nf4_dequant(packed[: tail // 2], absmax[: tail // 64], [tail], torch.bfloat16)
    )


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_runs_on_the_tensor_s_device(backend):
    args, kwargs = inputs((128, 256), device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = fastops.nf4_dequant(*args, **kwargs, backend=backend)
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got, reference.nf4_dequant(*args, **kwargs))
    assert torch.cuda.current_device() == 0


def test_poison_is_nan():
    """The fixture that the tests above rely on."""
    with poison():
        assert torch.empty(1000).isnan().all()
