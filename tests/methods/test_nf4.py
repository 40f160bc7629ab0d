import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import fastops
from fastops.methods import Nf4Linear, quantize_model
from fastops.reference import nf4_gemv as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def linear(in_features=96, out_features=40, bias=True, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias, **kwargs)


def model():
    """Names, nesting and sharing as real models have them; "tail" holds one layer under two names."""
    torch.manual_seed(0)
    shared = nn.Linear(64, 64, bias=False)
    body = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})
    tail = nn.ModuleDict({"first": shared, "second": shared})
    return nn.ModuleDict(
        {"body": body, "norm": nn.LayerNorm(64), "tail": tail, "lm_head": nn.Linear(64, 50, bias=False)}
    )


def dense_copy(layer, dtype):
    """The dense layer whose weight is the dequantised one, from the reference."""
    args, kwargs = layer.dequant_arguments(dtype)
    weight = fastops.nf4_dequant(*args, **kwargs, backend="reference")
    return weight, None if layer.bias is None else layer.bias.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "bias", "blocksize", "double_quant"),
    [((96, 40), True, 64, False), ((96, 40), False, 64, True), ((33, 7), True, 32, True), ((5, 3), True, 4096, False)],
)
def test_forward_is_the_dense_layer_of_the_dequantised_weights(device, dtype, shape, bias, blocksize, double_quant):
    layer = Nf4Linear.from_linear(linear(*shape, bias=bias).to(device), blocksize, double_quant)
    x = torch.randn(2, 3, shape[0]).to(device, dtype)
    y = layer(x)
    assert y.dtype == dtype
    args, kwargs = layer.linear_arguments(x)
    assert reference.error(y.detach(), *args, **kwargs) <= reference.BUDGET
    assert torch.equal(y, fastops.nf4_linear(*args, **kwargs))


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_weight_is_near_the_dense_one(double_quant):
    dense = linear(256, 128)
    layer = Nf4Linear.from_linear(dense, double_quant=double_quant)
    got = layer.dequantize(torch.float32)
    # The widest gap between NF4's codes is 0.304 of a block's absmax; half of it is the largest rounding error.
    widest = dense.weight.detach().reshape(-1, 64).abs().amax(dim=1, keepdim=True) * (0.304 / 2 + 0.02 * double_quant)
    assert ((got - dense.weight).reshape(-1, 64).abs() <= widest).all()


def test_gradient_flows_to_the_input_and_the_bias_but_not_to_the_weight():
    layer = Nf4Linear.from_linear(linear())
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    weight, bias = dense_copy(layer, torch.float32)
    y = F.linear(x.detach(), weight, bias.detach())
    torch.testing.assert_close(x.grad, 2 * y @ weight)
    torch.testing.assert_close(layer.bias.grad, 2 * y.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_no_grad_and_grad_agree_and_nothing_is_kept_without_one(double_quant, bias_dtype):
    layer = Nf4Linear.from_linear(linear(), double_quant=double_quant)
    layer.bias.data = layer.bias.data.to(bias_dtype)
    x = torch.randn(4, 96)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None
    assert torch.equal(layer(x), y)
    layer.bias.requires_grad_(False)
    assert layer(x).grad_fn is None
    x.requires_grad_()
    layer(x).sum().backward()
    dense, _ = dense_copy(layer, torch.float32)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(4, -1))


def test_a_bias_of_another_dtype_trains_in_its_own():
    layer = Nf4Linear.from_linear(linear())
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    layer(torch.randn(4, 96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 4.0, dtype=torch.bfloat16))


def test_autocast_computes_as_for_a_dense_layer():
    layer, x = Nf4Linear.from_linear(linear()), torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_compute_dtype_is_the_products_and_x_keeps_its_own():
    layer, x = Nf4Linear.from_linear(linear()), torch.randn(4, 96, requires_grad=True)
    want = layer(x.bfloat16()).float()
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), want)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x), want)
    layer(x).sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_code_of_ones_own(double_quant):
    code = torch.linspace(-1, 1, 16)
    layer = Nf4Linear.from_linear(linear(), double_quant=double_quant, code=code)
    code.zero_()  # it was copied
    w = layer.dequantize(torch.float32)
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), F.linear(x, w, layer.bias))
    steps = (w.reshape(-1, 64) / w.reshape(-1, 64).abs().amax(1, keepdim=True) + 1) * 7.5
    assert double_quant or (steps - steps.round()).abs().max() < 1e-5
    fresh = Nf4Linear(96, 40, double_quant=double_quant, code=torch.zeros(16))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert "code=[16]" in repr(layer)
    assert layer.half().code.dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"Unexpected key.*code"):
        Nf4Linear(96, 40, double_quant=double_quant).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(double_quant, assign):
    layer = Nf4Linear.from_linear(linear(), double_quant=double_quant)
    fresh = Nf4Linear(96, 40, double_quant=double_quant)
    x = torch.randn(3, 96)
    assert torch.equal(fresh(x), torch.zeros(3, 40))
    fresh.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_safetensors_round_trip(double_quant, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net = quantize_model(model(), double_quant=double_quant)
    safetensors.save_model(net, str(tmp_path / "net.safetensors"))
    again = quantize_model(model(), double_quant=double_quant)
    for buffer in again.buffers():
        buffer.zero_()
    safetensors.load_model(again, str(tmp_path / "net.safetensors"))
    assert again["tail"]["first"] is again["tail"]["second"]
    for (name, got), (_, want) in zip(again.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(got, want), name


def test_dense_again():
    layer = Nf4Linear.from_linear(linear(dtype=torch.bfloat16).eval())
    dense = layer.to_linear()
    assert dense.weight.dtype == torch.bfloat16
    assert torch.equal(dense.weight, layer.dequantize(torch.bfloat16))
    assert dense.bias is layer.bias
    assert not dense.training
    assert layer.to_linear(torch.float32).weight.dtype == torch.float32
    assert Nf4Linear(96, 40, bias=False).to_linear().bias is None


def test_state_dict_of_another_kind_is_refused():
    plain, double = Nf4Linear(96, 40), Nf4Linear(96, 40, double_quant=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*absmax_code"):
        plain.load_state_dict(double.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*absmax_code"):
        double.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        plain.load_state_dict(Nf4Linear(96, 40, blocksize=128).state_dict())


def test_loading_one_layer_leaves_the_others_alone():
    """nf4_quantize hands the same code table to everyone; a layer must not share it."""
    one, other = (Nf4Linear.from_linear(linear(seed=s), double_quant=True) for s in (0, 1))
    before = other.dequantize(torch.float32)
    state = one.state_dict() | {"absmax_code": torch.zeros(256)}
    one.load_state_dict(state)
    assert torch.equal(other.dequantize(torch.float32), before)
    assert torch.equal(Nf4Linear.from_linear(linear(seed=1), double_quant=True).dequantize(torch.float32), before)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@pytest.mark.parametrize("double_quant", [False, True])
def test_casting_a_model_rounds_no_scale(move, double_quant):
    layer = Nf4Linear.from_linear(linear(), double_quant=double_quant)
    before = layer.dequantize(torch.float32)
    buffers = {name: b.dtype for name, b in layer.named_buffers()}
    move(layer)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert {name: b.dtype for name, b in layer.named_buffers()} == buffers
    assert layer.bias.dtype != torch.float32


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_separate(again):
    layer = Nf4Linear.from_linear(linear(), double_quant=True)
    twin, x = again(layer), torch.randn(2, 96)
    want = layer(x)
    layer.packed.zero_()
    assert torch.equal(twin(x), want)


def test_memory_and_repr():
    layer = Nf4Linear.from_linear(linear(256, 128))
    assert layer.memory_bytes() == 256 * 128 // 2 + 4 * (256 * 128 // 64) + 4 * 128
    double = Nf4Linear.from_linear(linear(256, 128, bias=False), double_quant=True)
    assert double.memory_bytes() == 256 * 128 // 2 + 512 + 4 * 2 + 4 * 256 + 4
    assert repr(double) == ("Nf4Linear(in_features=256, out_features=128, bias=False, blocksize=64, double_quant=True)")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_model_compiles_without_a_break(train, autocast):
    torch._dynamo.reset()
    net = quantize_model(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)), double_quant=True)
    net.requires_grad_(train)
    x = torch.randn(3, 64, requires_grad=train)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = compiled(x), net(x)
    torch.testing.assert_close(got, want)
    assert got.dtype == (torch.bfloat16 if autocast else torch.float32)
    if train:
        found, wanted = (torch.autograd.grad(y.float().square().sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(found, wanted)


def test_another_batch_size_compiles_at_most_once_more():
    torch._dynamo.reset()
    net = quantize_model(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (2, 3, 4, 7):
            assert torch.equal(compiled(torch.ones(rows, 64)), net(torch.ones(rows, 64)))
    assert counter.frame_count <= 2


def test_mode_device_and_bias_are_the_dense_layers():
    dense = linear().eval()
    layer = Nf4Linear.from_linear(dense)
    assert layer.bias is dense.bias
    assert not layer.training
    assert {b.device.type for b in layer.buffers()} == {"cpu"}


def test_quantize_model_replaces_every_linear_but_the_skipped():
    net, calls = model(), []
    head = net["lm_head"]
    assert quantize_model(net, progress=lambda done, total: calls.append((done, total))) is net
    kinds = {name: type(m).__name__ for name, m in net.named_modules(remove_duplicate=False) if not list(m.children())}
    assert kinds == {
        "body.up": "Nf4Linear", "body.down": "Nf4Linear", "norm": "LayerNorm",
        "tail.first": "Nf4Linear", "tail.second": "Nf4Linear", "lm_head": "Linear",
    }  # fmt: skip
    assert net["lm_head"] is head
    assert net["tail"]["first"] is net["tail"]["second"]
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        ((), set()),
        (("lm_head", "body"), {"lm_head", "body.up", "body.down"}),
        (["body.up"], {"body.up"}),
        ({"down", "up"}, {"body.up", "body.down"}),
        (("ail", "tail.fir"), set()),
    ],
)
def test_skip_takes_full_names_and_components(skip, dense):
    net = quantize_model(model(), skip=skip)
    assert {name for name, m in net.named_modules() if isinstance(m, nn.Linear)} == dense


def test_subclasses_of_linear_stay():
    attention = nn.MultiheadAttention(32, 4)
    net = quantize_model(nn.ModuleDict({"attention": attention, "proj": nn.Linear(32, 32)}))
    assert isinstance(net["attention"].out_proj, nn.Linear)
    x = torch.randn(5, 2, 32)
    assert net["attention"](x, x, x)[0].shape == x.shape


def test_a_quantised_model_computes_as_its_dense_copy():
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    quantize_model(net, blocksize=32, double_quant=True)
    dense = copy.deepcopy(net)
    for i in (0, 2):
        dense[i] = net[i].to_linear()
    x = torch.randn(7, 64)
    torch.testing.assert_close(net(x), dense(x))


def test_errors_of_a_layer():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv1d"):
        Nf4Linear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match="must hold values, got one on the meta device"):
        Nf4Linear.from_linear(linear(device="meta"))
    with pytest.raises(RuntimeError, match="blocksize must be a power of two from 32 to 4096, got 48"):
        Nf4Linear.from_linear(linear(), blocksize=48)
    with pytest.raises(RuntimeError, match="blocksize must be a power of two from 32 to 4096, got 0"):
        Nf4Linear(96, 40, blocksize=0)
    with pytest.raises(RuntimeError, match="w must be float32, float16 or bfloat16, got float64"):
        Nf4Linear.from_linear(linear(dtype=torch.float64))
    layer = Nf4Linear.from_linear(linear())
    with pytest.raises(RuntimeError, match=r"x must have 96 features in its last dimension, got \[2, 95\]"):
        layer(torch.randn(2, 95))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        layer(torch.randn(2, 96, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="compute_dtype must be float32, float16 or bfloat16, got float64"):
        Nf4Linear(96, 40, compute_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="absmax_blocksize must be a power of two from 32 to 4096, got 3"):
        Nf4Linear(96, 40, absmax_blocksize=3)
    with pytest.raises(RuntimeError, match="code must have 16 elements, got 15"):
        Nf4Linear.from_linear(linear(), code=torch.zeros(15))
    with pytest.raises(RuntimeError, match="code must be float32, got float16"):
        Nf4Linear(96, 40, code=torch.zeros(16, dtype=torch.float16))


def test_errors_of_a_model_change_nothing():
    with pytest.raises(TypeError, match=r"use Nf4Linear\.from_linear"):
        quantize_model(linear())
    with pytest.raises(TypeError, match="skip must be a collection of names, got the string 'lm_head'"):
        quantize_model(model(), skip="lm_head")
    with pytest.raises(ValueError, match=r"must have an nn\.Linear outside of skip=\('a',\), got none"):
        quantize_model(nn.ModuleDict({"a": linear()}), skip=("a",))
    with pytest.raises(RuntimeError, match="blocksize must be a power of two from 32 to 4096, got 65"):
        quantize_model(model(), blocksize=65)
    net = nn.Sequential(linear(), linear(40, 40, device="meta"))
    with pytest.raises(ValueError, match="1 must hold values, got a weight on the meta device"):
        quantize_model(net)
    assert all(type(m) is nn.Linear for m in net)
    net = nn.Sequential(linear(dtype=torch.float64), linear(40, 40))
    with pytest.raises(RuntimeError, match=r"0\.weight must be float32, float16 or bfloat16, got float64"):
        quantize_model(net)
    assert all(type(m) is nn.Linear for m in net)
    quantised = quantize_model(nn.Sequential(linear()))
    with pytest.raises(ValueError, match="got none"):
        quantize_model(quantised)
