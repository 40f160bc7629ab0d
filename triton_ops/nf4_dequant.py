"""nf4_dequant in Triton: out[i] = code[nibble i] * absmax[i // blocksize].

Two numbers at 28672 x 8192, blocksize 64, bf16: 602 MB (132 read, 470 written), 199 us at 3.02 TB/s; 235 Mflop.
A program expands WORDS words of 4 packed bytes: a word is 8 weights of one block (blocks are at least 32), and its 8
outputs are 16 bytes of a 16-bit type, one store. The 16 codes are looked up with tl.gather, through shared memory;
they are compile-time constants when the table is NF4's, loaded otherwise. Only the last program, and unaligned input,
pay for masks and byte-wise loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

DEFAULT = {"WORDS": 1024, "num_warps": 8}
SPACE = [
    {"WORDS": words, "num_warps": warps}
    for words, warps in ((256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8))
]


@triton.jit
def _table(CODE: tl.constexpr):
    """[16] fp32 in registers, from compile-time constants."""
    index = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for k in tl.static_range(16):
        table = tl.where(index == k, CODE[k], table)
    return table


@triton.jit
def _load_words(packed_ptr, word, n_bytes, WHOLE: tl.constexpr):
    """[WORDS] int32, the first byte lowest; WHOLE: aligned and all there."""
    if WHOLE:
        return tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word)
    value = tl.zeros(word.shape, tl.int32)
    for k in tl.static_range(4):
        byte = word * 4 + k
        value |= tl.load(packed_ptr + byte, mask=byte < n_bytes, other=0).to(tl.int32) << (8 * k)
    return value


@triton.jit
def _block_scale(
    absmax_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, block,
    ABSMAX_BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    scale = tl.load(absmax_ptr + block)
    if DOUBLE_QUANT:
        scale = tl.load(absmax_code_ptr + scale.to(tl.int32)) * tl.load(absmax_scale_ptr + block // ABSMAX_BLOCKSIZE)
        if HAS_OFFSET:
            scale = scale + tl.load(absmax_offset_ptr)
    return scale


@triton.jit
def _dequant_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, out_ptr, n,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    CODE: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    table = _table(CODE) if CODE is not None else tl.load(code_ptr + tl.arange(0, 16))
    first = tl.program_id(0).to(tl.int64) * WORDS
    left = n - first * 8  # weights from here on
    packed_ptr += first * 4
    out_ptr += first * 8
    word = tl.arange(0, WORDS)
    nibble = tl.arange(0, 8)
    element = word[:, None] * 8 + nibble[None, :]  # [WORDS, 8]
    whole = left >= WORDS * 8
    if ALIGNED and whole:
        words = _load_words(packed_ptr, word, 0, True)
    else:
        words = _load_words(packed_ptr, word, (left + 1) // 2, False)
    block = tl.minimum((first * 8 + word * 8) // BLOCKSIZE, (n - 1) // BLOCKSIZE)
    scale = _block_scale(
        absmax_ptr,
        absmax_code_ptr,
        absmax_scale_ptr,
        absmax_offset_ptr,
        block,
        ABSMAX_BLOCKSIZE,
        DOUBLE_QUANT,
        HAS_OFFSET,
    )
    shift = (nibble ^ 1) * 4  # the high nibble of each byte comes first
    index = tl.reshape((words[:, None] >> shift[None, :]) & 15, (WORDS * 8,))
    value = tl.reshape(tl.gather(table, index, 0), (WORDS, 8)) * scale[:, None]
    value = value.to(out_ptr.dtype.element_ty)
    if whole:
        tl.store(out_ptr + element, value)
    else:
        tl.store(out_ptr + element, value, mask=element < left)


def config_for(device: torch.device, n: int, dtype: torch.dtype, double_quant: bool) -> dict[str, Any]:
    """The tuned configuration for n weights."""
    key = (("dtype", str(dtype).removeprefix("torch.")), ("double_quant", double_quant))
    return _tuned.lookup("nf4_dequant", device, key, max(n, 1).bit_length() - 1, tuple(DEFAULT.items()))


def launch(
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
    config: dict[str, Any] | None = None,
) -> Tensor:
    """Run the kernel; arguments as the op has them, already checked."""
    n = math.prod(shape)
    out = packed.new_empty(tuple(shape), dtype=dtype)
    if n == 0:
        return out
    double_quant = absmax_code is not None
    config = dict(config or config_for(packed.device, n, dtype, double_quant))
    packed = packed.contiguous()
    with torch.cuda.device_of(packed):
        _dequant_kernel[(triton.cdiv(n, 8 * config["WORDS"]),)](
            packed,
            absmax.contiguous(),
            None if code is None else code.contiguous(),
            None if absmax_code is None else absmax_code.contiguous(),
            None if absmax_scale is None else absmax_scale.contiguous(),
            absmax_offset,
            out,
            n,
            BLOCKSIZE=blocksize,
            ABSMAX_BLOCKSIZE=absmax_blocksize,
            DOUBLE_QUANT=double_quant,
            HAS_OFFSET=absmax_offset is not None,
            CODE=NF4_CODE if code is None else None,
            ALIGNED=packed.data_ptr() % 4 == 0,
            enable_fp_fusion=False,  # product and offset are rounded apart, as bitsandbytes does
            **config,
        )
    return out


def specializations() -> Iterator[_aot.Specialization]:
    """Every shipped configuration with each dtype, plain and double-quantised, NF4's table and a user's."""
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("nf4_dequant", gpu) if e["backend"] == "triton"]
    for config in _aot.configurations(SPACE, DEFAULT, shipped):
        for out, double_quant, user_code in (
            ("bf16", False, False), ("bf16", True, False), ("fp16", False, True), ("fp32", True, True),
        ):  # fmt: skip
            types = {
                "packed_ptr": "*u8",
                "absmax_ptr": "*u8" if double_quant else "*fp32",
                "out_ptr": f"*{out}",
                "n": "i64",
            }
            if double_quant:
                types |= dict.fromkeys(("absmax_code_ptr", "absmax_scale_ptr", "absmax_offset_ptr"), "*fp32")
            if user_code:
                types["code_ptr"] = "*fp32"
            constants = {
                "BLOCKSIZE": 64, "ABSMAX_BLOCKSIZE": 256, "DOUBLE_QUANT": double_quant, "HAS_OFFSET": double_quant,
                "CODE": None if user_code else NF4_CODE, "ALIGNED": True,
            }  # fmt: skip
            name = f"{out}{'-dq' * double_quant}{'-code' * user_code}-{config}"
            yield _aot.Specialization(name, _dequant_kernel, types, constants, config)
