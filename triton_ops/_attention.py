"""What the attention kernels share: a tile of query rows against a range of keys, by online softmax.

A tile has BLOCK_M rows of one KV head: row i is query head i % GROUP of new row i // GROUP, so a key is read once for
the whole group. D comes in two pieces, D0 and D1, each a power of two, so that D 80 (64 + 16) and 96 (64 + 32) pay for
no padding. Scores are kept in units of log2: softmax(z) = 2^(z log2(e) - m) / total. Strides are in units of ALIGN
elements, which tells the compiler how far vectors may reach whatever the strides are; ALIKE: keys and values have the
same.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Within 2 ulp everywhere: near 0 by a polynomial (fitted by least squares), where 1 - 2 / (e^2x + 1) cancels."""
    s = x * x
    near = (((-0.00570329 * s + 0.02063721) * s - 0.05373897) * s + 0.1333143) * s - 0.33333281
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    return tl.where(size < 0.625, x + x * (s * near), tl.where(x < 0, -far, far))


@triton.jit
def _popcount(bits):
    """How many bits of each int64 are set."""
    x = bits.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 127).to(tl.int32)


@triton.jit
def _load(ptr, row, d, there, MASKED: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, d] at ptr + row + d; 0 beyond D (where d is not WHOLE) and, if MASKED, where not `there`."""
    at = ptr + row[:, None] + d[None, :]
    if MASKED and WHOLE:
        return tl.load(at, mask=there[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _seen(
    key, place, low, high, prefix, length, window, tree_ptr, T, TREE: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: which keys each row sees. Rows that are not there see anything: nobody asks them."""
    key_place = key
    if TREE:
        node = key - prefix
        half = tl.where((node < 32)[None, :], low[:, None], high[:, None])
        seen = ((node < 0)[None, :] | (((half >> (node & 31)[None, :]) & 1) != 0)) & (key < length)[None, :]
        if WINDOW:
            new = (node >= 0) & (node < T)
            mask = tl.load(tree_ptr + node, mask=new, other=0)
            mask |= tl.full(node.shape, 1, tl.int64) << tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)
            key_place = tl.where(new, prefix + _popcount(mask) - 1, key)
    else:
        seen = (key[None, :] <= place[:, None]) & (key < length)[None, :]
    if WINDOW:
        seen &= key_place[None, :] > (place - window)[:, None]
    return seen


@triton.jit
def _step(
    q0, q1, acc0, acc1, m, total, start, place, low, high,
    k_ptr, v_ptr, table_ptr, tree_ptr, stride_ks, stride_kp, stride_vs, stride_vp,
    prefix, length, window, pages, T, scale, cap_in, cap_out,
    MASKED: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr,
    ALIKE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys start … start + BLOCK_N - 1; all rows see all of them unless MASKED (or their page does not exist)."""
    start += tl.zeros((), tl.int32)  # the interpreter counts in Python's integers
    n = tl.arange(0, BLOCK_N)
    key = start + n
    there = key < length
    if PAGE > 0:
        page = tl.load(table_ptr + key // PAGE, mask=there, other=-1)
        there = (page >= 0) & (page < pages)
        page = page.to(tl.int64)
        slot = (key % PAGE).to(tl.int64)
        k_row = (page * stride_kp + slot * stride_ks) * ALIGN
        v_row = k_row if ALIKE else (page * stride_vp + slot * stride_vs) * ALIGN
    else:
        k_ptr += start.to(tl.int64) * (stride_ks * ALIGN)
        v_ptr += start.to(tl.int64) * (stride_vs * ALIGN)
        k_row = n.to(tl.int64) * (stride_ks * ALIGN)
        v_row = k_row if ALIKE else n.to(tl.int64) * (stride_vs * ALIGN)
    CAREFUL: tl.constexpr = MASKED or PAGE > 0
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)

    k = _load(k_ptr, k_row, d0, there, CAREFUL, D, D0 <= D)
    z = tl.dot(q0, tl.trans(k), input_precision="ieee")
    if D1 > 0:
        k = _load(k_ptr, k_row, d1, there, CAREFUL, D, D0 + D1 <= D)
        z = tl.dot(q1, tl.trans(k), z, input_precision="ieee")
    if SOFTCAP:
        z = _tanh(z * cap_in)
        scale = cap_out
    if MASKED:
        seen = _seen(key, place, low, high, prefix, length, window, tree_ptr, T, TREE, WINDOW)
        if PAGE > 0:
            seen &= there[None, :]
        z = tl.where(seen, z, float("-inf"))
    elif PAGE > 0:
        z = tl.where(there[None, :], z, float("-inf"))

    top = tl.maximum(m, tl.max(z, 1) * scale)
    base = tl.where(top == float("-inf"), 0.0, top) if CAREFUL else top  # rows that have seen no key yet
    p = tl.exp2(z * scale - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(q0.dtype)
    v = _load(v_ptr, v_row, d0, there, CAREFUL, D, D0 <= D)
    acc0 = tl.dot(p, v, acc0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        v = _load(v_ptr, v_row, d1, there, CAREFUL, D, D0 + D1 <= D)
        acc1 = tl.dot(p, v, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, top, total


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, table_ptr, tree_ptr,
    stride_qt, stride_qh, stride_ks, stride_kp, stride_vs, stride_vp,
    first_row, new, prefix, length, window, pages, T, scale, cap_in, cap_out, first, whole, whole_end, last,
    TREE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, PAGE: tl.constexpr,
    ONE_LOOP: tl.constexpr, ALIKE: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(acc0, acc1, m, total) of rows first_row … over the blocks of keys first … last - 1.

    Pointers are those of a sequence and KV head (of the KV head alone where there are pages). From block `whole` to
    `whole_end` all rows see all keys; ONE_LOOP masks these too, which costs little where rows are few.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    t = row // GROUP
    there = t < new
    q_row = (t.to(tl.int64) * stride_qt + (row % GROUP).to(tl.int64) * stride_qh) * ALIGN
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)
    q0 = _load(q_ptr, q_row, d0, there, True, D, D0 <= D)
    q1 = q0
    if D1 > 0:
        q1 = _load(q_ptr, q_row, d1, there, True, D, D0 + D1 <= D)
    if NEGATIVE:
        q0, q1 = -q0, -q1
    place, low, high = prefix + t, t, t
    if TREE:
        bits = tl.load(tree_ptr + t, mask=there, other=0) | (tl.full(t.shape, 1, tl.int64) << (t & 63).to(tl.int64))
        low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        if WINDOW:
            place = prefix + _popcount(bits) - 1

    acc0, acc1 = tl.zeros((BLOCK_M, D0), tl.float32), tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    m, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if ONE_LOOP:
        for block in tl.range(first, last):
            acc0, acc1, m, total = _step(
                q0, q1, acc0, acc1, m, total, block * BLOCK_N, place, low, high,
                k_ptr, v_ptr, table_ptr, tree_ptr, stride_ks, stride_kp, stride_vs, stride_vp,
                prefix, length, window, pages, T, scale, cap_in, cap_out,
                True, TREE, WINDOW, SOFTCAP, PAGE, ALIKE, ALIGN, D, D0, D1, BLOCK_N,
            )  # fmt: skip
    else:
        if WINDOW:
            for block in tl.range(first, tl.minimum(whole, last), num_stages=2):
                acc0, acc1, m, total = _step(
                    q0, q1, acc0, acc1, m, total, block * BLOCK_N, place, low, high,
                    k_ptr, v_ptr, table_ptr, tree_ptr, stride_ks, stride_kp, stride_vs, stride_vp,
                    prefix, length, window, pages, T, scale, cap_in, cap_out,
                    True, TREE, WINDOW, SOFTCAP, PAGE, ALIKE, ALIGN, D, D0, D1, BLOCK_N,
                )  # fmt: skip
        for block in tl.range(tl.maximum(first, whole), tl.minimum(whole_end, last)):
            acc0, acc1, m, total = _step(
                q0, q1, acc0, acc1, m, total, block * BLOCK_N, place, low, high,
                k_ptr, v_ptr, table_ptr, tree_ptr, stride_ks, stride_kp, stride_vs, stride_vp,
                prefix, length, window, pages, T, scale, cap_in, cap_out,
                False, TREE, WINDOW, SOFTCAP, PAGE, ALIKE, ALIGN, D, D0, D1, BLOCK_N,
            )  # fmt: skip
        for block in tl.range(tl.maximum(tl.maximum(first, whole), whole_end), last, num_stages=2):
            acc0, acc1, m, total = _step(
                q0, q1, acc0, acc1, m, total, block * BLOCK_N, place, low, high,
                k_ptr, v_ptr, table_ptr, tree_ptr, stride_ks, stride_kp, stride_vs, stride_vp,
                prefix, length, window, pages, T, scale, cap_in, cap_out,
                True, TREE, WINDOW, SOFTCAP, PAGE, ALIKE, ALIGN, D, D0, D1, BLOCK_N,
            )  # fmt: skip
    return acc0, acc1, m, total


@triton.jit
def store_rows(ptr, row, acc0, acc1, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both pieces of D at ptr + row, in ptr's type."""
    d = tl.arange(0, D0)
    whole = mask[:, None] if D0 <= D else mask[:, None] & (d < D)[None, :]
    tl.store(ptr + row[:, None] + d[None, :], acc0.to(ptr.dtype.element_ty), mask=whole)
    if D1 > 0:
        d = D0 + tl.arange(0, D1)
        whole = mask[:, None] if D0 + D1 <= D else mask[:, None] & (d < D)[None, :]
        tl.store(ptr + row[:, None] + d[None, :], acc1.to(ptr.dtype.element_ty), mask=whole)


@triton.jit
def finish(acc0, acc1, m, total, there):
    """(out0, out1, natural log-sum-exp); 0 and -inf for rows that saw no key or are not `there`."""
    empty = (total == 0.0) | (there == 0)
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    return tl.where(empty[:, None], 0.0, acc0 * share), tl.where(empty[:, None], 0.0, acc1 * share), lse


def power_of_two(n: int) -> int:
    """The least that is at least n; Triton's own costs a microsecond."""
    return 1 << (n - 1).bit_length()


def pieces(d: int) -> tuple[int, int]:
    """(D0, D1), powers of two that hold D: one piece where two would not be smaller."""
    whole = max(16, power_of_two(d))
    first = whole // 2
    second = max(16, power_of_two(max(d - first, 1)))
    return (first, second) if first >= 16 and first < d and second < first else (whole, 0)


def fit(
    config: dict[str, Any],
    most_rows: int,
    d: int,
    itemsize: int,
    paged: bool,
    vectors: bool = True,
    masks: bool = False,
) -> dict[str, Any]:
    """The sizes nearest to `config` that suit a tile of so many rows and heads of `d`: registers for all it holds.

    vectors: the strides allow them; masks: those of a tree's window.
    """
    width = sum(pieces(d))
    block_m, block_n, warps = min(config["BLOCK_M"], most_rows, 16384 // power_of_two(width)), config["BLOCK_N"], 4
    block_m = max(16, block_m)
    if itemsize == 4:  # no tensor cores: operands of a product lie in registers whole
        block_m, block_n = 16, 16
    else:
        narrow = width <= 128 and block_m * (width + 2 * block_n) <= 12288
        warps = max(config["num_warps"], min(4 if narrow else 8, power_of_two(block_m * width // 1024)))
    if not vectors:  # an address each element
        block_n = min(block_n, 32 if width <= 64 else 16)
    while block_m * block_n * (1 + (paged or masks)) > (8192 if width <= 128 else 2048):
        block_n //= 2
    stages = config["num_stages"]
    while block_n > 16 and (stages - 1) * block_n * width * itemsize > 64 << 10:  # of keys, and as much of values
        stages, block_n = (stages - 1, block_n) if stages > 3 else (stages, block_n // 2)
    if paged:  # entries of the table are under way as long as keys
        stages = 2 * stages - 1
        while block_n > 16 and 2 * (stages - 1) * block_n * width * itemsize > 200 << 10:
            block_n //= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def alignment(*tensors: Tensor) -> int:
    """The elements of 16 bytes if all strides are multiples of that, else 1."""
    vector = 16 // tensors[0].element_size()
    return 1 if math.gcd(vector, *(s for t in tensors for s in t.stride()[:-1])) < vector else vector


@functools.lru_cache(256)
def scales(scale: float | None, softcap: float | None, d: int) -> dict[str, Any]:
    """What the kernels know of scores and the pieces of D; a negative scale is that of -q."""
    scale = d**-0.5 if scale is None else scale
    size = max(abs(scale), 1e-30)  # with 0 itself, a masked score would be NaN
    cap = 1.0 if softcap is None else softcap
    return {
        "scale": size * LOG2E, "cap_in": size / cap, "cap_out": cap * LOG2E,
        "SOFTCAP": softcap is not None, "NEGATIVE": scale < 0, "D0": pieces(d)[0], "D1": pieces(d)[1],
    }  # fmt: skip


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; the interpreter plays a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def caches(k: Tensor, v: Tensor, block_table: Tensor | None, align: int) -> tuple[dict[str, int], int, int, int]:
    """(strides by name, KV heads, capacity of a sequence, rows a page or 0)."""
    (kp, k1, k2, _), (vp, v1, v2, _) = k.stride(), v.stride()
    if block_table is None:
        names = {"stride_kb": kp, "stride_kh": k1, "stride_ks": k2, "stride_vb": vp, "stride_vh": v1, "stride_vs": v2}
        heads, capacity, page = k.shape[1], k.shape[2], 0
    else:  # a page takes the place of a sequence
        names = {"stride_kb": kp, "stride_ks": k1, "stride_kh": k2, "stride_vb": vp, "stride_vs": v1, "stride_vh": v2}
        heads, capacity, page = k.shape[2], block_table.shape[1] * k.shape[1], k.shape[1]
    return {name: s // align for name, s in names.items()}, heads, min(capacity, 2**31 - 1), page


def whole_table(block_table: Tensor | None) -> Tensor | None:
    """Rows of the table without gaps between their entries."""
    return block_table if block_table is None or block_table.stride(1) == 1 else block_table.contiguous()


def log2(size: int) -> int:
    """Of a size in a tuned table."""
    return max(size, 1).bit_length() - 1
