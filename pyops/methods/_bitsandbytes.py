"""bitsandbytes' 4-bit weights, in its layers and in its checkpoints, as the arguments that our operators take.

"Weight arguments" below are a dictionary: packed, absmax and blocksize, and where there are such, code, absmax_code,
absmax_scale, absmax_offset and absmax_blocksize. bitsandbytes itself is imported only to make one of its layers.
Written against bitsandbytes 0.50.2.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import dtype_name
from ..ops.nf4_dequant import check_blocksize, nf4_dequant

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the bits: two of exponent, one of mantissa; then a sign
FP4_CODE = tuple(v / 12 for v in (*_FP4, *(0.0 - v for v in _FP4)))
ALL_NIBBLES = tuple(bytes.fromhex("0123456789abcdef"))
CPU_ROWS = 32  # rows that bitsandbytes' CPU layout interleaves
STATE = "weight.quant_state.bitsandbytes__"  # and the quant type: JSON, as bytes, of what is no tensor


def library(who: str) -> Any:
    """The bitsandbytes module."""
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who}: bitsandbytes is missing: pip install bitsandbytes", name=error.name
        ) from None


def is_cpu_layout(state: Any) -> bool:
    """Whether bitsandbytes rearranged this weight for its own CPU kernel, as its forward does in eval mode."""
    # Through __dict__: QuantState.__getattr__ takes a microsecond to say that there is no such attribute.
    return bool(state.__dict__.get("packing_format_for_cpu"))


def from_cpu_layout(packed: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """(packed, absmax) row-major, of a weight in that layout: 32 rows interleaved, scales transposed and in bf16.

    The scales keep the values that they have there. bitsandbytes' own inverse is not used: it leaves the scales of a
    plain weight as they are and quantises those of a double-quantised one a second time.
    """
    n, k = state.shape
    halves = packed.reshape(-1, CPU_ROWS)
    nibbles = torch.cat([halves & 15, halves >> 4], dim=1)
    pairs = nibbles.reshape(n // CPU_ROWS, k // 2, CPU_ROWS, 2).transpose(1, 2).reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], state.absmax.T.float().reshape(-1)


def check_state(who: str, name: str, state: Any) -> None:
    """Raise unless the operators can read a weight with this QuantState."""
    if state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{who}: {name} must have the quant_type nf4 or fp4, got {state.quant_type!r}")
    if state.shape is None or len(state.shape) != 2:
        raise ValueError(f"{who}: {name} must hold a matrix, got the shape {state.shape}")
    wanted = torch.bfloat16 if is_cpu_layout(state) else torch.uint8 if state.nested else torch.float32
    if state.absmax.dtype != wanted:  # bitsandbytes' state_dict() of a layer in its CPU layout leaves it like that
        raise ValueError(f"{who}: {name}'s absmax must be {dtype_name(wanted)}, got {dtype_name(state.absmax.dtype)}")
    check_blocksize(who, f"{name}'s blocksize", state.blocksize)
    if state.nested:
        check_blocksize(who, f"{name}'s nested blocksize", state.state2.blocksize)


def read_layer(who: str, name: str, weight: Any, state: Any) -> dict[str, Any]:
    """The weight arguments of a Params4bit: its own tensors, not copies, unless it is in the CPU layout.

    Raises:
        ValueError: it is not quantised yet, or of another kind than nf4 and fp4.
        RuntimeError: from check_blocksize.
    """
    if state is None or weight.is_meta:
        raise ValueError(f"{who}: {name} must be quantised, which bitsandbytes does when it is moved to a device")
    check_state(who, name, state)
    packed, absmax = weight.data.as_subclass(Tensor).view(torch.uint8).reshape(-1), state.absmax
    if is_cpu_layout(state):
        packed, absmax = from_cpu_layout(packed, state)
    found = {"packed": packed, "absmax": absmax, "blocksize": state.blocksize}
    if state.quant_type == "fp4":
        found["code"] = state.code
    if state.nested:
        found |= {"absmax_code": state.state2.code, "absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
        found["absmax_blocksize"] = state.state2.blocksize
    return found


def _code(who: str, weight: Mapping[str, Any]) -> tuple[str, Tensor]:
    """(what bitsandbytes calls the code table, the table); it knows two."""
    code, device = weight.get("code"), weight["packed"].device
    if code is None:  # the operators hold NF4's table; expanding each nibble shows it
        nibbles = torch.tensor(ALL_NIBBLES, dtype=torch.uint8, device=device)
        return "nf4", nf4_dequant(nibbles, torch.ones(1, device=device), [16], torch.float32)
    if torch.equal(code, torch.tensor(FP4_CODE, device=device)):
        return "fp4", code
    raise ValueError(f"{who}: code must be None (NF4) or bitsandbytes' FP4 table, got {code.tolist()}")


def make_layer(
    who: str,
    weight: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
) -> Any:
    """A bitsandbytes Linear4bit, without a bias, that holds the very tensors of these weight arguments."""
    kind, code = _code(who, weight)
    bnb, double_quant, offset, inner = library(who), "absmax_code" in weight, None, None
    if double_quant:
        offset, inner = weight["absmax_offset"], bnb.functional.QuantState(
            absmax=weight["absmax_scale"], code=weight["absmax_code"], blocksize=weight["absmax_blocksize"],
            dtype=torch.float32,
        )  # fmt: skip
    state = bnb.functional.QuantState(
        absmax=weight["absmax"], shape=torch.Size(shape), code=code, blocksize=weight["blocksize"], quant_type=kind,
        dtype=dtype, offset=offset, state2=inner,
    )  # fmt: skip
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=compute_dtype, compress_statistics=double_quant, quant_type=kind,
        device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight["packed"].view(-1, 1), requires_grad=False, quant_state=state, blocksize=weight["blocksize"],
        compress_statistics=double_quant, quant_type=kind, module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    return layer


def to_entries(who: str, weight: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a bitsandbytes checkpoint holds of a weight, from "weight" on."""
    kind, code = _code(who, weight)
    facts: dict[str, Any] = {"quant_type": kind, "blocksize": weight["blocksize"], "shape": shape}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    entries = {"weight": weight["packed"].view(-1, 1), "weight.absmax": weight["absmax"], "weight.quant_map": code}
    if "absmax_code" in weight:
        entries["weight.nested_absmax"] = weight["absmax_scale"]
        entries["weight.nested_quant_map"] = weight["absmax_code"]
        facts |= {"nested_blocksize": weight["absmax_blocksize"], "nested_dtype": "float32"}
        facts["nested_offset"] = weight["absmax_offset"].item()
    return entries | {STATE + kind: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def from_entries(entries: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(weight arguments, the facts that are no tensors) of a checkpoint's entries; None where they are no such."""
    blob = next((entry for name, entry in entries.items() if name.startswith(STATE)), None)
    if blob is None or "weight" not in entries:
        return None
    facts = json.loads(bytes(blob.tolist()))
    names = {"absmax": "absmax", "nested_quant_map": "absmax_code", "nested_absmax": "absmax_scale"}
    if facts["quant_type"] != "nf4":
        names["quant_map"] = "code"
    weight = {own: entries[f"weight.{name}"] for name, own in names.items() if f"weight.{name}" in entries}
    if "nested_offset" in facts:
        weight["absmax_offset"] = torch.tensor(facts["nested_offset"], device=entries["weight"].device)
    return weight | {"packed": entries["weight"].view(torch.uint8).reshape(-1)}, facts
