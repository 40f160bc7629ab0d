"""accelerate_bitsandbytes: bitsandbytes' layers on our product, in place, with all that stands on top of them."""

import copy
import sys

import pytest
import torch
from torch import nn

from fastops.methods import Nf4Linear, _accelerate, accelerate_bitsandbytes, restore_bitsandbytes
from fastops.methods._bitsandbytes import is_cpu_layout

bnb = pytest.importorskip("bitsandbytes")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [(kind, double_quant) for kind in ("nf4", "fp4") for double_quant in (False, True)]


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the products that accelerated layers have made."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].dtype)
        return product(*args, **kwargs)

    product = _accelerate.product
    monkeypatch.setattr(_accelerate, "product", counted)
    return calls


def close(got, want, relative):
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= relative * want.abs().max()


def model(linear4bit, **kwargs):
    """One layer under two names, one that is dense, one that is 8-bit."""
    shared = linear4bit(k=64, seed=1, **kwargs)
    return nn.ModuleDict(
        {
            "up": linear4bit(k=64, **kwargs),
            "one": shared,
            "two": shared,
            "norm": nn.LayerNorm(64),
            "int8": bnb.nn.Linear8bitLt(64, 64),
            "lm_head": nn.Linear(64, 9),
        }
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_it_computes_what_bitsandbytes_computes(linear4bit, products, kind, double_quant, compute_dtype, dtype, device):
    layer = linear4bit(kind, double_quant, compute_dtype=compute_dtype, device=device)
    twin = copy.deepcopy(layer)
    before = layer.weight.data.clone()
    assert accelerate_bitsandbytes(layer) is layer
    x = torch.randn(2, 3, 128, device=device, dtype=dtype, requires_grad=True)
    y, want = layer(x), twin(x)
    relative = 1e-5 if torch.bfloat16 not in (dtype, compute_dtype) else 0.02
    close(y, want, relative)
    assert type(y) is torch.Tensor
    got, wanted = (
        torch.autograd.grad(out.float().square().sum(), [x, m.bias]) for out, m in ((y, layer), (want, twin))
    )
    for g, w in zip(got, wanted, strict=True):  # bitsandbytes casts the bias for good, we at every call
        close(g.to(w.dtype), w, 2 * relative)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z = layer(x.detach())
            assert torch.equal(z, y)
            assert type(z) is torch.Tensor
    assert products == [compute_dtype or dtype] * 3
    assert layer.compute_dtype == twin.compute_dtype  # bitsandbytes keeps the dtype of the first x where it has none
    assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_in_another_dtype(linear4bit, storage):
    x = torch.randn(3, 128)
    layer = accelerate_bitsandbytes(linear4bit(quant_storage=storage))
    assert torch.equal(layer(x), accelerate_bitsandbytes(linear4bit())(x))
    assert layer.weight.dtype == storage


def test_it_takes_every_4bit_layer_and_no_other(linear4bit, products):
    net, calls = model(linear4bit), []
    kinds = {name: type(m) for name, m in net.items()}
    assert accelerate_bitsandbytes(net, progress=lambda done, total: calls.append((done, total))) is net
    assert calls == [(1, 2), (2, 2)]
    assert net["one"] is net["two"]
    for name in ("norm", "int8", "lm_head"):
        assert type(net[name]) is kinds[name]
    for name in ("up", "one"):
        assert isinstance(net[name], bnb.nn.Linear4bit)
        assert type(net[name]).__name__ == "Linear4bit"  # PEFT and accelerate go by the name
        assert isinstance(net[name].weight, bnb.nn.Params4bit)
    net["one"](torch.randn(2, 64))
    assert len(products) == 1
    assert "Linear4bit(in_features=64, out_features=64, bias=True)" in repr(net)


def test_twice_is_once_and_restore_undoes_it(linear4bit, products):
    net, x = model(linear4bit), torch.randn(2, 64, requires_grad=True)
    want = net["up"](x)
    once = type(accelerate_bitsandbytes(net)["up"])
    assert type(accelerate_bitsandbytes(net)["up"]) is once
    net["up"](x)
    assert len(products) == 1
    assert restore_bitsandbytes(net) is net
    assert type(net["up"]) is bnb.nn.Linear4bit
    assert torch.equal(net["up"](x), want)
    assert len(products) == 1
    restore_bitsandbytes(net)
    assert type(net["up"]) is bnb.nn.Linear4bit
    assert "forward" not in vars(net["up"])


def test_named_subclasses_and_those_with_a_forward_of_their_own(linear4bit, products):
    class Shifted(bnb.nn.Linear4bit):
        def forward(self, x):
            return super().forward(x) + 1

    named = linear4bit()
    named.__class__ = bnb.nn.LinearNF4
    shifted, replaced = linear4bit(), linear4bit()
    shifted.__class__ = Shifted
    replaced.forward = lambda x: x
    net = accelerate_bitsandbytes(nn.ModuleList([named, shifted, replaced]))
    assert type(named).__name__ == "LinearNF4"
    assert type(shifted) is Shifted
    assert type(replaced) is bnb.nn.Linear4bit
    x = torch.randn(2, 128, requires_grad=True)
    close(shifted(x), named(x) + 1, 1e-5)
    assert replaced(x) is x
    assert len(products) == 1
    assert type(restore_bitsandbytes(net)[0]) is bnb.nn.LinearNF4


def test_not_quantised_yet_is_left_to_bitsandbytes(linear4bit, products):
    layer = accelerate_bitsandbytes(bnb.nn.Linear4bit(64, 32, quant_type="nf4"))
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever bitsandbytes raises
        layer(torch.randn(2, 64))
    assert not products
    weight = layer.weight.data.clone()
    layer.to("cpu")  # quantises
    x = torch.randn(2, 64)
    y = layer(x)
    assert len(products) == 1
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(y, nn.functional.linear(x, bnb.functional.dequantize_4bit(packed, state), layer.bias))


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_the_cpu_layout_becomes_the_plain_one(linear4bit, to_cpu_layout, kind, double_quant):
    plain, layer = linear4bit(kind, double_quant), to_cpu_layout(linear4bit(kind, double_quant).eval())
    x = torch.randn(3, 128)
    ours = Nf4Linear.from_bitsandbytes(layer)
    accelerate_bitsandbytes(layer)
    assert not is_cpu_layout(layer.weight.quant_state)
    assert torch.equal(layer.weight.data, plain.weight.data)
    assert torch.equal(layer(x), ours(x))
    again = copy.deepcopy(layer)  # bitsandbytes reads it too, and can save it
    with torch.no_grad():
        torch.testing.assert_close(restore_bitsandbytes(again).train()(x.requires_grad_()), ours(x))
    state = again.state_dict()
    assert state["weight.absmax"].dtype == torch.float32
    fresh = Nf4Linear(128, 64, code=None if kind == "nf4" else torch.zeros(16))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), ours(x))


def test_a_layer_that_gets_the_cpu_layout_later_is_left_to_bitsandbytes(linear4bit, to_cpu_layout, products):
    layer = to_cpu_layout(accelerate_bitsandbytes(linear4bit().eval()))
    if bnb.functional.has_avx512bf16():
        assert layer(torch.randn(2, 128)).shape == (2, 64)
    assert not products
    accelerate_bitsandbytes(layer)
    layer(torch.randn(2, 128))
    assert len(products) == 1


def test_hooks_copies_and_state_dicts_go_on_working(linear4bit, products):
    layer, seen = linear4bit(double_quant=True), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    before = layer.state_dict()
    accelerate_bitsandbytes(layer)
    x = torch.randn(2, 128)
    y = layer(x)
    assert seen == [(2, 64)]
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin = copy.deepcopy(layer)
    layer.weight.data.zero_()
    assert torch.equal(twin(x), y)
    assert len(products) == 2
    assert layer.to(torch.bfloat16).bias.dtype == torch.bfloat16
    close(twin.to(torch.bfloat16)(x), y, 0.02)


@pytest.mark.parametrize("before", [True, False])
def test_the_hooks_of_accelerate_stay(linear4bit, products, before):
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(len(products))
            return args, kwargs

    layer, x = linear4bit(), torch.randn(2, 128, requires_grad=True)
    want = layer(x)
    if before:
        hooks.add_hook_to_module(layer, Hook())
    accelerate_bitsandbytes(layer)
    if not before:
        hooks.add_hook_to_module(layer, Hook())
    accelerate_bitsandbytes(layer)
    close(layer(x), want, 1e-5)
    assert (seen, len(products)) == ([0], 1)
    restore_bitsandbytes(layer)
    assert torch.equal(layer(x), want)
    assert (seen, len(products)) == ([0, 1], 1)
    accelerate_bitsandbytes(layer)
    hooks.remove_hook_from_module(layer)
    layer(x)
    assert (len(seen), len(products)) == (2, 2)  # the hook is gone, the product stays
    restore_bitsandbytes(layer)
    assert torch.equal(layer(x), want)
    assert len(products) == 2


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_it_compiles_without_a_break(linear4bit, double_quant, train):
    torch._dynamo.reset()
    net = nn.Sequential(linear4bit("nf4", double_quant), nn.GELU(), linear4bit("fp4", double_quant, 64, 32, bias=False))
    accelerate_bitsandbytes(net)
    x = torch.randn(3, 128, requires_grad=train)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), net(x)
    torch.testing.assert_close(got, want)
    if train:
        found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(found, wanted)
    assert torch.equal(compiled(x), got)
    for context in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with context():
            y = torch.compile(net, fullgraph=True, backend="aot_eager")(x.detach())
        assert type(y) is torch.Tensor
        torch.testing.assert_close(y, want.detach())


def test_errors_change_nothing(linear4bit, monkeypatch):
    with pytest.raises(ValueError, match="must hold a bitsandbytes Linear4bit layer, got Sequential with none"):
        accelerate_bitsandbytes(nn.Sequential(nn.Linear(3, 3), bnb.nn.Linear8bitLt(32, 32)))
    net = nn.Sequential(linear4bit(), linear4bit())
    net[1].weight.quant_state.quant_type = "int4"
    with pytest.raises(ValueError, match="1 must have the quant_type nf4 or fp4, got 'int4'"):
        accelerate_bitsandbytes(net)
    net[1].weight.quant_state.quant_type = "nf4"
    net[1].weight.quant_state.blocksize = 16
    with pytest.raises(RuntimeError, match="1's blocksize must be a power of two from 32 to 4096, got 16"):
        accelerate_bitsandbytes(net)
    assert all(type(layer) is bnb.nn.Linear4bit for layer in net)
    layer = accelerate_bitsandbytes(linear4bit())
    with pytest.raises(RuntimeError, match=r"x must have 128 features in its last dimension, got \[2, 64\]"):
        layer(torch.randn(2, 64))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes is missing: pip install bitsandbytes"):
        accelerate_bitsandbytes(net)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes is missing"):
        Nf4Linear.from_bitsandbytes(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
def test_it_follows_the_layer_between_devices(linear4bit, products, double_quant):
    layer = accelerate_bitsandbytes(linear4bit("nf4", double_quant))
    x = torch.randn(3, 128)
    want = layer(x)
    for device in ("cuda", "cpu", "cuda"):
        close(layer.to(device)(x.to(device)).cpu(), want, 1e-4)
    assert len(products) == 4


@pytest.mark.gpu
def test_it_is_captured_in_a_cuda_graph(linear4bit):
    layer = accelerate_bitsandbytes(linear4bit("nf4", True, 4096, 4096, device="cuda", compute_dtype=torch.bfloat16))
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


def test_peft_trains_on_top(linear4bit, products):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(linear4bit(), nn.GELU(), linear4bit(k=64))
    base.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    net = peft.get_peft_model(base, config)
    x = torch.randn(5, 128)

    def grads():
        net.zero_grad()
        net(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}

    want = grads()
    assert accelerate_bitsandbytes(net) is net
    got = grads()
    assert len(products) == 2
    assert set(got) == set(want)
    assert all("lora_" in name for name in got)
    for name in want:
        close(got[name], want[name], 1e-4)
    with net.disable_adapter():
        y = net(x)
    merged = net.merge_and_unload()  # PEFT puts new Params4bit into the layers
    assert isinstance(merged[0], bnb.nn.Linear4bit)
    assert (merged(x) - y).abs().max() > 0
    assert len(products) == 6
