import pytest
import torch


@pytest.fixture
def linear4bit():
    """Makes bitsandbytes layers, in training mode, in which they keep their plain layout on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")

    def make(
        kind="nf4", double_quant=False, k=128, n=64, *, blocksize=64, bias=True, compute_dtype=None, device="cpu",
        seed=0, **more,
    ):  # fmt: skip
        torch.manual_seed(seed)
        layer = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=compute_dtype, quant_type=kind, **more)
        layer.weight = bnb.nn.Params4bit(
            torch.randn(n, k), requires_grad=False, quant_type=kind, compress_statistics=double_quant,
            blocksize=blocksize, module=layer, **more,
        )  # fmt: skip
        return layer.to(device).train()

    return make


@pytest.fixture
def to_cpu_layout():
    """Does what bitsandbytes' forward does in eval mode on a CPU with AVX512-BF16, on any CPU."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def convert(layer):
        weight = layer.weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        return layer

    return convert
