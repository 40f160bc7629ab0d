"""The competition: for each op, how each peer does the same work on the same bytes. Peers are imported when first asked
for, so an absent one costs nothing but its line in the output.

A peer's `prepare(call)` does everything a user does once (states, tables) and returns what a user does every time.
Where a library has a faster entry than its documented one, the faster one is measured.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastops.reference.nf4_dequant import NF4_CODE

if TYPE_CHECKING:
    from .harness import Call
    from .timing import Runner


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Peer:
    """How to call one peer.

    Args:
        prepare: (call of our op) -> the peer's call; raises Absent.
        tolerance: how far its output may be from ours (harness.difference) and still count as the same work.
        not_capturable: why it cannot be timed inside a CUDA graph, or "".
    """

    prepare: Callable[[Call], Runner]
    tolerance: float = 1e-3
    not_capturable: str = ""


@functools.cache
def library(name: str) -> ModuleType:
    """The peer's module, or Absent."""
    logging.disable(logging.WARNING)  # peers warn about their own optional parts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as why:
        raise Absent(f"{why.name} is not installed") from why
    except Exception as why:  # a broken install raises anything
        raise Absent(f"{name} does not import: {why}") from why
    finally:
        logging.disable(logging.NOTSET)


def _nf4_only(call: Call) -> None:
    if call.kwargs.get("code") is not None:
        raise Absent("it has no code table of the user's")


def bitsandbytes_dequant(call: Call) -> Runner:
    """The operator itself, or for double quantisation the documented function: three launches."""
    functional = library("bitsandbytes.functional")
    _nf4_only(call)
    packed, absmax, shape, dtype, blocksize = call.args
    packed = packed.reshape(-1, 1)
    if "absmax_code" not in call.kwargs:
        op = torch.ops.bitsandbytes.dequantize_4bit.default
        return functools.partial(op, packed, absmax, blocksize, "nf4", shape, dtype)
    nested = functional.QuantState(
        absmax=call.kwargs["absmax_scale"],
        code=call.kwargs["absmax_code"],
        blocksize=call.kwargs.get("absmax_blocksize", 256),
        dtype=torch.float32,
    )
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device=packed.device),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=call.kwargs["absmax_offset"],
        state2=nested,
    )
    return functools.partial(functional.dequantize_4bit, packed, state)


def torchao_dequant(call: Call) -> Runner:
    """NF4Tensor on our packed bytes; its scales are int8 steps of a block's scale: ours but for rounding."""
    nf4_tensor = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    _nf4_only(call)
    packed, absmax, shape, dtype, blocksize = call.args
    if "absmax_code" not in call.kwargs:
        raise Absent("it always double-quantises")
    per_scale = call.kwargs.get("absmax_blocksize", 256)
    if absmax.numel() % per_scale:
        raise Absent(f"its scales come in whole blocks of {per_scale}")
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    meta = nf4_tensor.SubclassTensorArgs(torch.Size(shape), strides, 0, dtype, packed.device, False)
    weight = nf4_tensor.NF4Tensor(
        meta,
        blocksize,
        absmax.numel(),
        per_scale,
        (call.kwargs["absmax_code"][absmax.int()] * 127).round().to(torch.int8),
        (127 / call.kwargs["absmax_scale"]).to(dtype),
        call.kwargs["absmax_offset"].to(dtype),
        packed,
        nf4=torch.tensor(NF4_CODE, dtype=dtype, device=packed.device),
    )
    return weight.get_original_weight  # type: ignore[no-any-return]


def torch_dequant(call: Call) -> Runner:
    """Plain eager PyTorch: look up, scale, round."""
    packed, absmax, shape, dtype, blocksize = call.args
    code = call.kwargs.get("code")
    table = torch.tensor(NF4_CODE, device=packed.device) if code is None else code
    if math.prod(shape) % blocksize:
        raise Absent("a last partial block needs padding")

    def scales() -> Tensor:
        if "absmax_code" not in call.kwargs:
            return absmax  # type: ignore[no-any-return]
        values = call.kwargs["absmax_code"][absmax.int()]
        each = call.kwargs["absmax_scale"].repeat_interleave(
            call.kwargs.get("absmax_blocksize", 256), output_size=values.numel()
        )
        return values * each + call.kwargs["absmax_offset"]  # type: ignore[no-any-return]

    def run() -> Tensor:
        nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).int()
        values = table.index_select(0, nibbles).reshape(-1, blocksize)
        return (values * scales()[:, None]).to(dtype).reshape(shape)

    return run


def bitsandbytes_quantize(call: Call) -> Runner:
    """The operator itself; the documented function adds a state object."""
    library("bitsandbytes.functional")
    _nf4_only(call)
    w, blocksize = call.args
    op = torch.ops.bitsandbytes.quantize_4bit.default
    return functools.partial(op, w, blocksize, "nf4", torch.uint8)


def torch_quantize(call: Call) -> Runner:
    """Plain eager PyTorch: scale, find the interval between codes, pack."""
    w, blocksize = call.args
    _nf4_only(call)
    if w.numel() % blocksize:
        raise Absent("a last partial block needs padding")
    code = torch.tensor(NF4_CODE, device=w.device)
    bounds = (code[:-1] + code[1:]) / 2

    def run() -> tuple[Tensor, Tensor]:
        blocks = w.reshape(-1, blocksize).float()
        absmax = blocks.abs().amax(dim=1)
        scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
        nibbles = torch.bucketize(scaled.reshape(-1), bounds, out_int32=True).to(torch.uint8)
        return nibbles[0::2] << 4 | nibbles[1::2], absmax

    return run


PEERS: dict[str, dict[str, Peer]] = {
    "nf4_dequant": {
        "bitsandbytes": Peer(bitsandbytes_dequant),
        # Its table and scales are rounded to the output's type.
        "torchao": Peer(torchao_dequant, tolerance=2e-2),
        "torch": Peer(torch_dequant),
    },
    "nf4_quantize": {
        "bitsandbytes": Peer(
            bitsandbytes_quantize,
            # A value within 2 ulp of a boundary may go either way on its CUDA path.
            tolerance=1e-2,
            not_capturable="it launches on the legacy default stream, which a capture forbids (and then exits)",
        ),
        "torch": Peer(torch_quantize, tolerance=1e-2),
    },
}
