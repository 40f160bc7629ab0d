import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastops
from fastops.reference import tree_build as reference
from fastops.testing import available, non_contiguous

CPU = torch.device("cpu")
SAMPLES = [s.name for s in reference.samples(CPU)]
WHERE = available("tree_build")
per_backend = pytest.mark.parametrize(
    ("backend", "device"), WHERE, ids=[f"{backend}-{device.type}" for backend, device in WHERE]
)


def ints(*values, shape=None):
    return torch.tensor(values, dtype=torch.int32).reshape(shape or (1, len(values)))


@per_backend
@pytest.mark.parametrize("name", SAMPLES)
def test_equals_climbing(name, backend, device, poison):
    args, kwargs = next((s.args, s.kwargs) for s in reference.samples(device) if s.name == name)
    mask, depth = fastops.tree_build(*args, **kwargs, backend=backend)
    assert (mask.dtype, depth.dtype) == (torch.int64, torch.int32)
    assert mask.shape == depth.shape == args[0].shape
    assert mask.is_contiguous()
    assert depth.is_contiguous()
    assert reference.error((mask, depth), *args, **kwargs) == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_tree(data):
    rows = data.draw(st.integers(0, 64))
    tree = [data.draw(st.integers(-1, i - 1)) for i in range(rows)]
    parent = ints(*tree, *tree, shape=(2, rows))
    q_lens = torch.tensor([data.draw(st.integers(0, rows)), rows], dtype=torch.int32)
    assert reference.error(fastops.tree_build(parent, q_lens=q_lens), parent, q_lens=q_lens) == 0


@per_backend
def test_the_64th_node_is_the_sign(backend, device):
    chain = torch.arange(-1, 63, dtype=torch.int32, device=device)[None]
    mask, depth = fastops.tree_build(chain, backend=backend)
    assert int(mask[0, 63]) == -1
    assert int(mask[0, 62]) == 2**63 - 1
    assert depth[0].tolist() == list(range(64))
    star = torch.where(chain == -1, -1, 0).int()
    mask, depth = fastops.tree_build(star, backend=backend)
    assert int(mask[0, 63]) == -(2**63) + 1
    assert depth[0].tolist() == [0] + 63 * [1]


@per_backend
def test_strides(backend, device):
    parent = reference.random_parents(3, 40).to(device)
    q_lens = ints(40, 3, 0, shape=(3,)).to(device)
    want = fastops.tree_build(parent, q_lens=q_lens, backend=backend)
    for moved in (non_contiguous(parent), parent.T.contiguous().T):
        got = fastops.tree_build(moved, q_lens=non_contiguous(q_lens), backend=backend)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


BAD = {
    "parent dtype": (dict(parent=torch.zeros(1, 3).long()), "parent must be int32, got int64"),
    "parent dims": (dict(parent=ints(-1, shape=(1,))), "parent must be [B, T] with T at most 64, got [1]"),
    "too many nodes": (
        dict(parent=torch.full((2, 65), -1, dtype=torch.int32)), "parent must be [B, T] with T at most 64, got [2, 65]",
    ),
    "q_lens dtype": (dict(q_lens=torch.ones(1)), "q_lens must be int32, got float32"),
    "q_lens shape": (dict(q_lens=ints(1, 2, shape=(2,))), "q_lens must be [B] = [1], got [2]"),
    "q_lens device": (
        dict(q_lens=torch.zeros(1, dtype=torch.int32, device="meta")), "q_lens must be on cpu like parent, got meta",
    ),
}  # fmt: skip
BAD_VALUES = {
    "itself": (dict(parent=ints(-1, 1, 0)), "parent[0, 1] must be from -1 to 0, got 1"),
    "a later one": (dict(parent=ints(-1, 0, 7)), "parent[0, 2] must be from -1 to 1, got 7"),
    "the root": (dict(parent=ints(0, 0, 1)), "parent[0, 0] must be from -1 to -1, got 0"),
    "below -1": (dict(parent=ints(-1, -2, 0)), "parent[0, 1] must be from -1 to 0, got -2"),
    "q_lens beyond": (dict(q_lens=ints(4, shape=(1,))), "q_lens must be from 0 to T = 3, got 4"),
    "q_lens negative": (dict(q_lens=ints(-4, shape=(1,))), "q_lens must be from 0 to T = 3, got -4"),
}


def bad_call(changes, device="cpu"):
    whole = {"parent": ints(-1, 0, 1), **changes}
    return {k: v.to(device) if v.device.type != "meta" else v for k, v in whole.items()}


@per_backend
@pytest.mark.parametrize("name", [*BAD, *BAD_VALUES])
def test_rejects(name, backend, device):
    changes, message = {**BAD, **BAD_VALUES}[name]
    context = fastops.debug_checks() if name in BAD_VALUES else torch.no_grad()
    with context, pytest.raises(RuntimeError) as raised:
        fastops.tree_build(**bad_call(changes, device), backend=backend)
    where = "on cuda:0" if device.type == "cuda" else "on cpu"
    assert str(raised.value) == "fastops::tree_build: " + message.replace("on cpu", where)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["torch.ops", "fake", "explain"])
def test_rejects_without_a_named_backend(name, path):
    changes, message = BAD[name]
    arguments, context, call = bad_call(changes), torch.no_grad(), torch.ops.fastops.tree_build
    if path == "fake":
        context = FakeTensorMode()
        arguments = {k: context.from_tensor(v) for k, v in arguments.items()}
    elif path == "explain":
        call = functools.partial(fastops.explain, "tree_build")
    with context, pytest.raises(RuntimeError) as raised:
        call(**arguments)
    assert str(raised.value) == f"fastops::tree_build: {message}"


@per_backend
def test_nodes_beyond_q_lens_may_be_anything(backend, device):
    parent = ints(-1, 0, 99, 99).to(device)
    mask, depth = fastops.tree_build(parent, q_lens=ints(2, shape=(1,)).to(device), backend=backend)
    assert mask.tolist() == [[1, 3, 0, 0]]
    assert depth.tolist() == [[0, 1, 0, 0]]


@pytest.mark.gpu
def test_a_bad_parent_is_a_root_on_a_gpu():
    for backend, device in available("tree_build"):
        if device.type == "cuda":
            mask, depth = fastops.tree_build(ints(-1, 0, 7, 2, -5).to(device), backend=backend)
            assert mask.tolist() == [[1, 3, 4, 12, 16]]
            assert depth.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["ragged", "random_2x0", "random_0x8"])
def test_opcheck(name, device):
    args, kwargs = next((s.args, s.kwargs) for s in reference.samples(torch.device(device)) if s.name == name)
    torch.library.opcheck(torch.ops.fastops.tree_build.default, args, kwargs)


@per_backend
def test_sizes_do_not_recompile(backend, device):
    compiler = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=compiler)
    def f(parent):
        mask, depth = fastops.tree_build(parent)
        return mask + 1, depth + 1

    with fastops.use_backend("tree_build", backend):
        for shape in ((3, 64), (2, 17), (5, 33)):
            parent = reference.random_parents(*shape).to(device)
            mask, depth = f(parent)
            assert reference.error((mask - 1, depth - 1), parent) == 0
    assert compiler.frame_count == 1


def test_error_sees_one_wrong_bit():
    parent = reference.random_parents(2, 64)
    mask, depth = fastops.tree_build(parent)
    assert reference.error((mask, depth), parent) == 0
    flipped = mask.clone()
    flipped[1, 63] ^= 1 << 5
    assert reference.error((flipped, depth), parent) > 0
    assert reference.error((mask, depth + 1), parent) > 0


def test_cost():
    assert reference.cost(reference.random_parents(3, 64)).bytes == 3 * 64 * (4 + 8 + 4)


@pytest.mark.gpu
def test_captures_in_a_cuda_graph():
    parent = reference.random_parents(3, 64).cuda()
    other = reference.random_parents(3, 64, seed=1).cuda()
    fastops.tree_build(parent, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastops.tree_build(parent, backend="triton")
    parent.copy_(other)
    graph.replay()
    assert reference.error(out, other) == 0
