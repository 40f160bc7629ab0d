import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import mf_sgd as reference
from fastops.testing import available, on_copies

CPU = torch.device("cpu")
BACKENDS = available("mf_sgd")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), BACKENDS, ids=[f"{backend}-{device.type}" for backend, device in BACKENDS]
)
SAMPLES = [s.name for s in reference.samples(CPU, torch.float32)]
RATES = {"negatives": 4, "lr": 0.05, "reg": 0.01, "seed": 11}
op = torch.ops.fastops.mf_sgd


def sample(name, device=CPU):
    return next(s for s in reference.samples(device, torch.float32) if s.name == name)


def tables(users=30, items=40, factors=16, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((users, factors), (items, factors), (users,), (items,), (1,))
    return [(0.3 * torch.randn(*shape, generator=generator)).to(device) for shape in shapes]


def draw_pairs(n, users=30, items=40, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, rows, (n,), generator=generator) for rows in (users, items)]
    return torch.stack(ids, dim=1).to(device)


def run(args, backend=None, **kwargs):
    """(loss, the five tables afterwards); the arguments stay as they are."""
    return on_copies(fastops.mf_sgd, "mf_sgd", *args, **kwargs, backend=backend)


def skip_interpreter(backend, device):
    """Triton's interpreter takes minutes for thousands of examples."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("too many examples for Triton's interpreter")


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_random_words_are_philox():
    """Known answers of Random123, philox4x32-10: all zeros, and all ones in the words we can set."""
    words = reference.philox(0, torch.tensor([0]), 0)[:, 0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    first, second = reference.philox(5, torch.tensor([3, 4]), 0).T
    assert not torch.equal(first, second)
    assert torch.equal(reference.philox(5, torch.tensor([4]), 0)[:, 0], second)


def test_negatives_are_uniform():
    drawn = reference.negatives_of(10, 20000, 5, 7, -3, CPU)
    count = torch.bincount(drawn.flatten(), minlength=7).double()
    assert len(count) == 7
    expected = drawn.numel() / 7
    assert ((count - expected).abs() < 5 * math.sqrt(expected)).all()
    assert torch.equal(drawn[100:150], reference.negatives_of(110, 50, 5, 7, -3, CPU))


@per_backend
@pytest.mark.parametrize("name", SAMPLES)
def test_matches_float64(name, backend, device, poison):
    if name in ("most_negatives", "blocks"):
        skip_interpreter(backend, device)
    s = sample(name, device)
    got = run(s.args, backend, **s.kwargs)
    assert got[0].shape == ()
    assert got[0].dtype == torch.float32
    assert reference.error(got, *s.args, **s.kwargs) <= reference.BUDGET


@pytest.mark.parametrize("name", SAMPLES)
def test_every_instruction_set(name, cpu_isa):
    s = sample(name)
    assert reference.error(run(s.args, "cpu", **s.kwargs), *s.args, **s.kwargs) <= reference.BUDGET


@pytest.mark.parametrize("factors", [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 96, 128, 200, 256, 300])
@pytest.mark.parametrize("deterministic", [True, False])
def test_factors_on_the_cpu(factors, deterministic, cpu_isa):
    args = [*tables(factors=factors), draw_pairs(1)]
    got = run(args, "cpu", **RATES | {"negatives": 0}, deterministic=deterministic)
    assert reference.error(got, *args, **RATES | {"negatives": 0}) <= reference.BUDGET


@per_backend
def test_a_stream_in_chunks_is_the_same_stream(backend, device):
    """Cut at a multiple of the block: the same bits (but for the mean's). Anywhere: the same negatives."""
    skip_interpreter(backend, device)
    args, n = tables(device=device), 2 * reference.BLOCK + 100
    stream = draw_pairs(n, device=device)
    whole = run([*args, stream], backend, **RATES)
    parts = [t.clone() for t in args]
    losses = []
    for start in range(0, n, reference.BLOCK):
        piece = stream[start : start + reference.BLOCK]
        losses.append(fastops.mf_sgd(*parts, piece, **RATES, offset=start, backend=backend) * len(piece))
    assert same(whole[1:], parts)
    torch.testing.assert_close(torch.stack(losses).sum() / n, whole[0])


def test_negatives_do_not_depend_on_the_chunks():
    """lr so small that values stay: the losses of pieces of any size are those of the whole."""
    args, stream, rates = tables(), draw_pairs(1000), {**RATES, "lr": 1e-12}
    whole = run([*args, stream], "cpu" if "cpu" in dict(BACKENDS) else None, **rates)[0]
    total = sum(
        float(run([*args, stream[a:b]], **rates, offset=a)[0]) * (b - a)
        for a, b in ((0, 1), (1, 17), (17, 500), (500, 1000))
    )
    assert total / 1000 == pytest.approx(float(whole), rel=1e-5)
    shifted = run([*args, stream], **rates, offset=1)[0]
    assert float(shifted) != pytest.approx(float(whole), rel=1e-5)


@per_backend
def test_deterministic(backend, device):
    skip_interpreter(backend, device)
    args = [*tables(device=device), draw_pairs(3000, device=device)]
    assert same(run(args, backend, **RATES), run(args, backend, **RATES))


def test_threads_do_not_change_the_bits():
    args = [*tables(200, 300, 64), draw_pairs(5000, 200, 300)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(args, **RATES))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def sequential(args, pairs, negatives, lr, reg, seed):
    """float64, one pair with its negatives after the other, each example at the pair's values but its own row's."""
    user, item, user_bias, item_bias, bias = (t.double().clone() for t in args)
    drawn = reference.negatives_of(0, len(pairs), negatives, len(item), seed, CPU)
    loss = 0.0
    for (u, i), sampled in zip(pairs.tolist(), drawn.tolist(), strict=True):
        items = [i, *sampled]
        z = item[items] @ user[u] + user_bias[u] + item_bias[items] + bias
        label = torch.zeros(len(items), dtype=torch.float64)
        label[0] = 1
        g = torch.sigmoid(z) - label
        loss += float(torch.nn.functional.binary_cross_entropy_with_logits(z, label, reduction="sum"))
        row, all_of_user = user[u].clone(), len(items) * reg * user[u]
        for each, j in zip(g, items, strict=True):
            all_of_user += each * item[j]
            item[j] -= lr * (each * row + reg * item[j])
            item_bias[j] -= lr * (each + reg * item_bias[j])
        user[u] -= lr * all_of_user
        user_bias[u] -= lr * (g.sum() + len(items) * reg * user_bias[u])
        bias -= lr * g.sum()
    return loss / (len(pairs) * (1 + negatives)), [user, item, user_bias, item_bias, bias]


@pytest.mark.parametrize("factors", [5, 16, 40, 64])
def test_lock_free_on_one_thread_is_sequential_descent(factors, cpu_isa):
    args, stream = tables(factors=factors), draw_pairs(500)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        loss, *got = run([*args, stream], "cpu", **RATES, deterministic=False)
    finally:
        torch.set_num_threads(before)
    want_loss, want = sequential(args, stream, **RATES)
    assert float(loss) == pytest.approx(want_loss, rel=1e-5)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@per_backend
@pytest.mark.parametrize("deterministic", [True, False])
def test_learns(deterministic, backend, device):
    """Two groups of users who like two groups of items: told apart after some passes, on every backend."""
    skip_interpreter(backend, device)
    generator = torch.Generator().manual_seed(3)
    users = torch.randint(0, 60, (1500,), generator=generator)
    items = torch.randint(0, 20, (1500,), generator=generator) + 20 * (users % 2)
    stream = torch.stack([users, items], 1).to(device)
    args = [t * 0.3 for t in tables(60, 40, 8, device)]
    losses = []
    for epoch in range(40):
        rates = {**RATES, "lr": 0.2, "reg": 0.001, "seed": epoch}
        losses.append(float(fastops.mf_sgd(*args, stream, **rates, deterministic=deterministic, backend=backend)))
    assert losses[-1] < losses[0] - 0.05
    scores = (args[0] @ args[1].T).cpu()
    mine = torch.arange(60)[:, None] % 2 == torch.arange(40)[None] // 20
    assert scores[mine].mean() > scores[~mine].mean() + 1


@per_backend
@pytest.mark.parametrize("deterministic", [True, False])
def test_no_pairs_change_nothing(deterministic, backend, device):
    args = [*tables(device=device), draw_pairs(0, device=device)]
    got = run(args, backend, **RATES, deterministic=deterministic)
    assert got[0] == 0
    assert same(got[1:], args[:5])
    empty = [torch.zeros(shape, device=device) for shape in ((0, 3), (0, 3), (0,), (0,), ())]
    assert run([*empty, args[5]], backend, **RATES, deterministic=deterministic)[0] == 0


@per_backend
def test_strided_pairs_and_a_bias_without_dimensions(backend, device):
    args, stream = tables(device=device), draw_pairs(200, device=device)
    want = run([*args, stream], backend, **RATES)
    args[4] = args[4].reshape(())
    got = run([*args, stream.T.contiguous().T], backend, **RATES)
    assert got[5].shape == ()
    assert same(want, [*got[:5], got[5].reshape(1)])


@per_backend
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_step_of_nothing(deterministic, backend, device):
    args = [*tables(device=device), draw_pairs(100, device=device)]
    got = run(args, backend, **RATES | {"lr": 0.0}, deterministic=deterministic)
    assert same(got[1:], args[:5])
    assert got[0] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_ids_out_of_range_are_skipped_on_a_gpu(deterministic, backend):
    stream = draw_pairs(400, device="cuda")
    bad = stream.clone()
    bad[::7, 0] = 30
    bad[1::7, 1] = -1
    bad[2::7, 1] = 2**40
    args = tables(device="cuda")
    got = run([*args, bad], backend, **RATES, deterministic=deterministic)
    if deterministic:
        assert reference.error(got, *args, bad, **RATES) <= reference.BUDGET
    assert all(t.isfinite().all() for t in got)
    with fastops.debug_checks(), pytest.raises(RuntimeError, match="pairs must hold users from 0 to 29, got 30"):
        fastops.mf_sgd(*args, bad, **RATES, backend=backend)


def test_the_reference_skips_ids_out_of_range():
    """As the GPU kernels do; on the CPU the op itself raises before."""
    args, stream = tables(), draw_pairs(50)
    bad = stream.clone()
    bad[10] = torch.tensor([30, 3])
    copies = [t.clone() for t in args]
    reference.mf_sgd(*copies, bad, **RATES)
    assert not torch.equal(copies[0], args[0])
    untouched = ~torch.isin(torch.arange(30), stream[:, 0])
    assert torch.equal(copies[0][untouched], args[0][untouched])


_USER = torch.zeros(30, 16)
BAD = {
    "user dtype": (dict(user=torch.zeros(30, 16).half()), "user must be float32, got float16"),
    "user dims": (dict(user=torch.zeros(30)), "user must have 2 dimensions, got 1"),
    "user strides": (
        dict(user=torch.zeros(16, 30).T), "user must be contiguous, got strides [1, 30] of shape [30, 16]"
    ),
    "no factors": (
        dict(user=torch.zeros(30, 0), item=torch.zeros(40, 0)),
        "user must have at least 1 factor, got shape [30, 0]",
    ),
    "item factors": (dict(item=torch.zeros(40, 15)), "item must have shape [40, 16], got [40, 15]"),
    "item device": (dict(item=torch.zeros(40, 16, device="meta")), "item must be on cpu like user, got meta"),
    "item strides": (
        dict(item=torch.zeros(40, 32)[:, ::2]), "item must be contiguous, got strides [32, 2] of shape [40, 16]"
    ),
    "user_bias shape": (dict(user_bias=torch.zeros(31)), "user_bias must have shape [30], got [31]"),
    "item_bias shape": (dict(item_bias=torch.zeros(40, 1)), "item_bias must have shape [40], got [40, 1]"),
    "item_bias dtype": (dict(item_bias=torch.zeros(40).double()), "item_bias must be float32, got float64"),
    "global_bias shape": (dict(global_bias=torch.zeros(2)), "global_bias must have shape [] or [1], got [2]"),
    "global_bias dims": (dict(global_bias=torch.zeros(1, 1)), "global_bias must have shape [] or [1], got [1, 1]"),
    "pairs dtype": (dict(pairs=torch.zeros(5, 2, dtype=torch.int32)), "pairs must be int64, got int32"),
    "pairs shape": (dict(pairs=torch.zeros(5, 3, dtype=torch.int64)), "pairs must have shape [n, 2], got [5, 3]"),
    "pairs dims": (dict(pairs=torch.zeros(10, dtype=torch.int64)), "pairs must have shape [n, 2], got [10]"),
    "negatives": (dict(negatives=-1), "negatives must be from 0 to 1024, got -1"),
    "many negatives": (dict(negatives=1025), "negatives must be from 0 to 1024, got 1025"),
    "lr": (dict(lr=-0.5), "lr must be finite and at least 0, got -0.5"),
    "lr nan": (dict(lr=float("nan")), "lr must be finite and at least 0, got nan"),
    "reg": (dict(reg=float("inf")), "reg must be finite and at least 0, got inf"),
    "offset": (dict(offset=-1), "offset must be from 0 to 2^62 - 1, got -1"),
    "overlap": (
        dict(user=_USER, item=_USER, item_bias=torch.zeros(30)),
        "item must not overlap user, got tensors that share memory",
    ),
    "bias in a table": (
        dict(user=_USER, user_bias=_USER[3:5].view(32)[:30]),
        "user_bias must not overlap user, got tensors that share memory",
    ),
}  # fmt: skip


def bad_arguments(name):
    user, item, user_bias, item_bias, global_bias = (torch.zeros_like(t) for t in tables())
    good = dict(user=user, item=item, user_bias=user_bias, item_bias=item_bias, global_bias=global_bias)
    changed = BAD[name][0]
    return {**good, "pairs": draw_pairs(5), **RATES, "offset": 0, **changed}


def on(device, arguments):
    """Moved, and tensors that shared memory still do."""
    if device.type == "cpu":
        return arguments
    moved = {}
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            moved[name] = value
        elif value.untyped_storage()._cdata == _USER.untyped_storage()._cdata:
            base = moved.get("user")
            base = value.to(device) if base is None else base
            moved[name] = base.as_strided(value.shape, value.stride(), value.storage_offset())
        else:
            moved[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(
                value
            )
    return moved


@pytest.mark.parametrize("name", BAD)
@per_backend
def test_rejects(name, backend, device):
    message = BAD[name][1].replace("on cpu", f"on {'cuda:0' if device.type == 'cuda' else 'cpu'}")
    with pytest.raises(RuntimeError) as error:
        fastops.mf_sgd(**on(device, bad_arguments(name)), backend=backend)
    assert str(error.value) == f"fastops::mf_sgd: {message}"


@pytest.mark.parametrize("name", [n for n in BAD if "overlap" not in n and n != "bias in a table"])
@pytest.mark.parametrize("path", ["torch.ops", "fake"])
def test_rejects_without_a_named_backend(name, path):
    arguments = bad_arguments(name)
    context = torch.no_grad()
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with context, pytest.raises(RuntimeError) as error:
        op(**arguments)
    assert str(error.value) == f"fastops::mf_sgd: {BAD[name][1]}"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((3, 0), 30, "users from 0 to 29, got 30"),
        ((4, 0), -2, "users from 0 to 29, got -2"),
        ((2, 1), 40, "items from 0 to 39, got 40"),
        ((0, 1), -(2**62), f"items from 0 to 39, got {-(2**62)}"),
    ],
)
@pytest.mark.parametrize("backend", [b for b, device in BACKENDS if device.type == "cpu"])
def test_ids_out_of_range_raise_and_nothing_is_written(place, value, message, backend):
    args, stream = tables(), draw_pairs(5)
    stream[place] = value
    before = [t.clone() for t in args]
    with pytest.raises(RuntimeError) as error:
        fastops.mf_sgd(*args, stream, **RATES, backend=backend)
    assert str(error.value) == f"fastops::mf_sgd: pairs must hold {message}"
    assert same(args, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["plain", "odd", "no_pairs"])
def test_opcheck(name, device):
    s = sample(name, torch.device(device))
    torch.library.opcheck(op.default, s.args, s.kwargs)


@per_backend
def test_compiles_without_recompiling(backend, device):
    compiler = CompileCounter()

    def step(user, item, user_bias, item_bias, bias, stream):
        return fastops.mf_sgd(user, item, user_bias, item_bias, bias, stream, **RATES) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    with fastops.use_backend("mf_sgd", backend):
        for n in (40, 50, 61):
            args, stream = tables(n, n + 3, device=device), draw_pairs(n, n, n + 3, device=device)
            want = run([*args, stream], backend, **RATES)
            got = compiled(*args, stream)
            assert same(want, [got / 2, *args])
    assert compiler.frame_count == 1


def test_cost_counts_the_tensors():
    s = sample("plain")
    cost = reference.cost(*s.args, **s.kwargs)
    read = sum(t.numel() * t.element_size() for t in s.args)
    written = sum(t.numel() * t.element_size() for t in s.args[:5])
    assert cost.bytes == read + written
    assert cost.flops == 10 * 32 * 300 * 5
    assert reference.update_bytes(10, 4, 64) == 10 * (16 + 8 * 65 * 6)


@pytest.mark.parametrize("broken", range(6))
def test_error_sees_one_wrong_element(broken):
    s = sample("plain")
    got = [t.clone() for t in run(s.args, "reference", **s.kwargs)]
    assert reference.error(tuple(got), *s.args, **s.kwargs) <= reference.BUDGET
    got[broken].view(-1)[0] += 1e-4
    assert reference.error(tuple(got), *s.args, **s.kwargs) > reference.BUDGET


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_captures_in_a_cuda_graph(backend, deterministic):
    args, stream = tables(device="cuda"), draw_pairs(3000, device="cuda")
    want = run([*args, stream], backend, **RATES, deterministic=deterministic)
    kept = [t.clone() for t in args]
    fastops.mf_sgd(*kept, stream, **RATES, deterministic=deterministic, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fastops.mf_sgd(*kept, stream, **RATES, deterministic=deterministic, backend=backend)
    for table, before in zip(kept, args, strict=True):
        table.copy_(before)
    graph.replay()
    if deterministic:
        assert same(want, [loss, *kept])
    else:
        torch.testing.assert_close(loss, want[0], rtol=0.05, atol=0)
