"""kv_append, kv_compact and kv_scatter: every test that makes sense for each of them, on every backend."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops._registry import registry
from fastops.reference import kv_append as reference
from fastops.reference._truth import truth
from fastops.testing import available, non_contiguous, trusted

OPS = ("kv_append", "kv_compact", "kv_scatter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRUTH = {op: truth(op, "kv_append") for op in OPS}
CPU = torch.device("cpu")


def backends(*ops):
    """Parametrises over (op, backend, device)."""
    combinations = [(op, *where) for op in ops for where in available(op)]
    ids = [f"{op}-{backend}-{device.type}" for op, backend, device in combinations]
    return pytest.mark.parametrize(("op", "backend", "device"), combinations, ids=ids)


per_backend = backends(*OPS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SAMPLES = [(op, s.name) for op in OPS for s in TRUTH[op].samples(CPU, torch.float32)]
per_sample = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op}-{name}" for op, name in SAMPLES])


def find(op, name, device=CPU, dtype=torch.float32):
    return next((s.args, s.kwargs) for s in TRUTH[op].samples(device, dtype) if s.name == name)


def whole_memory(cache):
    """All of the memory that a cache is a view of."""
    return torch.as_strided(cache, (cache.untyped_storage().nbytes() // cache.element_size(),), (1,), 0)


def bits(x):
    return x.contiguous().view(torch.uint8) if x.numel() else x


def run(op, sample, backend=None):
    """Runs on the sample's own caches; (caches after, caches before). Memory between their elements must stay."""
    (k_cache, v_cache, *rest), kwargs = sample
    before = k_cache.clone(), v_cache.clone()
    memory = [whole_memory(c).clone() for c in (k_cache, v_cache)]
    assert getattr(fastops, op)(k_cache, v_cache, *rest, **kwargs, backend=backend) is None
    for cache, old in zip((k_cache, v_cache), memory, strict=True):
        now = whole_memory(cache).clone()
        for view in (k_cache, v_cache):  # both may lie in the same memory
            if view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr():
                for m in (now, old):
                    torch.as_strided(m, view.shape, view.stride(), view.storage_offset()).zero_()
        assert torch.equal(bits(now), bits(old)), "memory between the caches' elements was written"
    return (k_cache, v_cache), before


def error(op, sample, backend=None):
    (_, _, *rest), kwargs = sample
    after, before = run(op, sample, backend)
    return TRUTH[op].error(after, *before, *rest, **kwargs)


def skip_untrusted(backend, device, dtype):
    if not trusted(backend, device, dtype):
        pytest.skip("Triton's interpreter computes bf16 incorrectly")


@per_sample
@per_dtype
def test_matches_the_truth(op, name, dtype):
    for backend, device in available(op):
        if trusted(backend, device, dtype):
            assert error(op, find(op, name, device, dtype), backend) <= TRUTH[op].budget, backend


@per_dtype
def test_every_instruction_set(dtype, cpu_isa):
    for s in reference.samples(CPU, dtype):
        (_, _, *rest), kwargs = sample = (s.args, s.kwargs)
        got, before = run("kv_append", sample, "cpu")
        assert reference.error(got, *before, *rest, **kwargs) <= reference.BUDGET, s.name
        reference.kv_append(*before, *rest, **kwargs)
        assert all(torch.equal(g, w) for g, w in zip(got, before, strict=True)), s.name


@per_backend
@per_dtype
def test_poisoned_caches(op, backend, device, dtype):
    """Rows that are not written may hold anything, and keep it bit for bit."""
    skip_untrusted(backend, device, dtype)
    for s in TRUTH[op].samples(device, dtype):
        if op != "kv_compact":
            s.args[0].fill_(float("nan"))
            s.args[1].fill_(float("nan"))
        else:
            for cache in s.args[:2]:  # rows before the tree
                spoil(cache, s.args[2], s.kwargs.get("block_table"))
        assert error(op, (s.args, s.kwargs), backend) <= TRUTH[op].budget, s.name


def spoil(cache, lengths, block_table):
    for b, length in enumerate(lengths.tolist()):
        for position in range(length):
            cache[reference.locate(cache, block_table, b, position)] = float("nan")


@settings(deadline=None, max_examples=80)
@given(
    op=st.sampled_from(OPS),
    batch=st.integers(0, 5),
    heads=st.integers(0, 4),
    rows=st.integers(0, 12),
    dim=st.integers(1, 70),
    more=st.integers(0, 20),
    block=st.sampled_from([0, 1, 3, 8, 16]),
    layout=st.sampled_from(reference.LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    rotary=st.integers(0, 35),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(op, batch, heads, rows, dim, more, block, layout, dtype, rotary, interleaved, seed):
    """On the backend that would be chosen."""
    if op == "kv_scatter":
        block = 0
    capacity = rows + more + 1
    capacity = -(-capacity // block) * block if block else capacity
    generator = torch.Generator().manual_seed(seed)
    caches = reference.random_caches(batch, heads, capacity, dim, CPU, dtype, block=block, layout=layout, seed=seed)
    *caches, table = caches
    kwargs = {} if table is None else {"block_table": table}
    k, v = torch.randn(2, batch, heads, rows, dim, generator=generator).to(dtype)
    lengths = torch.randint(0, capacity - rows + 1, (batch,), generator=generator, dtype=torch.int32)
    if op == "kv_append":
        kwargs["q_lens"] = torch.randint(0, rows + 1, (batch,), generator=generator, dtype=torch.int32)
        if 0 < 2 * rotary <= dim:
            angle = torch.rand(capacity, rotary, generator=generator) * 7
            kwargs |= {"cos": angle.cos(), "sin": angle.sin(), "rope_interleaved": interleaved}
        sample = ((*caches, k, v, lengths), kwargs)
    elif op == "kv_compact":
        sample = ((*caches, lengths, *reference.random_accepts(batch, rows, seed)), kwargs)
    else:
        index = torch.rand(batch, capacity, generator=generator).argsort(1)[:, :rows].to(torch.int32)
        index[:, 1::3] = -1
        sample = ((*caches, k, v, index), kwargs)
    assert error(op, sample) <= TRUTH[op].budget


@per_backend
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 96, 127, 129, 256, 520])
def test_every_size_of_a_row(op, backend, device, dim):
    for dtype in (torch.float16, torch.float32):
        generator = torch.Generator().manual_seed(dim)
        caches = reference.random_caches(2, 3, 9, dim, device, dtype)[:2]
        k, v = torch.randn(2, 2, 3, 3, dim, generator=generator).to(device, dtype)
        ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        rest = {
            "kv_append": (k, v, ints([0, 6])),
            "kv_compact": (ints([0, 6]), ints([[0, 2, -1], [0, 1, 2]]), ints([2, 3])),
            "kv_scatter": (k, v, ints([[8, 0, -1], [3, 2, 1]])),
        }[op]
        assert error(op, ((*caches, *rest), {}), backend) <= TRUTH[op].budget


@per_backend
@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_misaligned_memory(op, backend, device, offset):
    """Caches and rows that start anywhere."""

    def shifted(t):
        return torch.cat([t.new_full((offset,), 3), t.reshape(-1)])[offset:].reshape(t.shape)

    for name in ("step", "rows", "tree"):
        args, kwargs = find(op, name, device, torch.float16)
        moved = tuple(shifted(t) if t.is_floating_point() else t for t in args)
        assert error(op, (moved, kwargs), backend) <= TRUTH[op].budget


@per_backend
def test_small_tensors_of_any_strides(op, backend, device):
    for name in ("paged", "rope_tree") if op == "kv_append" else ("paged",) if op == "kv_compact" else ("rows",):
        want, _ = run(op, find(op, name, device), backend)
        args, kwargs = find(op, name, device)
        args = tuple(t if t.is_floating_point() else non_contiguous(t) for t in args)
        kwargs = {
            key: non_contiguous(t) if isinstance(t, torch.Tensor) and not t.is_floating_point() else t
            for key, t in kwargs.items()
        }
        got, _ = run(op, (args, kwargs), backend)
        assert all(torch.equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))


@backends("kv_append", "kv_scatter")
def test_rows_of_any_strides(op, backend, device):
    """One row for all heads, one for all sequences, rows and heads the other way round."""
    args, kwargs = find(op, "rows", device)
    k_cache, v_cache, k, v, positions = args
    for change in (
        lambda t: t[:, :1].expand(t.shape),
        lambda t: t[:1].expand(t.shape),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t, t], dim=3)[..., 1 : 1 + t.shape[3]],
    ):
        sample = (k_cache.clone(), v_cache.clone(), change(k), change(v), positions), kwargs
        assert error(op, sample, backend) == 0


@per_backend
@per_dtype
def test_many_threads(op, backend, device, dtype):
    """Enough rows for several threads and many blocks."""
    skip_untrusted(backend, device, dtype)
    if backend == "triton" and device.type == "cpu":
        pytest.skip("slow in Triton's interpreter")
    for block, layout in ((0, "contiguous"), (16, "contiguous"), (0, "transposed")):
        if op == "kv_scatter" and block:
            continue
        *caches, table = reference.random_caches(16, 4, 96, 128, device, dtype, block=block, layout=layout)
        kwargs = {} if table is None else {"block_table": table}
        k, v = torch.randn(2, 16, 64, 4, 128).to(device, dtype).transpose(2, 3)
        lengths = torch.arange(16, dtype=torch.int32, device=device) * 2
        accepts = [t.to(device) for t in reference.random_accepts(16, 64)]
        index = torch.rand(16, 96).argsort(1)[:, :64].to(device, torch.int32)
        rest = {"kv_append": (k, v, lengths), "kv_compact": (lengths, *accepts), "kv_scatter": (k, v, index)}[op]
        assert error(op, ((*caches, *rest), kwargs), backend) == 0


def test_rotation_is_the_one_of_transformers():
    """An implementation that is not ours."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    k = torch.randn(2, 3, 5, 64)
    lengths = torch.tensor([4, 0], dtype=torch.int32)
    position = lengths[:, None] + torch.arange(5)
    frequency = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    angle = torch.cat([position[..., None] * frequency] * 2, dim=-1)
    _, want = llama.apply_rotary_pos_emb(k, k, angle.cos(), angle.sin())
    table = torch.arange(12)[:, None] * frequency
    for backend, device in available("kv_append"):
        caches = torch.zeros(2, 2, 3, 12, 64, device=device)
        args = (t.to(device) for t in (k, k, lengths))
        fastops.kv_append(*caches, *args, cos=table.cos().to(device), sin=table.sin().to(device), backend=backend)
        for b, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(caches[0, b, :, length : length + 5].cpu(), want[b], rtol=1e-6, atol=1e-6)
            assert torch.equal(caches[1, b, :, length : length + 5].cpu(), k[b])


@backends("kv_append")
@pytest.mark.parametrize("block", [0, 8])
def test_a_round_of_speculation(op, backend, device, block):
    """A tree is appended and compacted: the caches then hold what appending the accepted rows would have left."""
    *tree_caches, table = reference.random_caches(4, 2, 40, 64, device, torch.float32, block=block)
    plain = [c.clone() for c in tree_caches]
    k, v = torch.randn(2, 4, 2, 9, 64).to(device)
    lengths = torch.tensor([0, 31, 7, 12], dtype=torch.int32, device=device)
    index, count = (t.to(device) for t in reference.random_accepts(4, 9, seed=3))
    fastops.kv_append(*tree_caches, k, v, lengths, block_table=table, backend=backend)
    fastops.kv_compact(*tree_caches, lengths, index, count, block_table=table, backend=backend)
    path = index.clamp(min=0).long()[:, None, :, None].expand(4, 2, 9, 64)
    accepted = k.gather(2, path), v.gather(2, path)
    fastops.kv_append(*plain, *accepted, lengths, block_table=table, q_lens=count, backend="reference")
    for got, want in zip(tree_caches, plain, strict=True):
        for b, (length, n) in enumerate(zip(lengths.tolist(), count.tolist(), strict=True)):
            for position in range(length + n):
                where = reference.locate(got, table, b, position)
                assert torch.equal(got[where], want[where])


@backends("kv_append", "kv_compact")
def test_sequences_do_not_influence_each_other(op, backend, device):
    """Permuting the batch permutes the result bit for bit."""
    (k_cache, v_cache, *rest), kwargs = find(op, "rows", device)
    order = torch.tensor([2, 0, 1], device=device)
    permuted = ((k_cache[order], v_cache[order], *(t[order] for t in rest)), {n: t[order] for n, t in kwargs.items()})
    want, _ = run(op, ((k_cache, v_cache, *rest), kwargs), backend)
    got, _ = run(op, permuted, backend)
    assert all(torch.equal(g, w[order]) for g, w in zip(got, want, strict=True))


@per_backend
def test_deterministic(op, backend, device):
    results = [run(op, find(op, "tree", device), backend)[0] for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", [b for b, d in available("kv_scatter") if d.type == "cpu" and b != "triton"])
def test_of_equal_positions_the_last_row_stays(backend):
    caches = torch.zeros(2, 9, 4, 8, 64)
    k, v = torch.randn(2, 9, 4, 40, 64)
    index = torch.full((9, 40), 3, dtype=torch.int32)
    index[:, -2:] = -1
    fastops.kv_scatter(*caches, k, v, index, backend=backend)
    assert torch.equal(caches[0, :, :, 3], k[:, :, 37])
    assert torch.equal(caches[1, :, :, 3], v[:, :, 37])


# Bad arguments


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call_of(op, paged=False):
    """The keyword arguments of a good call; B 2, Hkv 3, T or A 4, D 8, 16 rows a sequence."""
    shape = (9, 4, 3, 8) if paged else (2, 3, 16, 8)
    caches = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    call = {"k_cache": caches[0].clone(), "v_cache": caches[1].clone()}
    if op != "kv_compact":
        call |= {"k": torch.ones(2, 3, 4, 8), "v": torch.ones(2, 3, 4, 8)}
    if op == "kv_scatter":
        return call | {"index": ints([0, 5, -1, 3], [7, 6, 5, 15])}
    call["lengths"] = ints(3, 12)
    if op == "kv_compact":
        call |= {"accept_index": ints([0, 2, 3, -1], [0, 1, -1, -1]), "accept_len": ints(3, 2)}
    if paged:
        call["block_table"] = ints([0, 2, 4, 6], [1, 3, 5, 8])
    return call


def rope(r=4, n=20, **changes):
    return {"cos": torch.ones(n, r), "sin": torch.zeros(n, r), **changes}


OF_ROWS = ("kv_append", "kv_scatter")
PAGED = ("kv_append", "kv_compact")
BAD = {
    "cache dtype": (OPS, 0, dict(k_cache=torch.zeros(2, 3, 16, 8).double()),
        "k_cache must be float32, float16 or bfloat16, got float64"),
    "cache integer": (OPS, 0, dict(k_cache=torch.zeros(2, 3, 16, 8).int()),
        "k_cache must be float32, float16 or bfloat16, got int32"),
    "v_cache device": (OPS, 0, dict(v_cache=torch.zeros(2, 3, 16, 8, device="meta")),
        "v_cache must be on cpu like k_cache, got meta"),
    "v_cache dtype": (OPS, 0, dict(v_cache=torch.zeros(2, 3, 16, 8).half()), "v_cache must be float32, got float16"),
    "cache dims": (OPS, 0, dict(k_cache=torch.zeros(6, 16, 8)), "k_cache must be [B, Hkv, S_cap, D], got [6, 16, 8]"),
    "cache without columns": (OPS, 0, dict(k_cache=torch.zeros(2, 3, 16, 0)),
        "k_cache must be [B, Hkv, S_cap, D], got [2, 3, 16, 0]"),
    "paged cache dims": (PAGED, 1, dict(k_cache=torch.zeros(9, 4, 24)),
        "k_cache must be [n_blocks, block, Hkv, D], got [9, 4, 24]"),
    "v_cache shape": (OPS, 0, dict(v_cache=torch.zeros(2, 3, 17, 8)),
        "v_cache must have the shape of k_cache, [2, 3, 16, 8], got [2, 3, 17, 8]"),
    "k_cache last dim": (OPS, 0, dict(k_cache=torch.zeros(2, 3, 8, 16).mT),
        "k_cache must have a contiguous last dim, got strides [384, 128, 1, 16]"),
    "v_cache last dim": (OPS, 0, dict(v_cache=torch.zeros(2, 3, 16, 16)[..., ::2]),
        "v_cache must have a contiguous last dim, got strides [768, 256, 16, 2]"),
    "table device": (PAGED, 1, dict(block_table=torch.zeros(2, 4, dtype=torch.int32, device="meta")),
        "block_table must be on cpu like k_cache, got meta"),
    "table dtype": (PAGED, 1, dict(block_table=torch.zeros(2, 4).long()), "block_table must be int32, got int64"),
    "table dims": (PAGED, 1, dict(block_table=ints(1, 2)), "block_table must be [B, max_blocks], got [2]"),
    "k_cache expanded": (OPS, 0, dict(k_cache=torch.zeros(1, 3, 16, 8).expand(2, 3, 16, 8)),
        "k_cache must not overlap itself, got shape [2, 3, 16, 8] with strides [0, 128, 8, 1]"),
    "v_cache overlapping": (OPS, 0, dict(v_cache=torch.zeros(1000).as_strided((2, 3, 16, 8), (384, 128, 7, 1))),
        "v_cache must not overlap itself, got shape [2, 3, 16, 8] with strides [384, 128, 7, 1]"),
    "k device": (OF_ROWS, 0, dict(k=torch.zeros(2, 3, 4, 8, device="meta")),
        "k must be on cpu like k_cache, got meta"),
    "k dtype": (OF_ROWS, 0, dict(k=torch.zeros(2, 3, 4, 8).half()), "k must be float32, got float16"),
    "k dims": (OF_ROWS, 0, dict(k=torch.zeros(2, 3, 8)), "k must be [B, Hkv, {T}, D] = [2, 3, {T}, 8], got [2, 3, 8]"),
    "k heads": (OF_ROWS, 0, dict(k=torch.zeros(2, 6, 4, 8)),
        "k must be [B, Hkv, {T}, D] = [2, 3, {T}, 8], got [2, 6, 4, 8]"),
    "k batch": (OF_ROWS, 0, dict(k=torch.zeros(3, 3, 4, 8)),
        "k must be [B, Hkv, {T}, D] = [2, 3, {T}, 8], got [3, 3, 4, 8]"),
    "k dim": (OF_ROWS, 0, dict(k=torch.zeros(2, 3, 4, 7)),
        "k must be [B, Hkv, {T}, D] = [2, 3, {T}, 8], got [2, 3, 4, 7]"),
    "k last dim": (OF_ROWS, 0, dict(k=torch.zeros(2, 3, 8, 4).mT),
        "k must have a contiguous last dim, got strides [96, 32, 1, 4]"),
    "v device": (OF_ROWS, 0, dict(v=torch.zeros(2, 3, 4, 8, device="meta")),
        "v must be on cpu like k_cache, got meta"),
    "v dtype": (OF_ROWS, 0, dict(v=torch.zeros(2, 3, 4, 8).bfloat16()), "v must be float32, got bfloat16"),
    "v heads": (OF_ROWS, 0, dict(v=torch.zeros(2, 1, 4, 8)),
        "v must be [B, Hkv, {T}, D] = [2, 3, {T}, 8], got [2, 1, 4, 8]"),
    "v rows": (OF_ROWS, 0, dict(v=torch.zeros(2, 3, 5, 8)),
        "v must have the shape of k, [2, 3, 4, 8], got [2, 3, 5, 8]"),
    "v last dim": (OF_ROWS, 0, dict(v=torch.zeros(2, 3, 8, 4).mT),
        "v must have a contiguous last dim, got strides [96, 32, 1, 4]"),
    "too many rows": (("kv_append",), 0,
        dict(k_cache=torch.zeros(65536, 32768, 0, 1), v_cache=torch.zeros(65536, 32768, 0, 1),
            k=torch.zeros(1, 1, 1, 1).expand(65536, 32768, 1, 1), v=torch.zeros(1, 1, 1, 1).expand(65536, 32768, 1, 1)),
        "k must have fewer than 2^31 rows in all, got [65536, 32768, 1, 1]"),
    "lengths device": (PAGED, 0, dict(lengths=torch.zeros(2, dtype=torch.int32, device="meta")),
        "lengths must be on cpu like k_cache, got meta"),
    "lengths dtype": (PAGED, 0, dict(lengths=torch.zeros(2).long()), "lengths must be int32, got int64"),
    "lengths size": (PAGED, 0, dict(lengths=ints(1, 2, 3)), "lengths must be [B] = [2], got [3]"),
    "lengths dims": (PAGED, 0, dict(lengths=ints([1, 2])), "lengths must be [B] = [2], got [1, 2]"),
    "lengths size paged": (PAGED, 1, dict(lengths=ints(1)), "lengths must be [B] = [2], got [1]"),
    "k batch paged": (("kv_append",), 1, dict(k=torch.zeros(3, 3, 4, 8)),
        "k must be [B, Hkv, T, D] = [2, 3, T, 8], got [3, 3, 4, 8]"),
    "q_lens dtype": (("kv_append",), 0, dict(q_lens=torch.zeros(2)), "q_lens must be int32, got float32"),
    "q_lens size": (("kv_append",), 0, dict(q_lens=ints(1)), "q_lens must be [B] = [2], got [1]"),
    "cos alone": (("kv_append",), 0, rope(sin=None), "cos and sin must be given together, got only cos"),
    "sin alone": (("kv_append",), 0, rope(cos=None), "cos and sin must be given together, got only sin"),
    "interleaved alone": (("kv_append",), 0, dict(rope_interleaved=True),
        "rope_interleaved must be False without cos and sin, got True"),
    "positions alone": (("kv_append",), 0, dict(positions=torch.zeros(2, 4, dtype=torch.int32)),
        "positions must be None without cos and sin, got [2, 4]"),
    "cos device": (("kv_append",), 0, rope(cos=torch.zeros(20, 4, device="meta")),
        "cos must be on cpu like k_cache, got meta"),
    "cos dtype": (("kv_append",), 0, rope(cos=torch.zeros(20, 4).half()), "cos must be float32, got float16"),
    "cos dtype of halves": (("kv_append",), 0,
        rope(cos=torch.zeros(20, 4).bfloat16(), k_cache=torch.zeros(2, 3, 16, 8).half(),
            v_cache=torch.zeros(2, 3, 16, 8).half(), k=torch.zeros(2, 3, 4, 8).half(),
            v=torch.zeros(2, 3, 4, 8).half()),
        "cos must be float32 or float16, got bfloat16"),
    "cos width": (("kv_append",), 0, rope(5), "cos must be [max_positions, R / 2] with R at most D = 8, got [20, 5]"),
    "cos dims": (("kv_append",), 0, rope(cos=torch.zeros(4)),
        "cos must be [max_positions, R / 2] with R at most D = 8, got [4]"),
    "sin dtype": (("kv_append",), 0, rope(sin=torch.zeros(20, 4).half()), "sin must be float32, got float16"),
    "sin shape": (("kv_append",), 0, rope(sin=torch.zeros(20, 3)),
        "sin must have the shape of cos, [20, 4], got [20, 3]"),
    "cos last dim": (("kv_append",), 0, rope(cos=torch.ones(4, 20).T),
        "cos must have a contiguous last dim, got strides [1, 20]"),
    "sin last dim": (("kv_append",), 0, rope(sin=torch.ones(20, 8)[:, ::2]),
        "sin must have a contiguous last dim, got strides [8, 2]"),
    "positions shape": (("kv_append",), 0, rope(positions=torch.zeros(2, 3, dtype=torch.int32)),
        "positions must be [B, T] = [2, 4], got [2, 3]"),
    "accept_index dtype": (("kv_compact",), 0, dict(accept_index=torch.zeros(2, 4).long()),
        "accept_index must be int32, got int64"),
    "accept_index batch": (("kv_compact",), 0, dict(accept_index=torch.zeros(3, 4).int()),
        "accept_index must be [B, T] = [2, 4], got [3, 4]"),
    "accept_index dims": (("kv_compact",), 0, dict(accept_index=ints(0, 1)),
        "accept_index must be [B, T] = [2, 2], got [2]"),
    "accept_len size": (("kv_compact",), 0, dict(accept_len=ints(0)), "accept_len must be [B] = [2], got [1]"),
    "accept_len device": (("kv_compact",), 0, dict(accept_len=torch.zeros(2, dtype=torch.int32, device="meta")),
        "accept_len must be on cpu like k_cache, got meta"),
    "index dtype": (("kv_scatter",), 0, dict(index=torch.zeros(2, 4).long()), "index must be int32, got int64"),
    "index size": (("kv_scatter",), 0, dict(index=torch.zeros(2, 3).int()),
        "index must be [B, A] = [2, 4], got [2, 3]"),
}  # fmt: skip
FAULTS = [(op, name) for name, (ops, *_) in BAD.items() for op in ops]
per_fault = pytest.mark.parametrize(("op", "name"), FAULTS, ids=[f"{op}-{name}" for op, name in FAULTS])


def bad_call(op, name, device="cpu"):
    """(keyword arguments, the whole message)."""
    _, paged, changes, message = BAD[name]
    arguments = {**call_of(op, bool(paged)), **changes}

    def moved(value):
        if not isinstance(value, torch.Tensor) or value.device.type in ("meta", str(device)):
            return value
        away = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device=device)
        return away.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)

    arguments = {key: moved(value) for key, value in arguments.items()}
    return arguments, f"fastops::{op}: {message.replace('{T}', 'A' if op == 'kv_scatter' else 'T')}"


def unchanged(arguments):
    """Raises unless the caches are afterwards what they are now."""
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    before = [c if c.device.type == "meta" else c.clone() for c in caches]

    def check():
        for now, then in zip(caches, before, strict=True):
            assert now.device.type == "meta" or torch.equal(bits(now), bits(then))

    return check


@per_fault
def test_rejects(op, name):
    for backend, device in available(op):
        arguments, message = bad_call(op, name, device)
        check = unchanged(arguments)
        with pytest.raises(RuntimeError) as raised:
            getattr(fastops, op)(**arguments, backend=backend)
        where = "on cuda:0" if device.type == "cuda" else "on cpu"
        assert str(raised.value) == message.replace("on cpu", where), backend
        check()


@per_fault
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(op, name, path):
    arguments, message = bad_call(op, name)
    check = unchanged(arguments)
    context = torch.no_grad()
    call = getattr(torch.ops.fastops, op)
    given = arguments
    if path == "fake":
        context = FakeTensorMode()
        given = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif path == "explain":
        call = functools.partial(fastops.explain, op)
    with context, pytest.raises(RuntimeError) as raised:
        call(**given)
    assert str(raised.value) == message
    check()


BAD_VALUES = {
    "negative length": (PAGED, 0, dict(lengths=ints(3, -1)),
        "lengths must be from 0 to {12} (capacity 16, {4} new rows), got -1 at [1]"),
    "too long": (PAGED, 0, dict(lengths=ints(17, 3)),
        "lengths must be from 0 to {first} (capacity 16, {new} new rows), got 17 at [0]"),
    "one too long": (("kv_append",), 0, dict(lengths=ints(3, 13)),
        "lengths must be from 0 to 12 (capacity 16, 4 new rows), got 13 at [1]"),
    "one too long for some": (("kv_append",), 0, dict(lengths=ints(16, 14), q_lens=ints(0, 3)),
        "lengths must be from 0 to 13 (capacity 16, 3 new rows), got 14 at [1]"),
    "largest length": (("kv_append",), 1, dict(lengths=ints(2**31 - 1, 0)),
        "lengths must be from 0 to 12 (capacity 16, 4 new rows), got 2147483647 at [0]"),
    "one accepted row too long": (("kv_compact",), 0, dict(lengths=ints(13, 14)),
        "lengths must be from 0 to 12 (capacity 16, 4 new rows), got 13 at [0]"),
    "too many rows wanted": (("kv_append",), 0, dict(q_lens=ints(4, 5)),
        "q_lens must be from 0 to T = 4, got 5 at [1]"),
    "negative rows wanted": (("kv_append",), 0, dict(q_lens=ints(-1, 4)),
        "q_lens must be from 0 to T = 4, got -1 at [0]"),
    "dead page": (PAGED, 1, dict(block_table=ints([0, 2147480000, 4, 6], [1, 3, 5, 8])),
        "block_table must hold pages from 0 to n_blocks - 1 = 8 where rows are, got 2147480000 at [0, 1]"),
    "negative page": (("kv_append",), 1, dict(block_table=ints([0, 2, 4, 6], [1, 3, 5, -1])),
        "block_table must hold pages from 0 to n_blocks - 1 = 8 where rows are, got -1 at [1, 3]"),
    "page beyond": (("kv_append",), 1, dict(block_table=ints([9, 2, 4, 6], [1, 3, 5, 8])),
        "block_table must hold pages from 0 to n_blocks - 1 = 8 where rows are, got 9 at [0, 0]"),
    "position beyond": (("kv_append",), 0, rope(positions=ints([0, 1, 2, 3], [19, 20, 0, 0])),
        "positions must be from 0 to max_positions - 1 = 19, got 20 at [1, 1]"),
    "negative position": (("kv_append",), 0, rope(positions=ints([0, 1, -2, 3], [19, 0, 0, 0])),
        "positions must be from 0 to max_positions - 1 = 19, got -2 at [0, 2]"),
    "angles too few": (("kv_append",), 0, rope(n=15),
        "lengths + t must be from 0 to max_positions - 1 = 14, got 15 at [1, 3]"),
    "accepted too many": (("kv_compact",), 0, dict(accept_len=ints(5, 2)),
        "accept_len must be from 0 to T = 4, got 5 at [0]"),
    "accepted negative": (("kv_compact",), 0, dict(accept_len=ints(3, -1)),
        "accept_len must be from 0 to T = 4, got -1 at [1]"),
    "not ascending": (("kv_compact",), 0, dict(accept_index=ints([0, 2, 2, -1], [0, 1, -1, -1])),
        "accept_index must ascend from 0 to T - 1 = 3, got 2 at [0, 2]"),
    "index beyond the tree": (("kv_compact",), 0, dict(accept_index=ints([0, 2, 4, -1], [0, 1, -1, -1])),
        "accept_index must ascend from 0 to T - 1 = 3, got 4 at [0, 2]"),
    "padding accepted": (("kv_compact",), 0, dict(accept_index=ints([0, 2, 3, -1], [-1, 1, -1, -1])),
        "accept_index must ascend from 0 to T - 1 = 3, got -1 at [1, 0]"),
    "index beyond": (("kv_scatter",), 0, dict(index=ints([0, 5, -1, 3], [7, 16, 5, 15])),
        "index must be from -1 to S_cap - 1 = 15, got 16 at [1, 1]"),
    "index below": (("kv_scatter",), 0, dict(index=ints([0, -2, -1, 3], [7, 1, 5, 15])),
        "index must be from -1 to S_cap - 1 = 15, got -2 at [0, 1]"),
}  # fmt: skip
BAD_VALUE_CALLS = [(op, name) for name, (ops, *_) in BAD_VALUES.items() for op in ops]
per_bad_value = pytest.mark.parametrize(
    ("op", "name"), BAD_VALUE_CALLS, ids=[f"{op}-{name}" for op, name in BAD_VALUE_CALLS]
)


def bad_values(op, name, device="cpu"):
    _, paged, changes, message = BAD_VALUES[name]
    arguments = {**call_of(op, bool(paged)), **changes}
    tree = op == "kv_compact"  # whose sequences accept rows 0, 2, 3 and 0, 1
    for key, append, compact in (("12", 12, 14), ("4", 4, 2), ("first", 12, 12), ("new", 4, 4)):
        message = message.replace(f"{{{key}}}", str(compact if tree else append))
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return arguments, f"fastops::{op}: {message}"


@per_bad_value
def test_bad_values_are_refused_before_anything_is_written(op, name):
    for backend, device in available(op):
        arguments, message = bad_values(op, name, device)
        check = unchanged(arguments)
        with fastops.debug_checks(), pytest.raises(RuntimeError) as raised:
            getattr(fastops, op)(**arguments, backend=backend)
        assert str(raised.value) == message, backend
        check()
        if device.type == "cpu":
            with pytest.raises(RuntimeError) as raised:
                getattr(fastops, op)(**arguments, backend=backend)
            assert str(raised.value) == message, backend
            check()


@per_bad_value
def test_bad_values_are_skipped_by_kernels_that_cannot_check(op, name):
    """What a GPU does, against the reference; Triton's interpreter shows it without one."""
    arguments, _ = bad_values(op, name)
    want = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    getattr(reference, op)(**want)
    runs = [("cuda", b) for b, d in available(op) if d.type == "cuda"]
    if ("triton", CPU) in available(op):
        runs.append(("cpu", "triton"))
    for device, backend in runs:
        given, _ = bad_values(op, name, device)
        if device == "cpu":
            registry[op].triton_member("launch")(**given)
        else:
            getattr(fastops, op)(**given, backend=backend)
        for cache in ("k_cache", "v_cache"):
            torch.testing.assert_close(given[cache].cpu(), want[cache], rtol=1e-6, atol=1e-6)


NASTY = [-(2**31), -7, -1, 0, 1, 2, 3, 5, 8, 9, 15, 16, 17, 2147480000, 2**31 - 1]


def hostile_call(op, trial):
    """Integers that may be anything; no two rows go to one place, or the result would be a matter of order."""
    generator = torch.Generator().manual_seed(trial)

    def hostile(*shape):
        plain = torch.randint(0, 17, shape, generator=generator)
        nasty = torch.tensor(NASTY)[torch.randint(0, len(NASTY), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < 0.25, nasty, plain).to(torch.int32)

    paged = trial % 2 == 1 and op != "kv_scatter"
    call = {k: v if v.is_floating_point() else hostile(*v.shape) for k, v in call_of(op, paged).items()}
    if paged:
        call["block_table"] = (torch.randperm(14, generator=generator)[:8] - 2).reshape(2, 4).to(torch.int32)
    if op == "kv_append" and trial % 3 == 0:
        call |= rope(positions=hostile(2, 4), q_lens=hostile(2))
    if op == "kv_compact" and trial % 3:  # mostly ascending, so that something moves
        call["accept_index"] = torch.randint(0, 3, (2, 4), generator=generator).cumsum(1).to(torch.int32)
        call["lengths"] = torch.randint(0, 13, (2,), generator=generator).to(torch.int32)
    if op == "kv_scatter":
        call["index"] = torch.stack([torch.randperm(24, generator=generator)[:4] - 4 for _ in "ab"]).to(torch.int32)
    return call


@pytest.mark.parametrize("op", OPS)
def test_hostile_values(op):
    """On a GPU, and in Triton's interpreter, nothing is checked: rows that are not there are left out."""
    trials = 200 if any(d.type == "cuda" for _, d in available(op)) else 30
    for backend, device in available(op):
        if device.type == "cpu" and backend != "triton":
            continue
        for trial in range(trials):
            want = hostile_call(op, trial)
            given = {k: v.clone().to(device) for k, v in want.items()}
            getattr(reference, op)(**want)
            if device.type == "cpu":
                registry[op].triton_member("launch")(**given)
            else:
                getattr(fastops, op)(**given, backend=backend)
            for cache in ("k_cache", "v_cache"):
                torch.testing.assert_close(given[cache].cpu(), want[cache], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", PAGED)
def test_dead_pages_that_hold_no_new_rows_are_no_matter(op):
    for backend, device in available(op):
        arguments = call_of(op, paged=True)
        arguments["block_table"] = ints([0, 2, -1, 2147480000], [-7, 99, -1, 8])
        if op == "kv_compact":
            arguments["lengths"] = ints(3, 12)
        before = [arguments[name].clone() for name in ("k_cache", "v_cache")]
        arguments = {k: v.to(device) for k, v in arguments.items()}
        getattr(fastops, op)(**arguments, backend=backend)
        rest = {k: v for k, v in arguments.items() if k not in ("k_cache", "v_cache")}
        after = arguments["k_cache"], arguments["v_cache"]
        assert TRUTH[op].error(after, *(b.to(device) for b in before), **rest) == 0


# Machinery


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["rows", "together", "paged", "rope_tree", "no_rows"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, name, device):
    if name not in [s.name for s in TRUTH[op].samples(CPU, torch.float32)]:
        pytest.skip("not a sample of this op")
    args, kwargs = find(op, name, torch.device(device))
    torch.library.opcheck(getattr(torch.ops.fastops, op).default, args, kwargs)


@per_backend
def test_sizes_do_not_recompile(op, backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(k_cache, v_cache, *rest, **kwargs):
        getattr(fastops, op)(k_cache, v_cache, *rest, **kwargs)
        return k_cache.sum() + v_cache.sum()

    with fastops.use_backend(op, backend):
        for batch, heads, rows, capacity, dim in ((3, 4, 6, 40, 16), (5, 2, 9, 33, 24), (7, 8, 3, 50, 64)):
            caches = reference.random_caches(batch, heads, capacity, dim, device, torch.float32)[:2]
            k, v = torch.randn(2, batch, heads, rows, dim).to(device)
            lengths = torch.arange(batch, dtype=torch.int32, device=device)
            index, count = (t.to(device) for t in reference.random_accepts(batch, rows))
            rest = {
                "kv_append": (k, v, lengths),
                "kv_compact": (lengths, index, count),
                "kv_scatter": (k, v, index),
            }[op]
            want, _ = run(op, ((*(c.clone() for c in caches), *rest), {}), backend)
            total = f(*caches, *rest)
            assert all(torch.equal(c, w) for c, w in zip(caches, want, strict=True))
            torch.testing.assert_close(total, want[0].sum() + want[1].sum())
    assert compiler.frame_count == 1


@backends("kv_append", "kv_compact")
def test_a_paged_step_compiles(op, backend, device):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def f(*args, **kwargs):
        getattr(fastops, op)(*args, **kwargs, backend=backend)

    for name in ("paged", "rope_tree") if op == "kv_append" else ("paged",):
        want, _ = run(op, find(op, name, device), backend)
        args, kwargs = find(op, name, device)
        f(*args, **kwargs)
        assert all(torch.equal(g, w) for g, w in zip(args[:2], want, strict=True))


@per_backend
def test_caches_of_one_tensor_compile(op, backend, device):
    """Both are written, and torch.compile must see that they share a base."""

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def f(both, *rest, **kwargs):
        getattr(fastops, op)(both[..., 0, :], both[..., 1, :], *rest, **kwargs, backend=backend)
        return both.sum()

    (k_cache, v_cache, *rest), kwargs = find(op, "together", device)
    both = torch.stack([k_cache, v_cache], dim=3)
    want, _ = run(op, find(op, "together", device), backend)
    total = f(both, *rest, **kwargs)
    assert torch.equal(both[..., 0, :], want[0])
    assert torch.equal(both[..., 1, :], want[1])
    assert torch.equal(total, both.sum())


@per_backend
def test_gradients_and_autocast_do_not_matter(op, backend, device):
    """The caches are constants of the graph, whatever the new rows are."""
    args, kwargs = find(op, "rows", device)
    want, _ = run(op, find(op, "rows", device), backend)
    for rows in args[2:4]:
        if rows.is_floating_point():
            rows.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        getattr(fastops, op)(*args, **kwargs, backend=backend)
    assert all(torch.equal(g, w) for g, w in zip(args[:2], want, strict=True))
    assert not any(cache.requires_grad for cache in args[:2])
    args, kwargs = find(op, "rows", device)
    with torch.inference_mode():
        getattr(fastops, op)(*args, **kwargs, backend=backend)
    assert all(torch.equal(g, w) for g, w in zip(args[:2], want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_written_tensors_are_the_caches(op):
    assert registry[op].written == (0, 1)
    args, _ = find(op, "rows")
    k_cache, v_cache = registry[op].results(None, args)
    assert k_cache is args[0]
    assert v_cache is args[1]


@per_sample
def test_cost_counts_the_bytes(op, name):
    (k_cache, v_cache, *rest), kwargs = find(op, name, dtype=torch.bfloat16)
    heads, dim = k_cache.shape[2 if "block_table" in kwargs else 1], k_cache.shape[3]
    if op == "kv_append":
        k, _, lengths = rest
        moved = int(kwargs["q_lens"].sum()) if "q_lens" in kwargs else k.shape[0] * k.shape[2]
        least = lengths.numel() * 4
    elif op == "kv_compact":
        moved = sum(int((row[:n] != torch.arange(n)).sum()) for row, n in zip(rest[1], rest[2].tolist(), strict=True))
        least = 4 * (rest[0].numel() + rest[2].numel() + int(rest[2].sum()))
    else:
        moved, least = int((rest[2] >= 0).sum()), 4 * rest[2].numel()
    cost = TRUTH[op].cost(k_cache, v_cache, *rest, **kwargs)
    rows = 2 * 2 * moved * heads * dim * 2  # k and v, read and written, 2 bytes each
    small = sum(t.numel() * t.element_size() for t in kwargs.values() if isinstance(t, torch.Tensor))
    assert rows + least <= cost.bytes <= rows + least + small + (4 * rest[-1].numel() if "block_table" in kwargs else 0)
    assert cost.flops == (6 * moved * heads * kwargs["cos"].shape[1] if "cos" in kwargs else 0)
    meta = [t.to("meta") for t in (k_cache, v_cache, *rest)]
    on_meta = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in kwargs.items()}
    assert TRUTH[op].cost(*meta, **on_meta).bytes >= rows


@per_dtype
@pytest.mark.parametrize(("op", "name"), [("kv_append", "rope_part"), ("kv_compact", "rows"), ("kv_scatter", "rows")])
def test_error_sees_one_wrong_element(op, name, dtype):
    (_, _, *rest), kwargs = sample = find(op, name, dtype=dtype)
    after, before = run(op, sample, "reference")
    check = functools.partial(TRUTH[op].error, **kwargs)
    assert check(after, *before, *rest) <= TRUTH[op].budget
    changed = (after[0] != before[0]).nonzero()
    for side in (0, 1):
        for at in (tuple(changed[0]), tuple(changed[-1]), (0, 0, 0, 0)):
            bad = [c.clone() for c in after]
            bad[side][at] = bad[side][at] * 1.05 + 1
            assert check(tuple(bad), *before, *rest) > TRUTH[op].budget
    assert check(before, *before, *rest) > TRUTH[op].budget
    with pytest.raises(ValueError, match="zip"):
        check(after[:1], *before, *rest)


@pytest.mark.parametrize("op", OPS)
def test_explain(op):
    args, kwargs = find(op, "rows")
    for backend, device in available(op):
        if device.type == "cpu":
            assert str(fastops.explain(op, *args, **kwargs, backend=backend)).startswith(f"fastops::{op} on cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("cpu", "cpu", marks=pytest.mark.slow),
        *(pytest.param(b, "cuda", marks=[pytest.mark.gpu, pytest.mark.slow]) for b in ("cuda", "triton")),
    ],
)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_more_than_2_to_the_31_elements(op, backend, device, paged):
    """On a CPU the memory that nobody touches is never there."""
    if backend not in registry[op].available(device):
        pytest.skip(f"no {backend} kernel here")
    if paged and op == "kv_scatter":
        pytest.skip("never paged")
    rows, dim = (2**31 >> 6) + 4096, 64
    shape = (rows // 16, 16, 1, dim) if paged else (1, 1, rows, dim)
    k_cache, v_cache = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    table = torch.arange(rows // 16, dtype=torch.int32, device=device)[None] if paged else None
    k, v = torch.randn(2, 1, 1, 3, dim, device=device).half()
    length = rows - 3
    tail = [c.view(rows, dim)[length:] for c in (k_cache, v_cache)]
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    kwargs = {"block_table": table} if paged else {}
    if op == "kv_append":
        fastops.kv_append(k_cache, v_cache, k, v, ints([length]), **kwargs, backend=backend)
        want = k[0, 0], v[0, 0]
    elif op == "kv_scatter":
        fastops.kv_scatter(k_cache, v_cache, k, v, ints([[length + 2, length, length + 1]]), backend=backend)
        want = k[0, 0, [1, 2, 0]], v[0, 0, [1, 2, 0]]
    else:
        tail[0].copy_(k[0, 0])
        tail[1].copy_(v[0, 0])
        fastops.kv_compact(k_cache, v_cache, ints([length]), ints([[0, 2, -1]]), ints([2]), **kwargs, backend=backend)
        want = k[0, 0, [0, 2, 2]], v[0, 0, [0, 2, 2]]
    assert all(torch.equal(t, w) for t, w in zip(tail, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["rows", "paged"])
@pytest.mark.parametrize("op", OPS)
def test_captures_in_a_cuda_graph(op, name, backend):
    """Lengths and positions are read at each replay."""
    if op == "kv_scatter" and name == "paged":
        pytest.skip("never paged")
    (k_cache, v_cache, *rest), kwargs = find(op, name, torch.device("cuda"), torch.bfloat16)
    getattr(fastops, op)(k_cache, v_cache, *rest, **kwargs, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(fastops, op)(k_cache, v_cache, *rest, **kwargs, backend=backend)
    if op == "kv_scatter":
        rest[2].copy_(rest[2].flip(0))
        rest[0].neg_()
    else:
        lengths = rest[0] if op == "kv_compact" else rest[2]
        lengths.copy_((lengths - 1).clamp(min=0))
    for cache in (k_cache, v_cache):
        cache.normal_()
    before = k_cache.clone(), v_cache.clone()
    graph.replay()
    assert TRUTH[op].error((k_cache, v_cache), *before, *rest, **kwargs) == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_tensor_s_device(op, backend):
    sample = find(op, "rows", torch.device("cuda:1"), torch.bfloat16)
    assert torch.cuda.current_device() == 0
    assert error(op, sample, backend) == 0
    assert torch.cuda.current_device() == 0
