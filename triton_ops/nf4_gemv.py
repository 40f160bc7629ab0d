"""nf4_gemv and nf4_linear, y = x @ W.T + bias, and nf4_linear_dx, dx = dy @ W, in Triton; W [N, K] is 4-bit weights.

Two numbers at 28672 x 8192, blocksize 64, bf16, one row: 132 MB (117 packed, 15 absmax), 44 us at 3.02 TB/s; 470 Mflop.
Decoding binds: in 44 us an H100 issues 5.5 instructions a weight, 2.8 of them integer; these are 3.9, 3.2 of them.

A program takes BLOCK_N rows of W and up to 128 rows of x, and walks along K with tensor cores. It reads W as halfwords
of four codes, and weight j of each goes into a product with x[4 i + j], so that nothing is ever interleaved. Byte
permutes make 16-bit values of the codes, from a table in registers, in the layout that the tensor cores want. They are
the codes times a gain that makes their rounding errors small; scales multiply fp32 sums, one of a SLICE of K at a time.
A tile wider than a slice has T of them: its x is block-diagonal, T columns a row, and few rows leave that many unused.
Small N is split along K, and a second kernel adds up the parts.

What that kernel does not take (fp32, K no multiple of 32, many rows, dx) goes through weights that nf4_dequant's kernel
expands, and torch's matrix product: y of up to FUSED_ROWS rows in fp32, else each weight rounded once to x's type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned, nf4_dequant
from .nf4_dequant import NF4_CODE, _block_scale

FUSED_ROWS = 256  # more rows are worth expanding W for
WORKSPACE = 256 << 20  # bytes of expanded weights at a time

# PROGRAMS: how many are wanted; small products are split along K to come near.
DEFAULT = {"BLOCK_N": 64, "BLOCK_K": 256, "PROGRAMS": 1024, "num_warps": 4, "num_stages": 2}
SPACE = [
    {"BLOCK_N": n, "BLOCK_K": k, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
    for n, k, programs, warps, stages in (
        (64, 256, 512, 4, 2), (64, 256, 2048, 4, 2), (64, 256, 1024, 4, 3), (32, 256, 2048, 2, 2),
        (64, 128, 1024, 4, 3), (128, 128, 512, 4, 3), (128, 128, 1024, 8, 3), (64, 64, 2048, 4, 4),
    )
]  # fmt: skip

# Times this, NF4's codes round to 16 bits with the least error (found by search).
GAIN = {torch.bfloat16: 1.437005, torch.float16: 1.67769}
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _planes(dtype: torch.dtype) -> tuple[int, ...]:
    """NF4's codes times GAIN, rounded to `dtype`: four words of their low bytes, four of their high ones."""
    values = (torch.tensor(NF4_CODE, dtype=torch.float64) * GAIN[dtype]).to(dtype)
    return tuple(values.view(torch.uint8).reshape(16, 2).T.contiguous().view(torch.int32).reshape(-1).tolist())


TABLES = {dtype: _planes(dtype) for dtype in GAIN}

# Two halfwords ($4) to four pairs: $j is weight j of both. A permute looks up 3 bits of four codes, and the fourth bit
# chooses between two of them. The table's words are $5 … $20, each twice (an operand has two elements). ptxas does not
# see that `zero` is 0: it would copy a constant table from uniform registers again for each permute.
_DECODE = tl.constexpr("""{
    .reg .b32 zero, t0, t2, t4, t6, w, low3, high3, bit3, high_bit3, a, b, lo, hi;
    mov.u32 zero, %lanemask_eq;  popc.b32 zero, zero;  shr.u32 zero, zero, 1;
    add.u32 t0, zero, $5;  add.u32 t2, zero, $9;  add.u32 t4, zero, $13;  add.u32 t6, zero, $17;
    prmt.b32 w, $4, 0, 0x3120;
    and.b32 low3, w, 0x77777777;  shr.u32 high3, low3, 16;
    shr.u32 bit3, w, 1;  lop3.b32 bit3, bit3, 0x44444444, 0x32103210, 0xEA;  shr.u32 high_bit3, bit3, 16;
    prmt.b32 a, t0, $7, low3;  prmt.b32 b, t2, $11, low3;  prmt.b32 lo, a, b, bit3;
    prmt.b32 a, t4, $15, low3;  prmt.b32 b, t6, $19, low3;  prmt.b32 hi, a, b, bit3;
    prmt.b32 $0, lo, hi, 0x7351;  prmt.b32 $1, lo, hi, 0x6240;
    prmt.b32 a, t0, $7, high3;  prmt.b32 b, t2, $11, high3;  prmt.b32 lo, a, b, high_bit3;
    prmt.b32 a, t4, $15, high3;  prmt.b32 b, t6, $19, high3;  prmt.b32 hi, a, b, high_bit3;
    prmt.b32 $2, lo, hi, 0x7351;  prmt.b32 $3, lo, hi, 0x6240;
}""")
_DECODE_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 17)


@triton.jit
def _look_up(words, shift: tl.constexpr, t):
    """What _DECODE does to one code of each halfword, for the interpreter, which knows no assembly."""
    code = (words.to(tl.int32) >> shift) & 15
    lo = tl.where(code < 8, tl.where(code < 4, t[0], t[1]), tl.where(code < 12, t[2], t[3]))
    hi = tl.where(code < 8, tl.where(code < 4, t[4], t[5]), tl.where(code < 12, t[6], t[7]))
    at = (code & 3) * 8
    return ((((hi >> at) & 255) << 8) | ((lo >> at) & 255)).to(tl.int16)


@triton.jit
def _decode(words, t, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Weights 0 to 3 of each halfword; t: the 8 words of the table."""
    if INTERPRET:
        w0, w1, w2, w3 = _look_up(words, 4, t), _look_up(words, 0, t), _look_up(words, 12, t), _look_up(words, 8, t)
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _DECODE, _DECODE_OPERANDS, [words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    return (
        w0.to(DTYPE, bitcast=True), w1.to(DTYPE, bitcast=True), w2.to(DTYPE, bitcast=True), w3.to(DTYPE, bitcast=True),
    )  # fmt: skip


@triton.jit
def _table_kernel(code_ptr, table_ptr, DTYPE: tl.constexpr, TRIALS: tl.constexpr):
    """A user's codes as _planes makes them, times the best of many gains; then 1 / gain."""
    code = tl.load(code_ptr + tl.arange(0, 16))
    largest = tl.max(tl.abs(code), axis=0).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((largest >> 23) - 126, -126), 126)
    power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # brings the largest to [0.5, 1)
    gain = 1.0 + tl.arange(0, TRIALS) / TRIALS
    trial = (code * power)[:, None] * gain[None, :]
    error = (trial.to(DTYPE).to(tl.float32) - trial) / gain[None, :]
    gain = 1.0 + tl.argmin(tl.sum(error * error, axis=0), axis=0).to(tl.float32) / TRIALS
    bits = (code * power * gain).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    at = (tl.arange(0, 16) % 4) * 8
    word = tl.arange(0, 4)
    tl.store(table_ptr + word, tl.sum(tl.reshape((bits & 255) << at, (4, 4)), axis=1))
    tl.store(table_ptr + 4 + word, tl.sum(tl.reshape(((bits >> 8) & 255) << at, (4, 4)), axis=1))
    inverse = ((127 + exponent) << 23).to(tl.float32, bitcast=True) / gain
    tl.store(table_ptr + 8, inverse.to(tl.int32, bitcast=True))


@triton.jit
def _table_words(table_ptr, TABLE: tl.constexpr):
    """Eight scalars: a table's low bytes, then its high ones."""
    if TABLE is not None:
        return (
            tl.full((), TABLE[0], tl.int32), tl.full((), TABLE[1], tl.int32), tl.full((), TABLE[2], tl.int32),
            tl.full((), TABLE[3], tl.int32), tl.full((), TABLE[4], tl.int32), tl.full((), TABLE[5], tl.int32),
            tl.full((), TABLE[6], tl.int32), tl.full((), TABLE[7], tl.int32),
        )  # fmt: skip
    else:
        return (
            tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3),
            tl.load(table_ptr + 4), tl.load(table_ptr + 5), tl.load(table_ptr + 6), tl.load(table_ptr + 7),
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "K32", "tiles"])
def _product_kernel(
    x_ptr, packed_ptr, absmax_ptr, table_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, bias_ptr, out_ptr,
    M, N, K32, tiles,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    TABLE: tl.constexpr, INVERSE: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """K is 32 K32, and a program adds up `tiles` tiles of BLOCK_K. WHOLE: K is a multiple of BLOCK_K."""
    T: tl.constexpr = BLOCK_K // SLICE
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    i = tl.arange(0, BLOCK_K // 4)  # halfwords of W, and quadruples of x
    column = tl.arange(0, BLOCK_M * T)
    m = tl.program_id(0) * BLOCK_M + column // T
    first = tl.program_id(2) * tiles
    k = first * BLOCK_K

    w_ptrs = packed_ptr.to(tl.pointer_type(tl.int16)) + row[:, None] * (K32 * 8) + (k // 4 + i)[None, :]
    x_ptrs = x_ptr.to(tl.pointer_type(tl.int64)) + m[None, :].to(tl.int64) * (K32 * 8) + (k // 4 + i)[:, None]
    x_mask = (m < M)[None, :]
    start = (row * K32 * 32)[:, None]
    if T > 1:
        x_mask = x_mask & (i[:, None] // (SLICE // 4) == (column % T)[None, :])
        start += (column % T * SLICE)[None, :]
    table = _table_words(table_ptr, TABLE)

    acc = tl.zeros((BLOCK_N, BLOCK_M * T), tl.float32)
    for _ in range(first, tl.minimum(first + tiles, tl.cdiv(K32 * 32, BLOCK_K))):
        block = (start + k) // BLOCKSIZE
        if WHOLE:
            words = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=x_mask, other=0)
        else:
            inside = k // 4 + i < K32 * 8
            words = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x = tl.load(x_ptrs, mask=x_mask & inside[:, None], other=0)
            block = tl.minimum(block, (N.to(tl.int64) * K32 * 32 - 1) // BLOCKSIZE)
        scale = _block_scale(
            absmax_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, block,
            ABSMAX_BLOCKSIZE, DOUBLE_QUANT, HAS_OFFSET,
        )  # fmt: skip
        w0, w1, w2, w3 = _decode(words, table, DTYPE, INTERPRET)
        part = tl.dot(w0, x.to(tl.int16).to(DTYPE, bitcast=True))
        part = tl.dot(w1, (x >> 16).to(tl.int16).to(DTYPE, bitcast=True), part)
        part = tl.dot(w2, (x >> 32).to(tl.int16).to(DTYPE, bitcast=True), part)
        part = tl.dot(w3, (x >> 48).to(tl.int16).to(DTYPE, bitcast=True), part)
        acc += part * scale
        k += BLOCK_K
        w_ptrs += BLOCK_K // 4
        x_ptrs += BLOCK_K // 4

    if T > 1:
        acc = tl.sum(tl.reshape(acc, (BLOCK_N, BLOCK_M, T)), axis=2)
    acc *= INVERSE if TABLE is not None else tl.load(table_ptr + 8).to(tl.float32, bitcast=True)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
    n = n[:, None]
    if SPLIT:
        out_ptr += tl.program_id(2).to(tl.int64) * M * N
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N).to(tl.float32)
    tl.store(out_ptr + m * N + n, acc.to(out_ptr.dtype.element_ty), mask=(n < N) & (m < M))


@triton.jit(do_not_specialize=["splits", "size", "N"])
def _sum_kernel(parts_ptr, bias_ptr, out_ptr, splits, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum of parts[:, i], + bias."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & (i < size)[None, :]
    total = tl.sum(tl.load(parts_ptr + split.to(tl.int64) * size + i[None, :], mask=mask, other=0.0), axis=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i % N, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@functools.cache
def _widest(device: torch.device) -> int:
    """Rows of x that a program can take: more than 64 do not fit the tensor memory of sm_100."""
    return 64 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10 else 128


def fit(config: dict[str, Any], rows: int, k: int, blocksize: int, widest: int = 128) -> dict[str, Any]:
    """The sizes nearest to `config` that suit this many rows of x, for _product_kernel."""
    block_n, block_k, warps = config["BLOCK_N"], config["BLOCK_K"], config["num_warps"]
    limit = min(blocksize, k & -k)  # a slice lies in one row of W and in one block
    block_m = min(widest, triton.next_power_of_2(rows))
    # Shared memory has room for so much of x, and tensor cores have no time for many columns that are mostly zero.
    while block_k > 64 and (block_m * block_k > 8192 or (block_k > limit and block_m * block_k // limit > 16)):
        block_k, block_n = block_k // 2, min(block_n * 2, max(block_n, 128))
    slice_ = min(limit, block_k)
    turns = block_k // slice_
    block_m = max(block_m if turns == 1 else min(block_m, 64 // turns), 8 // turns)
    while block_n * block_m * turns > (2048 if turns == 1 else 1024) * warps:  # registers for sums
        block_n, warps = (block_n, warps * 2) if warps < 8 else (block_n // 2, warps)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SLICE": slice_,
        "num_warps": warps, "num_stages": config["num_stages"],
    }  # fmt: skip


def _fused(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    n: int,
    blocksize: int,
    bias: Tensor | None,
    config: dict[str, Any],
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
) -> Tensor:
    """x @ W.T + bias without expanding W."""
    rows, k = x.shape
    out = x.new_empty(rows, n)
    sizes = fit(config, rows, k, blocksize, _widest(x.device))
    grid = triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(n, sizes["BLOCK_N"])
    # A program has 256 weights of a row or more, and the partial sums are at most twice the bytes of the weights.
    splits = max(1, min(config["PROGRAMS"] // math.prod(grid), k // 256, k // (4 * rows), 128))
    tiles = triton.cdiv(triton.cdiv(k, sizes["BLOCK_K"]), splits)
    splits = triton.cdiv(k, tiles * sizes["BLOCK_K"])
    parts = out if splits == 1 else x.new_empty(splits, rows, n, dtype=torch.float32)
    table = None if code is None else x.new_empty(9, dtype=torch.int32)
    with torch.cuda.device_of(x):
        if code is not None:
            _table_kernel[(1,)](code.contiguous(), table, DTYPE=_TYPES[x.dtype], TRIALS=1024)
        _product_kernel[(*grid, splits)](
            x if x.data_ptr() % 8 == 0 else x.clone(), packed, absmax.contiguous(), table,
            None if absmax_code is None else absmax_code.contiguous(),
            None if absmax_scale is None else absmax_scale.contiguous(),
            absmax_offset, bias if splits == 1 else None, parts, rows, n, k // 32, tiles,
            BLOCKSIZE=blocksize, ABSMAX_BLOCKSIZE=absmax_blocksize,
            DOUBLE_QUANT=absmax_code is not None, HAS_OFFSET=absmax_offset is not None,
            TABLE=TABLES[x.dtype] if table is None else None, INVERSE=1 / GAIN[x.dtype],
            WHOLE=k % sizes["BLOCK_K"] == 0, SPLIT=splits > 1, INTERPRET=triton.knobs.runtime.interpret,
            **sizes,
        )  # fmt: skip
        if splits > 1:
            size, power = out.numel(), triton.next_power_of_2(splits)
            _sum_kernel[(triton.cdiv(size, 64),)](parts, bias, out, splits, size, n, SPLITS=power, BLOCK=64)
    return out


def _through_expanded(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    n: int,
    blocksize: int,
    bias: Tensor | None,
    absmax_scale: Tensor | None = None,
    absmax_blocksize: int = 256,
    **scales: Any,
) -> Tensor:
    """x @ W.T + bias, a slab of W at a time; at its start begin a block of weights and one of scales."""
    (rows, k), dtype = x.shape, x.dtype if x.shape[0] > FUSED_ROWS else torch.float32
    wide, wide_bias = x.to(dtype), None if bias is None else bias.to(dtype)
    out = wide.new_empty(rows, n)
    unit = blocksize if absmax_scale is None else blocksize * absmax_blocksize
    step = unit // math.gcd(unit, k)
    step *= max(1, WORKSPACE // (step * k * dtype.itemsize))
    for first in range(0, n, step):
        some, block = slice(first, min(first + step, n)), first * k // blocksize
        w = nf4_dequant.launch(
            packed.view(-1)[first * k // 2 :], absmax.reshape(-1)[block:], (some.stop - first, k), dtype, blocksize,
            absmax_scale=None if absmax_scale is None else absmax_scale.reshape(-1)[block // absmax_blocksize :],
            absmax_blocksize=absmax_blocksize, **scales,
        )  # fmt: skip
        if wide_bias is None:
            torch.mm(wide, w.T, out=out[:, some])
        else:
            torch.addmm(wide_bias[some], wide, w.T, out=out[:, some])
        del w  # before the next one is made
    return out.to(x.dtype)


def config_for(op: str, x: Tensor, out_features: int, double_quant: bool) -> dict[str, Any]:
    """The tuned configuration of nf4_gemv or nf4_linear for x [..., K]."""
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    key = (
        ("dtype", str(x.dtype).removeprefix("torch.")),
        ("double_quant", double_quant),
        ("M", min(128, triton.next_power_of_2(max(rows, 1)))),
    )
    return _tuned.lookup(op, x.device, key, max(k * out_features, 1).bit_length() - 1, tuple(DEFAULT.items()))


def launch(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    config: dict[str, Any] | None = None,
    op: str = "nf4_gemv",
    **scales: Any,
) -> Tensor:
    """nf4_gemv, and nf4_linear when that is `op`; arguments as the op has them, already checked."""
    k, shape = x.shape[-1], (*x.shape[:-1], out_features)
    rows = math.prod(x.shape[:-1])
    bias = None if bias is None else bias.reshape(-1).contiguous()
    if 0 in (rows, out_features, k):
        return x.new_zeros(shape) if bias is None else bias.expand(shape).contiguous()
    x2, packed = x.reshape(rows, k).contiguous(), packed.contiguous()
    if x.dtype in TABLES and k % 32 == 0 and rows <= FUSED_ROWS and packed.data_ptr() % 2 == 0:
        config = config or config_for(op, x, out_features, scales.get("absmax_code") is not None)
        y = _fused(x2, packed, absmax, out_features, blocksize, bias, config, **scales)
    else:
        y = _through_expanded(x2, packed, absmax, out_features, blocksize, bias, **scales)
    return y.reshape(shape)


nf4_linear_launch = functools.partial(launch, op="nf4_linear")


def nf4_linear_dx_launch(
    dy: Tensor, packed: Tensor, absmax: Tensor, in_features: int, blocksize: int = 64, **scales: Any
) -> Tensor:
    """nf4_linear_dx; arguments as the op has them, already checked. W is expanded whole: a sum is rounded once."""
    rows, n, shape = math.prod(dy.shape[:-1]), dy.shape[-1], (*dy.shape[:-1], in_features)
    if 0 in (rows, n, in_features):
        return dy.new_zeros(shape)
    w = nf4_dequant.launch(packed, absmax, (n, in_features), dy.dtype, blocksize, **scales)
    return (dy.reshape(rows, n) @ w).reshape(shape)


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration for one row, the default for more rows and each kind of weight."""
    shipped = [e for gpu in _tuned.gpus() for op in ("nf4_gemv", "nf4_linear") for e in _tuned.table(op, gpu)]
    cases = [(config, 1, torch.bfloat16, False, False, 64) for config in _aot.configurations(SPACE, DEFAULT, [])]
    cases += [(DEFAULT, rows, torch.bfloat16, rows in (4, 16, 64), False, 64) for rows in (4, 8, 16, 32, 64, 128)]
    cases += [(DEFAULT, rows, torch.float16, True, True, size) for rows, size in ((1, 64), (128, 32), (8, 4096))]
    cases += [
        (e["config"], e["key"]["M"], getattr(torch, e["key"]["dtype"]), e["key"]["double_quant"], False, 64)
        for e in shipped if e["backend"] == "triton" and e["key"]["dtype"] != "float32"
    ]  # fmt: skip
    named: dict[str, _aot.Specialization] = {}
    for config, rows, dtype, double_quant, user_code, blocksize in cases:
        x = f"*{_TYPES[dtype]}"
        types = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if double_quant else "*fp32", "out_ptr": x}
        if double_quant:
            types |= dict.fromkeys(("absmax_code_ptr", "absmax_scale_ptr", "absmax_offset_ptr"), "*fp32")
        constants = {
            "BLOCKSIZE": blocksize, "ABSMAX_BLOCKSIZE": 256, "DOUBLE_QUANT": double_quant, "HAS_OFFSET": double_quant,
        }  # fmt: skip
        sizes = fit(config, rows, 4096, blocksize)
        product = {
            "TABLE": None if user_code else TABLES[dtype], "INVERSE": 1 / GAIN[dtype], "WHOLE": not double_quant,
            "SPLIT": False, "INTERPRET": False,
        }  # fmt: skip
        name = f"{x[1:]}{'-dq' * double_quant}{'-code' * user_code}-{blocksize}-{sizes}"
        more = dict.fromkeys(("M", "N", "K32", "tiles"), "i32") | ({"table_ptr": "*i32"} if user_code else {})
        more |= {"x_ptr": x, "bias_ptr": x}
        named[name] = _aot.Specialization(name, _product_kernel, types | more, constants | product, sizes)
    yield from named.values()
