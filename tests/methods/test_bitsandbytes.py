"""Nf4Linear to and from bitsandbytes: its layers in memory, its checkpoints, its CPU layout."""

import copy
import json

import pytest
import torch
from torch import nn

from fastops.methods import Nf4Linear, bitsandbytes_state_dict, quantize_model
from fastops.methods._bitsandbytes import FP4_CODE, is_cpu_layout
from fastops.reference import nf4_gemv as reference

bnb = pytest.importorskip("bitsandbytes")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [(kind, double_quant) for kind in ("nf4", "fp4") for double_quant in (False, True)]


def close(got, want, relative):
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= relative * want.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("k", "n", "blocksize"), [(128, 64, 64), (96, 7, 32), (100, 33, 64), (256, 16, 256), (4096, 3, 4096), (33, 5, 64)]
)
@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_a_layer_is_taken_over_as_it_is(linear4bit, kind, double_quant, k, n, blocksize, device):
    theirs = linear4bit(kind, double_quant, k, n, blocksize=blocksize, device=device)
    ours = Nf4Linear.from_bitsandbytes(theirs)
    assert (ours.in_features, ours.out_features, ours.blocksize, ours.double_quant) == (k, n, blocksize, double_quant)
    assert ours.packed.data_ptr() == theirs.weight.data_ptr()
    assert type(ours.packed) is torch.Tensor
    assert ours.absmax is theirs.weight.quant_state.absmax
    assert ours.bias is theirs.bias
    assert ours.training
    assert (ours.code is None) == (kind == "nf4")
    state = theirs.weight.quant_state
    assert torch.equal(ours.dequantize(torch.float32), bnb.functional.dequantize_4bit(theirs.weight.data, state))
    for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        theirs.compute_dtype = ours.compute_dtype = None
        theirs.compute_type_is_set = False
        x = torch.randn(2, 3, k, device=device, dtype=dtype, requires_grad=True)
        y = ours(x)
        args, kwargs = ours.linear_arguments(x.detach())
        assert reference.error(y.detach(), *args, **kwargs) <= reference.BUDGET
        if device == "cuda" and k % blocksize:  # where bitsandbytes' product on the GPU gives up
            continue
        want = theirs(x)
        close(y, want, relative)
        g, h = (torch.autograd.grad(out.float().square().sum(), x)[0] for out in (y, want))
        close(g, h, 2 * relative)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_in_another_dtype(linear4bit, storage):
    theirs = linear4bit(quant_storage=storage)
    ours = Nf4Linear.from_bitsandbytes(theirs)
    assert ours.packed.dtype == torch.uint8
    assert ours.packed.data_ptr() == theirs.weight.data_ptr()
    assert torch.equal(ours.packed, linear4bit().weight.data.flatten())


def test_a_bare_weight(linear4bit):
    theirs = linear4bit("fp4", True)
    ours = Nf4Linear.from_bitsandbytes(theirs.weight)
    assert ours.bias is None
    assert (ours.in_features, ours.out_features) == (128, 64)
    want = Nf4Linear.from_bitsandbytes(theirs).dequantize(torch.float32)
    assert torch.equal(ours.dequantize(torch.float32), want)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_compute_dtype_is_taken_over(linear4bit, compute_dtype):
    theirs = linear4bit(compute_dtype=compute_dtype)
    ours = Nf4Linear.from_bitsandbytes(theirs)
    assert ours.compute_dtype == compute_dtype
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 128, dtype=dtype)
        rounds = torch.bfloat16 in (dtype, compute_dtype)
        if compute_dtype is not None:  # bitsandbytes keeps the dtype of the first x otherwise
            close(ours(x), theirs(x.clone().requires_grad_()).detach(), 0.02 if rounds else 1e-5)


def test_the_fp4_table_is_theirs():
    assert torch.tensor(FP4_CODE).tolist() == bnb.functional.get_4bit_type("fp4", device="cpu").tolist()


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
@pytest.mark.parametrize("shape", [(128, 64), (192, 96)])
def test_the_cpu_layout_is_unpacked_without_touching_theirs(linear4bit, to_cpu_layout, kind, double_quant, shape):
    plain = Nf4Linear.from_bitsandbytes(linear4bit(kind, double_quant, *shape))
    theirs = to_cpu_layout(linear4bit(kind, double_quant, *shape))
    before = theirs.weight.data.clone()
    ours = Nf4Linear.from_bitsandbytes(theirs)
    assert torch.equal(ours.packed, plain.packed)
    assert torch.equal(theirs.weight.data, before)
    assert is_cpu_layout(theirs.weight.quant_state)
    absmax = plain.absmax
    if double_quant:
        absmax = plain.absmax_code[absmax.long()] * plain.absmax_scale.repeat_interleave(256)[: absmax.numel()]
        absmax += plain.absmax_offset
    assert not ours.double_quant
    assert torch.equal(ours.absmax, absmax.bfloat16().float())  # what bitsandbytes kept of the scales


def test_what_cannot_be_taken_over(linear4bit, to_cpu_layout):
    with pytest.raises(TypeError, match=r"layer must be a Linear4bit or a Params4bit, got Linear\b"):
        Nf4Linear.from_bitsandbytes(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got Linear8bitLt"):
        Nf4Linear.from_bitsandbytes(bnb.nn.Linear8bitLt(32, 32))
    with pytest.raises(ValueError, match="layer must be quantised, which bitsandbytes does when it is moved"):
        Nf4Linear.from_bitsandbytes(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match="layer must be quantised"):
        Nf4Linear.from_bitsandbytes(bnb.nn.Linear4bit(64, 64, device="meta"))
    odd = linear4bit()
    odd.weight.quant_state.quant_type = "int4"
    with pytest.raises(ValueError, match="layer must have the quant_type nf4 or fp4, got 'int4'"):
        Nf4Linear.from_bitsandbytes(odd)
    odd = linear4bit()
    odd.weight.quant_state.blocksize = 48
    with pytest.raises(RuntimeError, match="layer's blocksize must be a power of two from 32 to 4096, got 48"):
        Nf4Linear.from_bitsandbytes(odd)
    odd = linear4bit()
    odd.in_features, odd.out_features = 64, 128
    with pytest.raises(ValueError, match=r"layer's weight must be \[128, 64\] as the layer is, got \[64, 128\]"):
        Nf4Linear.from_bitsandbytes(odd)
    broken = to_cpu_layout(linear4bit())
    broken.state_dict()  # bitsandbytes 0.50.2 leaves the scales in bf16 and transposed, and forgets that they are
    with pytest.raises(ValueError, match="layer's absmax must be float32, got bfloat16"):
        Nf4Linear.from_bitsandbytes(broken)


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_back_to_bitsandbytes(linear4bit, kind, double_quant):
    theirs = linear4bit(kind, double_quant, compute_dtype=torch.bfloat16).eval()
    again = Nf4Linear.from_bitsandbytes(theirs).to_bitsandbytes()
    assert type(again) is bnb.nn.Linear4bit
    assert again.weight.data_ptr() == theirs.weight.data_ptr()
    assert again.weight.quant_state == theirs.weight.quant_state
    assert again.bias is theirs.bias
    assert again.compute_dtype == torch.bfloat16
    assert not again.training
    x = torch.randn(3, 128, requires_grad=True)
    assert torch.equal(again(x), theirs(x))


def test_quantised_here_computed_there():
    torch.manual_seed(0)
    ours = Nf4Linear.from_linear(nn.Linear(128, 64), double_quant=True)
    theirs = ours.to_bitsandbytes()
    x = torch.randn(3, 128, requires_grad=True)
    close(ours(x), theirs(x), 1e-5)
    with pytest.raises(ValueError, match="code must be None"):
        Nf4Linear.from_linear(nn.Linear(64, 64), code=torch.linspace(-1, 1, 16)).to_bitsandbytes()


def facts(state, prefix):
    """The tensors of a layer's entries, and the JSON among them."""
    entries = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    blob = next(name for name in entries if "quant_state" in name)
    return entries, blob, json.loads(bytes(entries.pop(blob).tolist()))


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_our_entries_are_theirs(linear4bit, kind, double_quant):
    theirs = nn.Sequential(nn.LayerNorm(128), linear4bit(kind, double_quant))
    ours = nn.Sequential(theirs[0], Nf4Linear.from_bitsandbytes(theirs[1]))
    written, read = bitsandbytes_state_dict(ours), theirs.state_dict()
    assert list(written) == [*list(read)[:2], "1.bias", *[n for n in written if n.startswith("1.weight")]]
    (got, blob, about), (want, wanted_blob, wanted_about) = facts(written, "1."), facts(read, "1.")
    assert (blob, about) == (wanted_blob, wanted_about)
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert (got[name].shape, got[name].dtype) == (want[name].shape, want[name].dtype)


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
def test_each_reads_the_others_checkpoint(linear4bit, kind, double_quant, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = linear4bit(kind, double_quant)
    x = torch.randn(3, 128, requires_grad=True)
    path, code = str(tmp_path / "theirs.safetensors"), torch.zeros(16) if kind == "fp4" else None
    safetensors.save_file({f"deep.layer.{n}": t for n, t in theirs.state_dict().items()}, path)
    net = nn.ModuleDict({"deep": nn.ModuleDict({"layer": Nf4Linear(128, 64, double_quant=double_quant, code=code)})})
    for assign in (False, True):
        net.load_state_dict(safetensors.load_file(path), assign=assign)
        close(net["deep"]["layer"](x), theirs(x), 1e-5)

    path = str(tmp_path / "ours.safetensors")
    safetensors.save_file(bitsandbytes_state_dict(net["deep"]["layer"]), path)
    entries = safetensors.load_file(path)
    bias, data = entries.pop("bias"), entries.pop("weight")
    loaded = bnb.nn.Linear4bit(128, 64, quant_type=kind)
    stats = {name.removeprefix("weight."): t for name, t in entries.items()}
    loaded.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu", module=loaded)
    loaded.bias.data = bias
    assert torch.equal(loaded(x), theirs(x))
    assert loaded.weight.quant_state == theirs.weight.quant_state


def test_a_checkpoint_of_another_kind_is_refused(linear4bit, to_cpu_layout):
    nf4, double, fp4 = (linear4bit(*kind).state_dict() for kind in (("nf4", False), ("nf4", True), ("fp4", False)))
    with pytest.raises(RuntimeError, match=r"must have .*'blocksize': 128.*, got .*'blocksize': 64"):
        Nf4Linear(128, 64, blocksize=128).load_state_dict(nf4)
    with pytest.raises(RuntimeError, match=r"must have .*'shape': \[32, 256\].*, got .*'shape': \[64, 128\]"):
        Nf4Linear(256, 32, bias=False).load_state_dict({n: t for n, t in nf4.items() if n != "bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*absmax_code"):
        Nf4Linear(128, 64).load_state_dict(double)
    with pytest.raises(RuntimeError, match=r"Missing key.*absmax_code"):
        Nf4Linear(128, 64, double_quant=True).load_state_dict(nf4)
    with pytest.raises(RuntimeError, match=r"must have .*'nested_blocksize': 64.*, got .*'nested_blocksize': 256"):
        Nf4Linear(128, 64, double_quant=True, absmax_blocksize=64).load_state_dict(double)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*code"):
        Nf4Linear(128, 64).load_state_dict(fp4)
    with pytest.raises(RuntimeError, match=r"Missing key.*absmax"):
        Nf4Linear(128, 64).load_state_dict({n: t for n, t in nf4.items() if n != "weight.absmax"})
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        Nf4Linear(128, 64).load_state_dict(to_cpu_layout(linear4bit()).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*packed"):  # a dense checkpoint
        Nf4Linear(128, 64).load_state_dict(nn.Linear(128, 64).state_dict())


def test_a_models_state_dict_in_their_names_keeps_the_rest():
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    net = nn.ModuleDict({"a": nn.ModuleDict({"one": shared, "two": shared}), "lm_head": nn.Linear(64, 9)})
    quantize_model(net)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    written = bitsandbytes_state_dict(net)
    assert {"a.one.weight.absmax", "a.two.weight.absmax", "lm_head.weight"} <= set(written)
    twin = copy.deepcopy(net)
    for buffer in twin.buffers():
        buffer.zero_()
    twin.load_state_dict(written)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # The same in one layer alone, without a prefix.
    layer = Nf4Linear(64, 64)
    layer.load_state_dict(bitsandbytes_state_dict(net["a"]["one"]))
    assert torch.equal(layer.packed, net["a"]["one"].packed)
    with pytest.raises(ValueError, match="code must be None"):
        bitsandbytes_state_dict(Nf4Linear(64, 64, code=torch.linspace(-1, 1, 16)))
