"""split_attn in Triton: one program a head and BLOCK_M queries, one online softmax over active and then cached keys.

Two numbers at batch 128, 16 heads, 64 queries, 64 + 256 keys, D 64, bf16: 202 MB, 67 us at 3.02 TB/s; 10.7 Gflop, 15 us
at 720 TFLOP/s. Bytes bind, so a head's keys go once through shared memory in tiles of BLOCK_N, several in flight, and a
slot that the mask leaves out is not loaded at all.

D is a power of two and a smaller one: 80 is 64 + 16, so that neither shared memory nor tensor cores carry padding.
Reached: bench/results/<gpu>/split_attn.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned

# Four programs an SM: 2048 of them (batch 128) are 3.9 rounds of an H100's, where three an SM would make 5.2.
DEFAULT = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}
SPACE = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in (
        (64, 32, 4, 3), (64, 32, 4, 5), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 8, 2), (64, 64, 8, 3),
        (32, 64, 4, 3), (32, 32, 2, 4), (128, 64, 8, 3),
    )
]  # fmt: skip
LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(ptr, row, stride, inside, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr):
    """[rows, WIDTH] of elements FIRST on, or its transpose where T; 0 where not `inside`, and nothing read there."""
    column = FIRST + tl.arange(0, WIDTH)
    if T:
        there = inside[None, :]
        if D < FIRST + WIDTH:
            there = there & (column < D)[:, None]
        return tl.load(ptr + row[None, :] * stride + column[:, None], mask=there, other=0.0)
    else:
        there = inside[:, None]
        if D < FIRST + WIDTH:
            there = there & (column < D)[None, :]
        return tl.load(ptr + row[:, None] * stride + column[None, :], mask=there, other=0.0)


@triton.jit
def store_rows(ptr, row, inside, values, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Elements FIRST on of rows that start at `row`."""
    column = FIRST + tl.arange(0, WIDTH)
    there = inside[:, None]
    if D < FIRST + WIDTH:
        there = there & (column < D)[None, :]
    tl.store(ptr + row[:, None] + column[None, :], values.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def _attend(
    state, q0, q1, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, mask_stride, N, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take N keys into `state`: the maximum of the scores in units of log 2, the sum, and the rows of out so far."""
    m, total, acc0, acc1 = state
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < N
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + n * mask_stride, mask=seen, other=0) != 0)
        row = n.to(tl.int64)
        scores = tl.dot(q0, load_rows(k_ptr, row, k_stride, seen, D, 0, D0, True), input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_ptr, row, k_stride, seen, D, D0, D1, True)
            scores = tl.dot(q1, k1, scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * factor, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # while nothing was seen
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(m - base)
        m = higher
        total = total * shrink + tl.sum(p, axis=1)
        p = p.to(v_ptr.dtype.element_ty)
        v0 = load_rows(v_ptr, row, v_stride, seen, D, 0, D0, False)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = load_rows(v_ptr, row, v_stride, seen, D, D0, D1, False)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return m, total, acc0, acc1


_RUNTIME = ["H", "A", "NA", "NC", "mask_b", "mask_h", "mask_n"]
_RUNTIME += [f"{tensor}_{of}" for tensor, rows in (("q", "a"), ("ka", "n"), ("va", "n"), ("kc", "n"), ("vc", "n"))
             for of in ("b", "h", rows)]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _split_kernel(
    q_ptr, ka_ptr, va_ptr, kc_ptr, vc_ptr, mask_ptr, out_ptr, lse_ptr,
    H, A, NA, NC, factor,
    q_b, q_h, q_a, ka_b, ka_h, ka_n, va_b, va_h, va_n, kc_b, kc_h, kc_n, vc_b, vc_h, vc_n, mask_b, mask_h, mask_n,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Strides of the five tensors are in units of UNIT elements, so that the compiler knows how rows are aligned."""
    tiles = tl.cdiv(A, BLOCK_M)
    program = tl.program_id(0)
    a = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // tiles % H
    batch = program // tiles // H
    b, h = batch.to(tl.int64), head.to(tl.int64)
    bu, hu = b * UNIT, h * UNIT
    inside = a < A
    q_ptr += bu * q_b + hu * q_h
    q0 = load_rows(q_ptr, a.to(tl.int64), q_a * UNIT, inside, D, 0, D0, False)
    if D1 > 0:
        q1 = load_rows(q_ptr, a.to(tl.int64), q_a * UNIT, inside, D, D0, D1, False)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    else:
        q1 = q0
        acc1 = 0.0
    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, D0), tl.float32), acc1,
    )  # fmt: skip
    state = _attend(
        state, q0, q1, ka_ptr + bu * ka_b + hu * ka_h, va_ptr + bu * va_b + hu * va_h, None,
        ka_n * UNIT, va_n * UNIT, 0, NA, factor, D, D0, D1, BLOCK_N,
    )  # fmt: skip
    m, total, acc0, acc1 = _attend(
        state, q0, q1, kc_ptr + bu * kc_b + hu * kc_h, vc_ptr + bu * vc_b + hu * vc_h,
        None if mask_ptr is None else mask_ptr + b * mask_b + h * mask_h,
        kc_n * UNIT, vc_n * UNIT, mask_n, NC, factor, D, D0, D1, BLOCK_N,
    )  # fmt: skip
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), m * _LN_2 + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + (b * H + h) * A + a, lse, mask=inside)
    row = ((b * A + a) * H + h) * D  # of out, which lies as [B, A, H, D]
    store_rows(out_ptr, row, inside, acc0 * inverse[:, None], D, 0, D0)
    if D1 > 0:
        store_rows(out_ptr, row, inside, acc1 * inverse[:, None], D, D0, D1)


def alignment(*tensors: Tensor) -> int:
    """8 where all rows of [B, H, rows, D] tensors start at multiples of 8 elements, else 1."""
    aligned = all(
        t.data_ptr() % (8 * t.element_size()) == 0 and all(size % 8 == 0 for size in t.stride()[:3]) for t in tensors
    )
    return 8 if aligned else 1


def halves(d: int) -> tuple[int, int]:
    """(D0, D1), powers of two of at least 16, or D1 = 0, that hold a row of d elements with the least padding."""
    whole = max(16, triton.next_power_of_2(d))
    half = whole // 2
    if half < 16 or half >= d:
        return whole, 0
    rest = max(16, triton.next_power_of_2(d - half))
    return (half, rest) if half + rest < whole else (whole, 0)


def fit(config: dict[str, Any], rows: int, d: int, itemsize: int) -> dict[str, Any]:
    """`config` as far as registers and shared memory hold it, and no more queries than there are."""
    width = sum(halves(d))
    m, n, warps, stages = (config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    m = max(16, min(m, triton.next_power_of_2(rows)))
    if width > 128:
        n, warps = min(n, 32), 8
    if itemsize == 4:  # exact products of fp32 take registers for both factors
        m, n, stages = (min(m, 32), min(n, 32), 2) if width <= 96 else (16, 16, 2)
    while m * width > 64 * 32 * warps:
        m, warps = (m, warps * 2) if warps < 8 else (m // 2, warps)
    while n > 16 and 2 * n * width * itemsize * stages > 120 << 10:
        n, stages = (n, stages - 1) if stages > 2 else (n // 2, stages)
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def config_for(q: Tensor, keys: int) -> dict[str, Any]:
    """The tuned configuration for this query and number of keys."""
    key = (("dtype", str(q.dtype).removeprefix("torch.")), ("D", q.shape[3]))
    size = q.shape[0] * q.shape[1] * keys
    return _tuned.lookup("split_attn", q.device, key, max(size, 1).bit_length() - 1, tuple(DEFAULT.items()))


def launch(
    q: Tensor,
    k_active: Tensor,
    v_active: Tensor,
    k_cached: Tensor,
    v_cached: Tensor,
    *,
    cached_mask: Tensor | None = None,
    scale: float | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as the op has them, already checked."""
    b, h, a, d = q.shape
    out, lse = q.new_empty(b, a, h, d), q.new_empty(b, h, a, dtype=torch.float32)
    if lse.numel() == 0:
        return out.transpose(1, 2), lse
    active, cached = k_active.shape[2], k_cached.shape[2]
    sizes = fit(config or config_for(q, active + cached), a, d, q.element_size())
    mask, mask_strides = None, (0, 0, 0)
    if cached_mask is not None and cached:
        mask = cached_mask.view(torch.uint8)
        mask_strides = (mask.stride(0), mask.stride(1) if mask.dim() == 3 else 0, mask.stride(-1))
    tensors = (q, k_active, v_active, k_cached, v_cached)
    unit = alignment(*tensors)
    strides = [size // unit for t in tensors for size in t.stride()[:3]]
    d0, d1 = halves(d)
    with torch.cuda.device_of(q):
        _split_kernel[(triton.cdiv(a, sizes["BLOCK_M"]) * b * h,)](
            *tensors, mask, out, lse, h, a, active, cached, (d**-0.5 if scale is None else scale) * LOG2_E,
            *strides, *mask_strides, UNIT=unit, D=d, D0=d0, D1=d1, **sizes,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration at D 64, and the default at other widths and types, with a mask and without."""
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("split_attn", gpu) if e["backend"] == "triton"]
    cases = [(config, 64, "bf16", True) for config in _aot.configurations(SPACE, DEFAULT, shipped)]
    cases += [(config, 80, "bf16", True) for config in _aot.configurations(SPACE, DEFAULT, shipped)]
    cases += [(DEFAULT, d, "fp16", masked) for d in (16, 96, 128, 256) for masked in (False, True)]
    cases += [(DEFAULT, d, "fp32", True) for d in (64, 80, 128, 256)]
    named: dict[str, _aot.Specialization] = {}
    for config, d, dtype, masked in cases:
        sizes = fit(config, 64, d, 4 if dtype == "fp32" else 2)
        tensors = {f"{name}_ptr": f"*{dtype}" for name in ("q", "ka", "va", "kc", "vc", "out")}
        types = {**tensors, "lse_ptr": "*fp32", "factor": "fp32", **dict.fromkeys(_RUNTIME, "i32")}
        if masked:
            types["mask_ptr"] = "*u8"
        d0, d1 = halves(d)
        name = f"{dtype}-{d}{'-mask' * masked}-{sizes}"
        named[name] = _aot.Specialization(name, _split_kernel, types, {"UNIT": 8, "D": d, "D0": d0, "D1": d1}, sizes)
    yield from named.values()
