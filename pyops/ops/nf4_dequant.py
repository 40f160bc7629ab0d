"""The page of nf4_dequant, and the argument checks that every NF4 op shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import _extension
from .._checks import (
    FLOAT_DTYPES,
    ceil_div,
    check_dtype,
    check_float_dtype,
    check_power_of_two,
    check_same_device,
    check_shape,
    dtype_name,
    fail,
)
from .._registry import Op, TuningCase
from ..reference import nf4_dequant as reference
from ..triton_ops import _tuned

MIN_BLOCKSIZE, MAX_BLOCKSIZE = 32, 4096

# The double-quantisation arguments, the same in every schema that reads packed weights.
DQ = (
    "Tensor? code=None, Tensor? absmax_code=None, Tensor? absmax_scale=None, Tensor? absmax_offset=None, "
    "int absmax_blocksize=256"
)

SCHEMA = (
    "nf4_dequant(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype, int blocksize=64, *, "
    + DQ
    + ") -> Tensor"
)


def check_code(op: str, code: Tensor | None, first_name: str, first: Tensor) -> None:
    """A code table is [16] fp32."""
    if code is None:
        return
    check_same_device(op, "code", code, first_name, first)
    check_dtype(op, "code", code, torch.float32)
    if code.numel() != 16:
        fail(op, f"code must have 16 elements, got {code.numel()}")


def check_blocksize(op: str, name: str, value: int) -> None:
    """Blocks are powers of two from 32 to 4096."""
    check_power_of_two(op, name, value, MIN_BLOCKSIZE, MAX_BLOCKSIZE)


def check_packed(
    op: str,
    packed: Tensor,
    absmax: Tensor,
    n: int,
    blocksize: int,
    code: Tensor | None,
    absmax_code: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    absmax_blocksize: int,
) -> None:
    """Packed weights and their scales against `n` weights; csrc/common/nf4.h checks the same in the same order."""
    check_dtype(op, "packed", packed, torch.uint8)
    check_same_device(op, "absmax", absmax, "packed", packed)
    check_code(op, code, "packed", packed)
    check_blocksize(op, "blocksize", blocksize)
    if packed.numel() != ceil_div(n, 2):
        fail(op, f"packed must have ceil(n / 2) = {ceil_div(n, 2)} elements for n = {n} weights, got {packed.numel()}")
    blocks = ceil_div(n, blocksize)
    if absmax.numel() != blocks:
        fail(op, f"absmax must have ceil(n / blocksize) = {blocks} elements for n = {n} weights, got {absmax.numel()}")
    if absmax_code is None and absmax_scale is None and absmax_offset is None:
        if absmax.dtype != torch.float32:
            fail(
                op,
                "absmax must be float32, or uint8 together with absmax_code and absmax_scale, got "
                + dtype_name(absmax.dtype),
            )
        return
    check_dtype(op, "absmax", absmax, torch.uint8)
    if absmax_code is None or absmax_scale is None:
        only = (
            "absmax_code"
            if absmax_code is not None
            else "absmax_scale"
            if absmax_scale is not None
            else "absmax_offset"
        )
        fail(op, f"absmax_code and absmax_scale must be given together, got only {only}")
    check_same_device(op, "absmax_code", absmax_code, "packed", packed)
    check_dtype(op, "absmax_code", absmax_code, torch.float32)
    if absmax_code.numel() != 256:
        fail(op, f"absmax_code must have 256 elements, got {absmax_code.numel()}")
    check_blocksize(op, "absmax_blocksize", absmax_blocksize)
    scales = ceil_div(blocks, absmax_blocksize)
    check_same_device(op, "absmax_scale", absmax_scale, "packed", packed)
    check_dtype(op, "absmax_scale", absmax_scale, torch.float32)
    if absmax_scale.numel() != scales:
        fail(
            op,
            f"absmax_scale must have ceil(n_blocks / absmax_blocksize) = {scales} elements, got {absmax_scale.numel()}",
        )
    if absmax_offset is None:
        return
    check_same_device(op, "absmax_offset", absmax_offset, "packed", packed)
    check_dtype(op, "absmax_offset", absmax_offset, torch.float32)
    if absmax_offset.numel() != 1:
        fail(op, f"absmax_offset must have 1 element, got {absmax_offset.numel()}")


def _check(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
) -> None:
    check_float_dtype("nf4_dequant", "dtype", dtype)
    check_shape("nf4_dequant", "shape", shape)
    check_packed(
        "nf4_dequant", packed, absmax, math.prod(shape), blocksize,
        code, absmax_code, absmax_scale, absmax_offset, absmax_blocksize,
    )  # fmt: skip


def _fake(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int = 64, **scales: object
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _describe(
    backend: str,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *args: object,
    **kwargs: object,
) -> str:
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    double_quant = kwargs.get("absmax_code") is not None
    if backend == "triton":
        from ..triton_ops import nf4_dequant as triton_page

        return str(triton_page.config_for(packed.device, math.prod(shape), dtype, double_quant))
    if backend == "cuda":
        key = {"dtype": dtype_name(dtype), "double_quant": double_quant}
        found = _tuned.nearest("nf4_dequant", _tuned.gpu_slug(packed.device.index), "cuda", key, math.prod(shape))
        return f"tuned configuration {found['index']}" if found else "default configuration"
    return ""


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    for dtype in FLOAT_DTYPES:
        for double_quant in (False, True):
            for rows, columns in ((1024, 1024), (4096, 4096), (8192, 8192), (28672, 8192)):
                n = rows * columns
                packed, absmax, dq = reference.random_inputs(n, 64, device, double_quant=double_quant)
                key = {"dtype": dtype_name(dtype), "double_quant": double_quant}
                yield TuningCase(key, n, (packed, absmax, [rows, columns], dtype), dq)


OP = Op(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference=reference.nf4_dequant,
    triton="nf4_dequant",
    describe=_describe,
    tuning=_tuning,
    cuda_configs=8,  # kConfigs of csrc/common/nf4_dequant.cuh
    cuda_key=lambda key: 2 * getattr(torch, key["dtype"]).itemsize + key["double_quant"],
)


def nf4_dequant(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Expand 4-bit weights: out[i] = code[nibble i] * absmax[i // blocksize], multiplied in fp32 and rounded once.

    Bit-equal to bitsandbytes' dequantize_4bit, double quantisation included, in one launch.

    Args:
        packed: uint8, ceil(n / 2) elements in any shape, row-major, the high nibble first; n = prod(shape).
        absmax: fp32, ceil(n / blocksize) elements: the scale of each block of consecutive weights (blocks run across
            rows). Double-quantised: uint8, together with absmax_code and absmax_scale.
        shape: sizes of the result.
        dtype: torch.float32, torch.float16 or torch.bfloat16.
        blocksize: weights a block, a power of two from 32 to 4096.
        code: fp32 [16], the value of each nibble; NF4 when None.
        absmax_code: fp32 [256], the value of each quantised absmax.
        absmax_scale: fp32, ceil(n_blocks / absmax_blocksize) elements, the scale of each block of absmax.
        absmax_offset: fp32, one element added to every absmax after scaling; 0 when None.
        absmax_blocksize: absmax a block of absmax_scale, a power of two from 32 to 4096.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        A contiguous tensor of `shape` and `dtype` on packed's device.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Source: QLoRA, arXiv:2305.14314; arXiv:2604.02556. Cost: n (0.5 + 4 / blocksize + itemsize) bytes.
    No gradient: the result is a constant of the graph. Deterministic.
    """
    return OP(  # type: ignore[no-any-return]
        backend, packed, absmax, shape, dtype, blocksize,
        code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
        absmax_blocksize=absmax_blocksize,
    )  # fmt: skip
