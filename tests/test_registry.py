"""The machinery, on an op made for the purpose: it writes in place and reads an index, which no NF4 op does."""

import pytest
import torch

import fastops
from fastops import _ops, _registry
from fastops._checks import check_dtype, fail
from fastops.testing import available


def _check(x, index):
    check_dtype("toy_add_at", "x", x, torch.float32)
    check_dtype("toy_add_at", "index", index, torch.int32)


def _check_values(x, index):
    if ((index < 0) | (index >= x.numel())).any():
        fail("toy_add_at", f"index must lie in [0, {x.numel()}), got {index.tolist()}")


def _reference(x, index):
    x.index_add_(0, index.long(), torch.ones(index.numel()))


@pytest.fixture(scope="module")
def toy():
    if "toy_add_at" not in _registry.registry:
        _registry.Op(
            "toy_add_at(Tensor(a!) x, Tensor index) -> ()",
            check=_check,
            fake=lambda x, index: None,
            reference=_reference,
            check_values=_check_values,
        )
    yield _registry.registry["toy_add_at"]
    del _registry.registry["toy_add_at"]


def inputs():
    n = 64
    packed, absmax = fastops.nf4_quantize(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    return packed, absmax, [n], torch.float32


def test_an_op_mutates_in_place_and_passes_opcheck(toy):
    x = torch.zeros(4)
    toy(None, x, torch.tensor([1, 1, 3], dtype=torch.int32))
    assert x.tolist() == [0, 2, 0, 1]
    torch.library.opcheck(toy.default, (torch.zeros(4), torch.tensor([1, 3], dtype=torch.int32)))


def test_values_are_checked_on_the_cpu_before_anything_is_written(toy):
    x = torch.zeros(4)
    for call in (toy.default, lambda *a: toy("reference", *a)):
        with pytest.raises(RuntimeError, match=r"toy_add_at: index must lie in \[0, 4\), got \[1, 4\]"):
            call(x, torch.tensor([1, 4], dtype=torch.int32))
    assert x.tolist() == [0, 0, 0, 0]


def test_debug_checks_reach_torch_ops_and_named_backends(toy, monkeypatch):
    """As on a GPU: the op's own value check, which runs on the CPU, is told that the tensors are elsewhere."""
    monkeypatch.setattr(toy, "_device", lambda args, kwargs: torch.device("cuda"))
    seen = []
    monkeypatch.setattr(toy, "_check_values", lambda x, index: seen.append(index.tolist()))
    arguments = (torch.zeros(4), torch.tensor([2], dtype=torch.int32))
    torch.ops.fastops.toy_add_at(*arguments)
    assert seen == []
    with fastops.debug_checks():
        torch.ops.fastops.toy_add_at(*arguments)
        assert seen == [[2]]
        toy("reference", *arguments)
    assert seen == [[2], [2]]
    assert arguments[0].tolist() == [0, 0, 3, 0]


def test_unknown_backend_is_named():
    with pytest.raises(RuntimeError, match="backend must be one of cuda, triton, cpu, reference or None, got 'tpu'"):
        fastops.nf4_dequant(*inputs(), backend="tpu")


def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: .*; available here: .*reference"):
        fastops.nf4_dequant(*inputs(), backend="cuda")


def test_use_backend_changes_torch_ops_and_comes_back():
    args = inputs()
    want = torch.ops.fastops.nf4_dequant(*args)
    before = fastops.explain("nf4_dequant", *args).backend
    with fastops.use_backend("nf4_dequant", "reference"):
        explained = fastops.explain(fastops.nf4_dequant, *args)
        assert (explained.backend, explained.reason) == ("reference", "set by use_backend")
        assert torch.equal(torch.ops.fastops.nf4_dequant(*args), want)
        if before == "cpu":
            assert torch.equal(fastops.nf4_dequant(*args, backend="cpu"), want)
        with fastops.use_backend("nf4_dequant", None):
            assert fastops.explain("nf4_dequant", *args).backend == before
        assert fastops.explain("nf4_dequant", *args).backend == "reference"
    assert fastops.explain("nf4_dequant", *args).backend == before


def test_use_backend_really_runs_the_other_kernel(monkeypatch):
    """torch.ops must reach the Python kernel under the override, and must not after it."""
    op = _registry.registry["nf4_dequant"]
    calls = []
    monkeypatch.setattr(op, "_reference", lambda packed, *a, **k: calls.append(1) or packed.new_zeros(3))
    override = fastops.use_backend("nf4_dequant", "reference")
    for entered in (1, 2):  # the same object may be entered again
        with override:
            assert torch.ops.fastops.nf4_dequant(*inputs()).tolist() == [0, 0, 0]
        assert len(calls) == entered
        if "CPU" in op._compiled:
            assert torch.ops.fastops.nf4_dequant(*inputs()).numel() == 64
            assert len(calls) == entered


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize(
    ("backend", "device"), available("nf4_dequant"), ids=[f"{b}-{d.type}" for b, d in available("nf4_dequant")]
)
def test_named_backends_compile(backend, device, overridden):
    packed, absmax, shape, dtype = (v.to(device) if isinstance(v, torch.Tensor) else v for v in inputs())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(packed, absmax):
        return fastops.nf4_dequant(packed, absmax, shape, dtype, backend=backend) * 2

    want = fastops.nf4_dequant(packed, absmax, shape, dtype) * 2
    with fastops.use_backend("nf4_dequant", "reference" if overridden else None):
        assert torch.equal(f(packed, absmax), want)


@pytest.mark.parametrize(
    ("backend", "device"), available("nf4_quantize"), ids=[f"{b}-{d.type}" for b, d in available("nf4_quantize")]
)
def test_results_are_constants_of_the_autograd_graph(backend, device):
    w = torch.randn(128, device=device, requires_grad=True)
    for named in (backend, None):
        assert not fastops.nf4_quantize(w, backend=named)[1].requires_grad


def test_use_backend_for_good():
    fastops.use_backend("nf4_quantize", "reference")
    try:
        assert fastops.explain("nf4_quantize", torch.zeros(64)).backend == "reference"
    finally:
        fastops.use_backend("nf4_quantize", None)
    assert fastops.explain("nf4_quantize", torch.zeros(64)).reason != "set by use_backend"


@pytest.mark.parametrize("call", [fastops.use_backend, fastops.explain])
def test_unknown_op_is_named(call):
    with pytest.raises(RuntimeError, match=r"op must be one of .*nf4_dequant.*, got 'nf4_dequnt'"):
        call("nf4_dequnt", "reference")


def test_use_backend_refuses_what_cannot_run():
    op = _registry.registry["nf4_dequant"]
    if not op.unavailable("cuda", torch.device("cuda")):
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        fastops.use_backend("nf4_dequant", "cuda")


def test_explain_refuses_what_the_call_refuses():
    packed, absmax, shape, dtype = inputs()
    with pytest.raises(RuntimeError, match="packed must be uint8, got float32"):
        fastops.explain("nf4_dequant", absmax, absmax, shape, dtype)
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        fastops.explain("nf4_dequant", packed, absmax, shape, dtype, backend="cuda")
    assert fastops.explain("nf4_dequant", packed, absmax, shape, dtype, backend="reference").reason == "named"
    assert fastops.explain("nf4_quantize", torch.zeros(64, device="meta")).backend == "fake"


def test_explain_says_what_and_why():
    text = str(fastops.explain("nf4_dequant", *inputs()))
    assert text.startswith("fastops::nf4_dequant on cpu: backend ")
    assert "cuda is not available: it needs cuda tensors, got cpu" in text


def test_every_schema_is_what_the_dispatcher_has():
    for name, op in _registry.registry.items():
        assert str(op.default._schema).startswith(f"{_ops.NAMESPACE}::{name}(")
        assert "mode" not in [a.name for a in op.default._schema.arguments]
