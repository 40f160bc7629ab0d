"""attn_received in Triton: a program takes a head and up to BLOCK_G queries over all keys, a second one adds up heads.

Two numbers at batch 128, 16 heads, 7 queries, 320 keys, D 64, bf16: 84 MB, 28 us at 3.02 TB/s; 0.6 Gflop: bytes-bound.
The partial sums, one fp32 row of keys a program, are 3 % more bytes; atomics would make the order of sums vary.

Keys that fit one tile are read once; more are read twice, for the softmax's sum and then for the probabilities. That
tile is in two powers of two, 320 keys as 256 + 64: padded to 512 its shared memory left an SM three programs, not five,
to hide one another's loads.
Reached: bench/results/<gpu>/attn_received.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned
from .split_attn import LOG2_E, alignment, halves, load_rows

# TILE: elements of K in a program's tile, at most; a row of keys that fits takes one tile.
DEFAULT = {"TILE": 49152, "num_warps": 4, "num_stages": 1}
SPACE = [
    {"TILE": tile, "num_warps": warps, "num_stages": stages}
    for tile, warps, stages in ((49152, 8, 1), (49152, 2, 1), (16384, 4, 2), (8192, 4, 2), (4096, 4, 4))
]
_SUM_ROWS = 16
_RUNTIME = ["H", "G", "S", "q_b", "q_h", "q_g", "k_b", "k_h", "k_s", "mask_b", "mask_s"]


@triton.jit
def _scores(
    q0, q1, k_ptr, mask_ptr, start, S, k_stride, mask_stride, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """[BLOCK_G, BLOCK_S] in units of log 2; -inf for keys that take no part."""
    n = start + tl.arange(0, BLOCK_S)
    seen = n < S
    if mask_ptr is not None:
        seen = seen & (tl.load(mask_ptr + n * mask_stride, mask=seen, other=0) != 0)
    row = n.to(tl.int64)
    scores = tl.dot(q0, load_rows(k_ptr, row, k_stride, seen, D, 0, D0, True), input_precision="ieee")
    if D1 > 0:
        scores = tl.dot(q1, load_rows(k_ptr, row, k_stride, seen, D, D0, D1, True), scores, input_precision="ieee")
    return tl.where(seen[None, :], scores * factor, float("-inf"))


@triton.jit
def _probabilities(scores, m, total):
    """Their sum over the queries."""
    p = tl.exp2(scores - tl.where(m == float("-inf"), 0.0, m)[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.sum(p, axis=0)


@triton.jit(do_not_specialize=_RUNTIME)
def _received_kernel(
    q_ptr, k_ptr, mask_ptr, part_ptr,
    H, G, S, factor, q_b, q_h, q_g, k_b, k_h, k_s, mask_b, mask_s,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ONE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Strides of q and k are in units of UNIT elements. ONE: all keys lie in BLOCK_S + REST; else REST is 0."""
    tiles = tl.cdiv(G, BLOCK_G)
    program = tl.program_id(0)
    b, h = (program // tiles // H).to(tl.int64), (program // tiles % H).to(tl.int64)
    g = program % tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = g < G
    q_ptr += (b * q_b + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    part_ptr += program.to(tl.int64) * S
    q0 = load_rows(q_ptr, g.to(tl.int64), q_g * UNIT, inside, D, 0, D0, False)
    q1 = load_rows(q_ptr, g.to(tl.int64), q_g * UNIT, inside, D, D0, D1, False) if D1 > 0 else q0
    column = tl.arange(0, BLOCK_S)
    nobody = tl.where(inside, 0.0, float("inf"))  # queries beyond G, whose scores are 0: probabilities of 1 / inf
    if ONE:
        if REST > 0:
            others = _scores(q0, q1, k_ptr, mask_ptr, BLOCK_S, S, k_s * UNIT, mask_s, factor, D, D0, D1, REST)
        scores = _scores(q0, q1, k_ptr, mask_ptr, 0, S, k_s * UNIT, mask_s, factor, D, D0, D1, BLOCK_S)
        m = tl.max(scores, axis=1)
        if REST > 0:
            m = tl.maximum(m, tl.max(others, axis=1))
        base = tl.where(m == float("-inf"), 0.0, m)[:, None]
        total = tl.sum(tl.exp2(scores - base), axis=1) + nobody
        if REST > 0:
            total += tl.sum(tl.exp2(others - base), axis=1)
            rest = BLOCK_S + tl.arange(0, REST)
            tl.store(part_ptr + rest, _probabilities(others, m, total), mask=rest < S)
        tl.store(part_ptr + column, _probabilities(scores, m, total), mask=column < S)
    else:
        m = tl.where(inside, float("-inf"), 0.0)
        total = nobody
        for start in range(0, S, BLOCK_S):
            scores = _scores(q0, q1, k_ptr, mask_ptr, start, S, k_s * UNIT, mask_s, factor, D, D0, D1, BLOCK_S)
            higher = tl.maximum(m, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(m - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
            m = higher
        for start in range(0, S, BLOCK_S):
            scores = _scores(q0, q1, k_ptr, mask_ptr, start, S, k_s * UNIT, mask_s, factor, D, D0, D1, BLOCK_S)
            tl.store(part_ptr + start + column, _probabilities(scores, m, total), mask=start + column < S)


@triton.jit(do_not_specialize=["parts", "S"])
def _sum_kernel(part_ptr, out_ptr, parts, S, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[b, s] = the sum of part[b, :, s], ROWS of them at a time."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < parts)[:, None] & (s < S)[None, :]
        at = (b * parts + row)[:, None] * S + s[None, :]
        total += tl.sum(tl.load(part_ptr + at, mask=there, other=0.0), axis=0)
    tl.store(out_ptr + b * S + s, total, mask=s < S)


def fit(config: dict[str, Any], queries: int, keys: int, d: int, itemsize: int) -> dict[str, Any]:
    """Blocks for these sizes that registers and shared memory hold."""
    width = sum(halves(d))
    block_g = max(16, min(64, triton.next_power_of_2(queries)))
    tile, warps = config["TILE"], config["num_warps"]
    if itemsize == 4:  # exact products of fp32 take registers for both factors
        tile, block_g = min(tile, 2048 if width > 96 else 4096), 16
    block_s, rest = halves(keys)
    one = (block_s + rest) * width <= max(tile, 16 * width)
    if not one:
        block_s, rest = max(16, triton.next_power_of_2(tile // width + 1) // 2), 0
    while block_g > 16 and block_g * (block_s + rest) > 48 * 32 * warps:  # registers for scores
        block_g //= 2
    return {
        "BLOCK_G": block_g, "BLOCK_S": block_s, "REST": rest, "ONE": one,
        "num_warps": warps, "num_stages": config["num_stages"],
    }  # fmt: skip


def config_for(q: Tensor, keys: int) -> dict[str, Any]:
    """The tuned configuration for this query and number of keys."""
    key = (("dtype", str(q.dtype).removeprefix("torch.")), ("D", q.shape[3]))
    size = q.shape[0] * q.shape[1] * keys
    return _tuned.lookup("attn_received", q.device, key, max(size, 1).bit_length() - 1, tuple(DEFAULT.items()))


def launch(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """Run the kernels; arguments as the op has them, already checked."""
    (b, h, g, d), s = q.shape, k.shape[2]
    out = q.new_zeros(b, s, dtype=torch.float32) if h * g == 0 else q.new_empty(b, s, dtype=torch.float32)
    if h * g * out.numel() == 0:
        return out
    sizes = fit(config or config_for(q, s), g, s, d, q.element_size())
    parts = h * triton.cdiv(g, sizes["BLOCK_G"])
    part = out if parts == 1 else q.new_empty(b, parts, s, dtype=torch.float32)
    unit = alignment(q, k)
    strides = [size // unit for t in (q, k) for size in t.stride()[:3]]
    seen = None if mask is None else mask.expand(b, s).view(torch.uint8)
    d0, d1 = halves(d)
    with torch.cuda.device_of(q):
        _received_kernel[(b * parts,)](
            q, k, seen, part, h, g, s, (d**-0.5 if scale is None else scale) * LOG2_E,
            *strides, *((0, 0) if seen is None else seen.stride()), UNIT=unit, D=d, D0=d0, D1=d1, **sizes,
        )  # fmt: skip
        if parts > 1:
            _sum_kernel[(b, triton.cdiv(s, 64))](part, out, parts, s, ROWS=_SUM_ROWS, BLOCK=64, num_warps=4)
    return out


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration at D 64, the default at other widths and types, and keys that take several tiles."""
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("attn_received", gpu) if e["backend"] == "triton"]
    cases = [(config, 7, 320, 64, "bf16", True) for config in _aot.configurations(SPACE, DEFAULT, shipped)]
    cases += [(config, 7, 320, 80, "bf16", False) for config in _aot.configurations(SPACE, DEFAULT, shipped)]
    cases += [(DEFAULT, g, s, d, "fp16", True) for d in (64, 128, 256) for g, s in ((7, 320), (100, 4096))]
    cases += [(DEFAULT, g, s, d, "fp32", True) for d in (64, 80, 128, 256) for g, s in ((7, 320), (100, 16))]
    named: dict[str, _aot.Specialization] = {}
    for config, g, s, d, dtype, masked in cases:
        sizes = fit(config, g, s, d, 4 if dtype == "fp32" else 2)
        types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "part_ptr": "*fp32", "factor": "fp32"}
        types |= dict.fromkeys(_RUNTIME, "i32") | ({"mask_ptr": "*u8"} if masked else {})
        d0, d1 = halves(d)
        name = f"{dtype}-{d}{'-mask' * masked}-{sizes}"
        constants = {"UNIT": 8, "D": d, "D0": d0, "D1": d1}
        named[name] = _aot.Specialization(name, _received_kernel, types, constants, sizes)
    yield from named.values()
    sums = {"part_ptr": "*fp32", "out_ptr": "*fp32", "parts": "i32", "S": "i32"}
    yield _aot.Specialization("sum", _sum_kernel, sums, {"ROWS": _SUM_ROWS, "BLOCK": 64}, {"num_warps": 4})
