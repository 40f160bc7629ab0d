"""kv_recompute: every backend against float64, whatever the layout of caches, weights and inputs."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops._registry import registry
from fastops.reference import kv_append
from fastops.reference import kv_recompute as reference
from fastops.testing import available, non_contiguous, on_copies, poison, trusted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
OP = registry["kv_recompute"]
NAMES = (
    "x", "w_k", "w_v", "b_k", "b_v", "cos", "sin", "k_cache", "v_cache", "start",
)  # fmt: skip
K_CACHE, V_CACHE, START = 7, 8, 9

combinations = available("kv_recompute")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), combinations, ids=[f"{backend}-{device.type}" for backend, device in combinations]
)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_sample = pytest.mark.parametrize("name", [s.name for s in reference.samples(CPU, torch.float32)])


def find(name, device=CPU, dtype=torch.float32):
    return next((s.args, s.kwargs) for s in reference.samples(device, dtype) if s.name == name)


def bits(x):
    return x.contiguous().view(torch.uint8) if x.numel() else x


def whole_memory(cache):
    """All of the memory that a cache is a view of."""
    return torch.as_strided(cache, (cache.untyped_storage().nbytes() // cache.element_size(),), (1,), 0)


def run(args, kwargs, backend=None):
    """Runs on these very caches; (caches after, caches before). Memory between their elements must stay."""
    caches = args[K_CACHE : V_CACHE + 1]
    before = tuple(c.clone() for c in caches)
    memory = [whole_memory(c).clone() for c in caches]
    assert fastops.kv_recompute(*args, **kwargs, backend=backend) is None
    for cache, old in zip(caches, memory, strict=True):
        now = whole_memory(cache).clone()
        for view in caches:  # both may lie in the same memory
            if view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr():
                for m in (now, old):
                    torch.as_strided(m, view.shape, view.stride(), view.storage_offset()).zero_()
        assert torch.equal(bits(now), bits(old)), "memory between the caches' elements was written"
    return caches, before


def error(args, kwargs, backend=None):
    after, before = run(args, kwargs, backend)
    return reference.error(after, *args[:K_CACHE], *before, args[START], **kwargs)


@per_sample
@per_dtype
def test_matches_the_truth(name, dtype):
    for backend, device in combinations:
        if trusted(backend, device, dtype):
            assert error(*find(name, device, dtype), backend) <= reference.BUDGET, backend


@per_dtype
def test_every_instruction_set(dtype, cpu_isa):
    for s in reference.samples(CPU, dtype):
        assert error(s.args, s.kwargs, "cpu") <= reference.BUDGET, s.name


@per_backend
@per_dtype
def test_poisoned_caches(backend, device, dtype):
    """Rows that are not written may hold anything, and keep it bit for bit; no scratch is read unwritten."""
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")
    for s in reference.samples(device, dtype):
        for cache in s.args[K_CACHE : V_CACHE + 1]:
            cache.fill_(float("nan"))
        with poison():
            assert error(s.args, s.kwargs, backend) <= reference.BUDGET, s.name


def call(
    sizes, capacity, start, dtype=torch.float32, device=CPU, *, block=0, layout="contiguous", seed=0, bias=False,
    norm=False, rotary=0, interleaved=False,
):  # fmt: skip
    """(args, kwargs) of any sizes (B, L, H, Hkv, D)."""
    case = reference._Case("", sizes, capacity, start, block, layout, bias, norm, rotary, interleaved)
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = reference._inputs(case, device, dtype, generator)
    batch, _, _, heads, dim = sizes
    *caches, table = kv_append.random_caches(
        batch, heads, capacity, dim, device, dtype, block=block, layout=layout, seed=seed
    )
    return (*args, *caches, start), kwargs if table is None else {**kwargs, "block_table": table}


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 300), st.integers(0, 4), st.integers(1, 70)),
    more=st.integers(0, 20),
    block=st.sampled_from([0, 1, 3, 8, 16]),
    layout=st.sampled_from(kv_append.LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    norm=st.booleans(),
    rotary=st.integers(0, 35),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(sizes, more, block, layout, dtype, bias, norm, rotary, interleaved, seed):
    """On the backend that would be chosen."""
    rotary = 2 * rotary if 2 * rotary <= sizes[4] else 0
    capacity = sizes[1] + more + 1
    capacity = -(-capacity // block) * block if block else capacity
    start = seed % (capacity - sizes[1] + 1)
    args, kwargs = call(
        sizes, capacity, start, dtype, block=block, layout=layout, seed=seed, bias=bias, norm=norm, rotary=rotary,
        interleaved=interleaved and rotary > 0,
    )  # fmt: skip
    assert error(args, kwargs) <= reference.BUDGET


@per_backend
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 256, 260])
def test_every_size_of_a_head(backend, device, dim):
    """As it comes, and normed and rotated by all and by a third of it, either way."""
    rotary = dim // 2 * 2
    for options in ({}, {"norm": True, "rotary": rotary}, {"rotary": dim // 6 * 2}):
        for interleaved in (False, True) if options.get("rotary") else (False,):
            more = {"interleaved": True} if interleaved else {}
            args, kwargs = call((2, 5, 24, 3, dim), 9, 2, torch.float16, device, bias=True, **options, **more)
            assert error(args, kwargs, backend) <= reference.BUDGET, (options, interleaved)


@per_backend
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 14, 15, 27, 28, 29, 63, 64, 65, 127, 128, 129])
def test_every_number_of_rows(backend, device, rows):
    args, kwargs = call((1, rows, 40, 2, 64), rows + 1, 1, device=device, rotary=64)
    assert error(args, kwargs, backend) <= reference.BUDGET


@per_backend
@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 520])
def test_every_number_of_inputs(backend, device, hidden):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if trusted(backend, device, dtype):
            args, kwargs = call((2, 3, hidden, 2, 32), 5, 1, dtype, device)
            assert error(args, kwargs, backend) <= reference.BUDGET


@per_backend
@per_dtype
def test_many_threads_and_tiles(backend, device, dtype):
    """Enough rows for several blocks of them, several threads and many tiles."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("slow in Triton's interpreter")
    for block, layout in ((0, "contiguous"), (16, "transposed")):
        args, kwargs = call(
            (3, 430, 320, 5, 64), 448, 17, dtype, device, block=block, layout=layout, bias=True, norm=True, rotary=64
        )
        assert error(args, kwargs, backend) <= reference.BUDGET


@per_backend
@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_misaligned_memory(backend, device, offset):
    """Everything may start anywhere."""

    def shifted(t):
        return torch.cat([t.new_full((offset,), 3), t.reshape(-1)])[offset:].reshape(t.shape)

    for name in ("opt", "llama", "qwen"):
        args, kwargs = find(name, device, torch.float16)
        moved = tuple(shifted(t) if isinstance(t, torch.Tensor) else t for t in args)
        kwargs = {n: shifted(t) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
        assert error(moved, kwargs, backend) <= reference.BUDGET


@per_backend
def test_inputs_of_any_strides(backend, device):
    """Sequences and rows the other way round, one row for all, parts of larger tensors; tables with gaps."""
    args, kwargs = find("qwen", device)
    x, *weights = args[:3]

    def part(t):
        return torch.cat([t, t], dim=-1)[..., 1 : 1 + t.shape[-1]]

    changes = (
        (x.transpose(0, 1).contiguous().transpose(0, 1), *weights),
        (x[:1].expand(x.shape), *(w[:1].expand(w.shape) for w in weights)),
        (x[:, :1].expand(x.shape), *weights),
        (part(x), *map(part, weights)),
    )
    for changed in changes:
        caches = (c.clone() for c in args[K_CACHE : V_CACHE + 1])
        assert error((*changed, *args[3:K_CACHE], *caches, args[START]), kwargs, backend) <= reference.BUDGET
    args, kwargs = find("llama_pages", device)
    kwargs = {**kwargs, "block_table": non_contiguous(kwargs["block_table"])}
    args = tuple(torch.cat([t, t], 1)[:, : t.shape[1]] if i in (5, 6) else t for i, t in enumerate(args))
    assert error(args, kwargs, backend) <= reference.BUDGET


@per_backend
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 70])
def test_rows_in_any_order(backend, device, rows):
    """Sequence by sequence, token by token (how an offloaded store has them), and sequences with gaps between."""
    args, kwargs = call((3, rows, 40, 2, 64), rows + 2, 1, torch.float16, device, rotary=64)
    x = args[0]
    apart = torch.cat([x, x, x], dim=1)[:, rows : 2 * rows]
    for moved in (x, x.transpose(0, 1).contiguous().transpose(0, 1), apart):
        caches = (c.clone() for c in args[K_CACHE : V_CACHE + 1])
        assert error((moved, *args[1:K_CACHE], *caches, args[START]), kwargs, backend) <= reference.BUDGET


@per_backend
def test_is_what_transformers_computes(backend, device):
    """An implementation that is not ours: Qwen3's k_norm and rotary embedding after torch's own linear layer."""
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    torch.manual_seed(0)
    linear_k, linear_v, norm = torch.nn.Linear(48, 96), torch.nn.Linear(48, 96), modeling.Qwen3RMSNorm(32, 1e-5)
    norm.weight.data.uniform_(0.5, 1.5)
    x, start = torch.randn(2, 6, 48), 3
    angle = torch.arange(start, start + 6)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
    with torch.no_grad():
        k, v = (linear(x).view(2, 6, 3, 32).transpose(1, 2) for linear in (linear_k, linear_v))
        full = torch.cat([angle, angle], dim=-1)[None]
        _, k = modeling.apply_rotary_pos_emb(norm(k), norm(k), full.cos(), full.sin())
    weights = [t.detach() for t in (linear_k.weight, linear_v.weight, linear_k.bias, linear_v.bias)]
    caches = torch.zeros(2, 2, 3, 12, 32, device=device)
    given = (t.to(device) for t in (x, *weights, angle.cos(), angle.sin()))
    more = {"k_norm_weight": norm.weight.detach().to(device), "k_norm_eps": 1e-5}
    fastops.kv_recompute(*given, *caches, start, **more, backend=backend)
    for cache, want in zip(caches.cpu(), (k, v), strict=True):
        torch.testing.assert_close(cache[:, :, start : start + 6], want, rtol=1e-5, atol=1e-5)
        assert not cache[:, :, :start].any()
        assert not cache[:, :, start + 6 :].any()


@per_backend
def test_rows_do_not_influence_each_other(backend, device):
    """A sequence alone, and rows in two calls, give what all at once give: on the CPU the same bits."""
    args, kwargs = call((3, 8, 96, 2, 32), 16, 4, device=device, rotary=32, norm=True)
    whole = on_copies(functools.partial(fastops.kv_recompute, backend=backend), "kv_recompute", *args, **kwargs)
    caches = [c.clone() for c in args[K_CACHE : V_CACHE + 1]]
    for b in range(3):
        for first in (0, 4):
            rows = slice(first, first + 4)
            fastops.kv_recompute(
                args[0][b : b + 1, rows], *args[1:5], args[5][rows], args[6][rows], *(c[b : b + 1] for c in caches),
                4 + first, **kwargs, backend=backend,
            )  # fmt: skip
    if backend == "cpu":
        assert all(torch.equal(c, w) for c, w in zip(caches, whole, strict=True))
    else:  # the order of sums follows the shape (BLAS, also under Triton's interpreter) or the tile's
        assert all(torch.allclose(c, w, rtol=1e-5, atol=1e-5) for c, w in zip(caches, whole, strict=True))


@per_backend
def test_deterministic(backend, device):
    results = [run(*find("long", device), backend)[0] for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# Bad arguments


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call_of(paged=False):
    """The keyword arguments of a good call; B 2, L 4, H 10, Hkv 3, D 8, 16 rows a sequence."""
    shape = (9, 4, 3, 8) if paged else (2, 3, 16, 8)
    caches = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    given = {"x": torch.ones(2, 4, 10), "w_k": torch.ones(24, 10), "w_v": torch.ones(24, 10)}
    given |= dict.fromkeys(("b_k", "b_v", "cos", "sin"))
    given |= {"k_cache": caches[0].clone(), "v_cache": caches[1].clone(), "start": 6}
    return {**given, "block_table": ints([0, 2, 4, 6], [1, 3, 5, 8])} if paged else given


def rope(r=4, n=4, **changes):
    return {"cos": torch.ones(n, r), "sin": torch.zeros(n, r), **changes}


def halves(**changes):
    """A good call in fp16."""
    good = {n: t.half() for n, t in call_of().items() if isinstance(t, torch.Tensor)}
    return {**good, **changes}


META = functools.partial(torch.zeros, device="meta")
BAD = {
    "cache dtype": (0, dict(k_cache=torch.zeros(2, 3, 16, 8).double()),
        "k_cache must be float32, float16 or bfloat16, got float64"),
    "v_cache device": (0, dict(v_cache=META(2, 3, 16, 8)), "v_cache must be on cpu like k_cache, got meta"),
    "v_cache dtype": (0, dict(v_cache=torch.zeros(2, 3, 16, 8).half()), "v_cache must be float32, got float16"),
    "cache dims": (0, dict(k_cache=torch.zeros(6, 16, 8)), "k_cache must be [B, Hkv, S_cap, D], got [6, 16, 8]"),
    "paged cache dims": (1, dict(k_cache=torch.zeros(9, 4, 24)),
        "k_cache must be [n_blocks, block, Hkv, D], got [9, 4, 24]"),
    "v_cache shape": (0, dict(v_cache=torch.zeros(2, 3, 17, 8)),
        "v_cache must have the shape of k_cache, [2, 3, 16, 8], got [2, 3, 17, 8]"),
    "k_cache last dim": (0, dict(k_cache=torch.zeros(2, 3, 8, 16).mT),
        "k_cache must have a contiguous last dim, got strides [384, 128, 1, 16]"),
    "table dtype": (1, dict(block_table=torch.zeros(2, 4).long()), "block_table must be int32, got int64"),
    "table dims": (1, dict(block_table=ints(1, 2)), "block_table must be [B, max_blocks], got [2]"),
    "k_cache expanded": (0, dict(k_cache=torch.zeros(1, 3, 16, 8).expand(2, 3, 16, 8)),
        "k_cache must not overlap itself, got shape [2, 3, 16, 8] with strides [0, 128, 8, 1]"),
    "v_cache overlapping": (0, dict(v_cache=torch.zeros(1000).as_strided((2, 3, 16, 8), (384, 128, 7, 1))),
        "v_cache must not overlap itself, got shape [2, 3, 16, 8] with strides [384, 128, 7, 1]"),
    "x device": (0, dict(x=META(2, 4, 10)), "x must be on cpu like k_cache, got meta"),
    "x dtype": (0, dict(x=torch.zeros(2, 4, 10).half()), "x must be float32, got float16"),
    "x dims": (0, dict(x=torch.zeros(4, 10)), "x must be [B, L, H] = [2, L, H], got [4, 10]"),
    "x batch": (0, dict(x=torch.zeros(3, 4, 10)), "x must be [B, L, H] = [2, L, H], got [3, 4, 10]"),
    "x batch paged": (1, dict(x=torch.zeros(9, 4, 10)), "x must be [B, L, H] = [2, L, H], got [9, 4, 10]"),
    "x last dim": (0, dict(x=torch.zeros(2, 10, 4).mT), "x must have a contiguous last dim, got strides [40, 1, 4]"),
    "too many rows": (0, dict(x=torch.zeros(1, 1, 10).expand(2, 2**30, 10)),
        "x must have fewer than 2^31 rows in all, got [2, 1073741824, 10]"),
    "w_k device": (0, dict(w_k=META(24, 10)), "w_k must be on cpu like k_cache, got meta"),
    "w_k dtype": (0, dict(w_k=torch.zeros(24, 10).bfloat16()), "w_k must be float32, got bfloat16"),
    "w_k dims": (0, dict(w_k=torch.zeros(240)), "w_k must be [Hkv D, H] = [24, 10], got [240]"),
    "w_k transposed": (0, dict(w_k=torch.zeros(10, 24)), "w_k must be [Hkv D, H] = [24, 10], got [10, 24]"),
    "w_k last dim": (0, dict(w_k=torch.zeros(10, 24).T), "w_k must have a contiguous last dim, got strides [1, 24]"),
    "w_v device": (0, dict(w_v=META(24, 10)), "w_v must be on cpu like k_cache, got meta"),
    "w_v dtype": (0, dict(w_v=torch.zeros(24, 10).int()), "w_v must be float32, got int32"),
    "w_v shape": (0, dict(w_v=torch.zeros(24, 11)), "w_v must be [Hkv D, H] = [24, 10], got [24, 11]"),
    "w_v last dim": (0, dict(w_v=torch.zeros(24, 20)[:, ::2]),
        "w_v must have a contiguous last dim, got strides [20, 2]"),
    "b_k device": (0, dict(b_k=META(24)), "b_k must be on cpu like k_cache, got meta"),
    "b_k dtype": (0, dict(b_k=torch.zeros(24).half()), "b_k must be float32, got float16"),
    "b_k size": (0, dict(b_k=torch.zeros(8)), "b_k must be [Hkv D] = [24], got [8]"),
    "b_k dims": (0, dict(b_k=torch.zeros(1, 24)), "b_k must be [Hkv D] = [24], got [1, 24]"),
    "b_k stride": (0, dict(b_k=torch.zeros(48)[::2]), "b_k must have a contiguous last dim, got strides [2]"),
    "b_v dtype": (0, dict(b_v=torch.zeros(24).double()), "b_v must be float32, got float64"),
    "b_v size": (0, dict(b_v=torch.zeros(3, 8)), "b_v must be [Hkv D] = [24], got [3, 8]"),
    "start negative": (0, dict(start=-1), "start must be from 0 to 12 (capacity 16, 4 rows), got -1"),
    "start too late": (0, dict(start=13), "start must be from 0 to 12 (capacity 16, 4 rows), got 13"),
    "start too late paged": (1, dict(start=2**40),
        "start must be from 0 to 12 (capacity 16, 4 rows), got 1099511627776"),
    "start without room": (0, dict(x=torch.zeros(2, 17, 10), start=0),
        "start must be from 0 to -1 (capacity 16, 17 rows), got 0"),
    "norm device": (0, dict(k_norm_weight=META(8)), "k_norm_weight must be on cpu like k_cache, got meta"),
    "norm dtype": (0, dict(k_norm_weight=torch.zeros(8).half()), "k_norm_weight must be float32, got float16"),
    "norm size": (0, dict(k_norm_weight=torch.zeros(24)), "k_norm_weight must be [D] = [8], got [24]"),
    "norm stride": (0, dict(k_norm_weight=torch.zeros(16)[::2]),
        "k_norm_weight must have a contiguous last dim, got strides [2]"),
    "eps negative": (0, dict(k_norm_weight=torch.ones(8), k_norm_eps=-1e-6),
        "k_norm_eps must not be negative, got -1e-06"),
    "eps no number": (0, dict(k_norm_weight=torch.ones(8), k_norm_eps=float("nan")),
        "k_norm_eps must not be negative, got nan"),
    "cos alone": (0, rope(sin=None), "cos and sin must be given together, got only cos"),
    "sin alone": (0, rope(cos=None), "cos and sin must be given together, got only sin"),
    "interleaved alone": (0, dict(rope_interleaved=True),
        "rope_interleaved must be False without cos and sin, got True"),
    "cos device": (0, rope(cos=META(4, 4)), "cos must be on cpu like k_cache, got meta"),
    "cos dtype": (0, rope(cos=torch.zeros(4, 4).half()), "cos must be float32, got float16"),
    "cos dtype of halves": (0, halves(**rope(cos=torch.zeros(4, 4).bfloat16())),
        "cos must be float32 or float16, got bfloat16"),
    "cos width": (0, rope(5), "cos must be [L, R / 2] = [4, R / 2] with R at most D = 8, got [4, 5]"),
    "cos rows": (0, rope(4, 20), "cos must be [L, R / 2] = [4, R / 2] with R at most D = 8, got [20, 4]"),
    "cos dims": (0, rope(cos=torch.zeros(4)),
        "cos must be [L, R / 2] = [4, R / 2] with R at most D = 8, got [4]"),
    "sin device": (0, rope(sin=META(4, 4)), "sin must be on cpu like k_cache, got meta"),
    "sin dtype": (0, rope(sin=torch.zeros(4, 4).half()), "sin must be float32, got float16"),
    "sin shape": (0, rope(sin=torch.zeros(4, 3)), "sin must have the shape of cos, [4, 4], got [4, 3]"),
    "cos last dim": (0, rope(cos=torch.ones(4, 4).T), "cos must have a contiguous last dim, got strides [1, 4]"),
    "sin last dim": (0, rope(sin=torch.ones(4, 8)[:, ::2]), "sin must have a contiguous last dim, got strides [8, 2]"),
}  # fmt: skip
per_fault = pytest.mark.parametrize("name", BAD)


def bad_call(name, device="cpu"):
    """(arguments by name, the whole message)."""
    paged, changes, message = BAD[name]

    def moved(value):
        if not isinstance(value, torch.Tensor) or value.device.type in ("meta", str(device)):
            return value
        away = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device=device)
        return away.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)

    arguments = {key: moved(value) for key, value in {**call_of(bool(paged)), **changes}.items()}
    return arguments, f"fastops::kv_recompute: {message}"


def unchanged(arguments):
    """Raises unless the caches are afterwards what they are now."""
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    before = [c if c.device.type == "meta" else c.clone() for c in caches]

    def check():
        for now, then in zip(caches, before, strict=True):
            assert now.device.type == "meta" or torch.equal(bits(now), bits(then))

    return check


@pytest.mark.parametrize("name", [name for name in BAD if name != "x device"])  # a named backend refuses that itself
def test_rejects(name):
    for backend, device in combinations:
        arguments, message = bad_call(name, device)
        check = unchanged(arguments)
        with pytest.raises(RuntimeError) as raised:
            fastops.kv_recompute(**arguments, backend=backend)
        where = "on cuda:0" if device.type == "cuda" else "on cpu"
        assert str(raised.value) == message.replace("on cpu", where), backend
        check()


@per_fault
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    arguments, message = bad_call(name)
    check = unchanged(arguments)
    context = torch.no_grad()
    function = torch.ops.fastops.kv_recompute
    given = arguments
    if path == "fake":
        context = FakeTensorMode()
        given = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif path == "explain":
        function = functools.partial(fastops.explain, "kv_recompute")
    with context, pytest.raises(RuntimeError) as raised:
        function(**given)
    assert str(raised.value) == message
    check()


BAD_PAGES = {
    "dead page": (ints([0, 2147480000, 4, 6], [1, 3, 5, 8]), "got 2147480000 at [0, 1]"),
    "negative page": (ints([0, 2, 4, 6], [1, 3, -1, 8]), "got -1 at [1, 2]"),
    "page beyond": (ints([0, 2, 9, 6], [1, 9, 5, 8]), "got 9 at [0, 2]"),
}
per_bad_page = pytest.mark.parametrize("name", BAD_PAGES)


def bad_pages(name, device="cpu"):
    """Rows 6 to 9 lie in the second and third page of each sequence."""
    table, message = BAD_PAGES[name]
    arguments = {**call_of(True), "block_table": table, **rope()}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    start = "fastops::kv_recompute: block_table must hold pages from 0 to n_blocks - 1 = 8 where rows are, "
    return arguments, start + message


@per_bad_page
def test_bad_pages_are_refused_before_anything_is_written(name):
    for backend, device in combinations:
        for context in (fastops.debug_checks(), torch.no_grad()) if device.type == "cpu" else (fastops.debug_checks(),):
            arguments, message = bad_pages(name, device)
            check = unchanged(arguments)
            with context, pytest.raises(RuntimeError) as raised:
                fastops.kv_recompute(**arguments, backend=backend)
            assert str(raised.value) == message, backend
            check()


def launches(arguments_on):
    """(backend, arguments) after each kernel that cannot check values has run: on a GPU, or interpreted."""
    for backend, device in combinations:
        if device.type == "cuda":
            arguments = arguments_on(device)
            fastops.kv_recompute(**arguments, backend=backend)
        elif backend == "triton":
            arguments = arguments_on("cpu")
            OP.triton_member("launch")(**arguments)
        else:
            continue
        yield backend, arguments


@per_bad_page
def test_rows_of_bad_pages_are_skipped_by_kernels_that_cannot_check(name):
    want, _ = bad_pages(name)
    reference.kv_recompute(**want)
    untouched = call_of(True)["k_cache"]
    assert not torch.equal(want["k_cache"], untouched)
    for backend, after in launches(lambda device: bad_pages(name, device)[0]):
        for cache in ("k_cache", "v_cache"):
            torch.testing.assert_close(after[cache].cpu(), want[cache], rtol=1e-6, atol=1e-6, msg=backend)


def test_hostile_tables():
    """Pages may be anything, no two alike; rows that have none are left out, here and on a GPU."""
    nasty = [-(2**31), -7, -1, 9, 10, 2147480000, 2**31 - 1]
    for trial in range(10):
        generator = torch.Generator().manual_seed(trial)
        pages = torch.tensor([*range(9), *nasty])
        table = pages[torch.randperm(len(pages), generator=generator)[:8]].reshape(2, 4).to(torch.int32)

        def arguments_on(device, table=table, start=trial):
            arguments = {**call_of(True), "block_table": table, "start": start, **rope()}
            return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

        want = arguments_on("cpu")
        reference.kv_recompute(**want)
        for backend, after in launches(arguments_on):
            for cache in ("k_cache", "v_cache"):
                torch.testing.assert_close(after[cache].cpu(), want[cache], rtol=1e-6, atol=1e-6, msg=backend)


@per_backend
def test_dead_pages_that_hold_no_new_rows_are_no_matter(backend, device):
    arguments = {**call_of(True), "block_table": ints([-1, 2, 4, 2147480000], [-7, 3, 5, 99])}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    args = tuple(arguments.pop(name) for name in NAMES)
    assert error(args, arguments, backend) <= reference.BUDGET


# Machinery


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["opt", "llama_pages", "qwen", "together", "no_rows"])
def test_opcheck(name, device):
    args, kwargs = find(name, torch.device(device))
    torch.library.opcheck(torch.ops.fastops.kv_recompute.default, args, kwargs)


@per_backend
def test_sizes_do_not_recompile(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(*args, **kwargs):
        fastops.kv_recompute(*args, **kwargs)
        return args[K_CACHE].sum() + args[V_CACHE].sum()

    with fastops.use_backend("kv_recompute", backend):  # sizes that are equal in the first call would have to stay so
        for batch, rows, hidden, heads, dim, start in ((3, 4, 6, 5, 16, 2), (5, 2, 9, 3, 24, 7), (7, 8, 3, 4, 64, 3)):
            args, kwargs = call(
                (batch, rows, hidden, heads, dim), 20 + rows, start, device=device, bias=True, rotary=14
            )
            want = on_copies(functools.partial(fastops.kv_recompute, backend=backend), "kv_recompute", *args, **kwargs)
            total = f(*args, **kwargs)
            assert all(torch.equal(c, w) for c, w in zip(args[K_CACHE : V_CACHE + 1], want, strict=True))
            torch.testing.assert_close(total, want[0].sum() + want[1].sum())
    assert compiler.frame_count == 1


@per_backend
@pytest.mark.parametrize("name", ["llama_pages", "qwen", "pages_together"])
def test_compiles(backend, device, name):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def f(*args, **kwargs):
        fastops.kv_recompute(*args, **kwargs, backend=backend)

    want, _ = run(*find(name, device), backend)
    args, kwargs = find(name, device)
    f(*args, **kwargs)
    assert all(torch.equal(g, w) for g, w in zip(args[K_CACHE : V_CACHE + 1], want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["opt", "llama_pages", "qwen", "long"])
def test_captured_in_a_graph(name):
    """A replay writes what the inputs then are, where the table then says."""
    device = torch.device("cuda")
    for backend in OP.available(device):
        if backend == "reference":
            continue
        args, kwargs = find(name, device, torch.float16)
        warm = on_copies(functools.partial(fastops.kv_recompute, backend=backend), "kv_recompute", *args, **kwargs)
        assert len(warm) == 2
        before = [c.clone() for c in args[K_CACHE : V_CACHE + 1]]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fastops.kv_recompute(*args, **kwargs, backend=backend)
        args[0].copy_(torch.randn_like(args[0]))
        for cache, old in zip(args[K_CACHE : V_CACHE + 1], before, strict=True):
            cache.copy_(old)
        graph.replay()
        after = args[K_CACHE : V_CACHE + 1]
        assert reference.error(after, *args[:K_CACHE], *before, args[START], **kwargs) <= reference.BUDGET, backend


@per_backend
def test_gradients_and_autocast_do_not_matter(backend, device):
    """The caches are constants of the graph, whatever the inputs are."""
    want, _ = run(*find("qwen", device), backend)
    for inference in (False, True):
        args, kwargs = find("qwen", device)
        if not inference:
            args = (*(t.detach().requires_grad_() for t in args[:3]), *args[3:])
        with torch.inference_mode(inference), torch.autocast(device.type, dtype=torch.bfloat16):
            fastops.kv_recompute(*args, **kwargs, backend=backend)
        assert all(torch.equal(g, w) for g, w in zip(args[K_CACHE : V_CACHE + 1], want, strict=True))
        assert not any(cache.requires_grad for cache in args[K_CACHE : V_CACHE + 1])


def test_written_tensors_are_the_caches():
    assert OP.written == (K_CACHE, V_CACHE)
    args, _ = find("opt")
    k_cache, v_cache = OP.results(None, args)
    assert k_cache is args[K_CACHE]
    assert v_cache is args[V_CACHE]


@per_sample
def test_cost_counts_the_bytes(name):
    args, kwargs = find(name, dtype=torch.bfloat16)
    cost = reference.cost(*args, **kwargs)
    batch, rows, hidden = args[0].shape
    columns = args[1].shape[0]
    least = 2 * (batch * rows * hidden + 2 * columns * hidden + 2 * batch * rows * columns)
    assert least <= cost.bytes <= least + 8 * (args[1].shape[0] + rows * 200 + 300 + batch * rows)
    assert 4 * batch * rows * hidden * columns <= cost.flops
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
    more = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert reference.cost(*meta, **more) == cost


def test_the_error_sees_one_wrong_element():
    """Of the rows that are written, by two of fp16's steps; of the others, by one bit."""
    args, kwargs = find("qwen", dtype=torch.float16)
    got = on_copies(fastops.kv_recompute, "kv_recompute", *args, **kwargs)
    assert reference.error(got, *args, **kwargs) <= reference.BUDGET
    for where in ((0, 1, args[START] + 1, 5), (1, 0, 2, 3)):
        for cache in (0, 1):
            spoilt = [g.clone() for g in got]
            element = spoilt[cache].view(torch.int16)
            element[where] += 8 if where[2] >= args[START] else 1
            assert reference.error(tuple(spoilt), *args, **kwargs) > reference.BUDGET


@per_backend
def test_explain(backend, device):
    args, kwargs = find("qwen", device)
    explained = fastops.explain("kv_recompute", *args, **kwargs, backend=backend)
    assert explained.backend == backend
    assert bool(explained.config) == (backend in ("cpu", "triton", "cuda"))
