"""kv_recompute in Triton: x @ [w_k; w_v]^T with bias, norm and rotation on the sums, straight into the caches.

Two numbers at B 32, L 512, H 4096, 32 heads of 128, bf16: 1.10 Tflop, 1.54 ms at 716 TFLOP/s (measured on an H100);
470 MB (134 of x, 67 of weights, 268 written), 0.16 ms: flops bind.

A program makes BLOCK_M rows of BLOCK_N columns of K and of the same ones of V, so a tile of x is loaded once for both,
and two sums of 128 x 128 fill the registers of 8 warps as one of 128 x 256 would. Programs run along BLOCK_M first,
GROUP_M tiles of them, so that those of one wave share what the L2 cache holds. On sm_90 tiles of x and of the weights
come through tensor descriptors (TMA) straight to where wgmma reads them, num_stages of them at a time; elsewhere, and
where rows start at no multiple of 16 bytes, through pointers.

Where K is normed or rotated a tile has whole heads, padded to a power of two (a descriptor's box reaches beyond the
head and reads zeros); else columns are taken as they come. A rotation needs element i and its partner in one thread:
pairs are split from each other by a reshape where partners lie next to each other or a power of two apart. The halves
of a head that is rotated whole are padded each for itself, so theirs always do; other partners (24 of 96) come by a
gather through shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _aot, _tuned
from ._attention import TYPES, alignment, log2, multiprocessors
from .kv_append import _pages, _row_offsets, _strides

DEFAULT = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 16, "num_warps": 8, "num_stages": 4}
SPACE = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}
    for m, n, k, group, warps, stages in (
        (128, 128, 64, 8, 8, 4), (128, 128, 64, 16, 8, 3), (128, 128, 32, 16, 8, 6), (128, 64, 64, 16, 4, 3),
        (128, 64, 64, 16, 8, 4), (256, 64, 64, 8, 8, 4), (64, 128, 64, 32, 4, 4), (64, 128, 64, 32, 8, 4),
    )
]  # fmt: skip
STAGE_BYTES = 216 << 10  # of shared memory for tiles under TMA, and
POINTER_STAGE_BYTES = 144 << 10  # without it: what sm_80 has

_SCALARS = (
    "start", "batch", "rows", "inner", "tiles", "strips", "hidden", "heads", "n_blocks", "capacity", "table_row",
    "table_column", "x_batch", "x_row", "w_k_row", "w_v_row", "cos_row", "sin_row",
    "k_outer", "k_head", "k_row", "v_outer", "v_head", "v_row",
)  # fmt: skip


@triton.jit
def _sequence_and_row(m, batch, rows, TOKEN_MAJOR: tl.constexpr):
    """Those of row m of all, which come sequence by sequence or token by token."""
    if TOKEN_MAJOR:
        row = m // batch
        sequence = m - row * batch
    else:
        sequence = m // rows
        row = m - sequence * rows
    return sequence.to(tl.int64), row


@triton.jit
def _biased(acc, bias_ptr, n, there):
    """A sum with a bias of its columns."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _normed(
    acc, norm_ptr, eps, D: tl.constexpr, HEAD: tl.constexpr, PART: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """An RMS norm of each HEAD columns, of which D are the head's and the rest zeros."""
    y = tl.reshape(acc, (BLOCK_M, BLOCK_N // HEAD, HEAD))
    r = tl.rsqrt(tl.sum(y * y, 2) / D + eps)
    c = tl.arange(0, HEAD)
    weight = tl.load(norm_ptr + c // PAD * PART + c % PAD, mask=c % PAD < PART, other=0.0).to(tl.float32)
    return tl.reshape(y * r[:, :, None] * weight[None, None, :], (BLOCK_M, BLOCK_N))


@triton.jit
def _angles(cos_ptr, sin_ptr, cos_row, sin_row, row, pair, there):
    """cos and sin of `pair` for each row; 1 and 0 where there is no rotation."""
    cos = tl.load(cos_ptr + row * cos_row + pair, mask=there, other=1.0).to(tl.float32)
    return cos, tl.load(sin_ptr + row * sin_row + pair, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rotated(
    acc, cos_ptr, sin_ptr, cos_row, sin_row, row, found, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first 2 HALF elements of each head turned by the angles of row `row`."""
    if INTERLEAVED or HEAD > PAD or (HALF & (HALF - 1)) == 0:
        # Columns as groups of 2 PAIRS, of which the first ones of a head turn.
        PAIRS: tl.constexpr = HEAD // 2 if INTERLEAVED else PAD if HEAD > PAD else HALF
        GROUPS: tl.constexpr = BLOCK_N // (2 * PAIRS)
        if INTERLEAVED:
            first, second = tl.split(tl.reshape(acc, (BLOCK_M, GROUPS, PAIRS, 2)))
        else:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, GROUPS, 2, PAIRS)), (0, 1, 3, 2))
            first, second = tl.split(halves)
        pair = tl.arange(0, PAIRS)
        turns = (tl.arange(0, GROUPS) % (HEAD // (2 * PAIRS)) == 0)[None, :, None]
        there = (found[:, None] & (pair < HALF)[None, :])[:, None, :] & turns
        cos, sin = _angles(
            cos_ptr, sin_ptr, cos_row, sin_row, row[:, None, None], pair[None, None, :], there
        )  # fmt: skip
        joined = tl.join(first * cos - second * sin, second * cos + first * sin)
        if not INTERLEAVED:
            joined = tl.permute(joined, (0, 1, 3, 2))
        return tl.reshape(joined, (BLOCK_M, BLOCK_N))
    else:
        j = tl.arange(0, BLOCK_N)
        d = j % HEAD
        turns = d < 2 * HALF
        partner = tl.where(turns, tl.where(d < HALF, j + HALF, j - HALF), j)
        other = tl.gather(acc, tl.broadcast_to(partner[None, :], (BLOCK_M, BLOCK_N)), 1)
        there = found[:, None] & turns[None, :]
        cos, sin = _angles(cos_ptr, sin_ptr, cos_row, sin_row, row[:, None], (d % HALF)[None, :], there)
        return acc * cos + other * tl.where((d < HALF)[None, :], -sin, sin)


@triton.jit(do_not_specialize=_SCALARS)
def _recompute_kernel(
    x_ptr, w_k_ptr, w_v_ptr, b_k_ptr, b_v_ptr, norm_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, table_ptr, eps,
    start, batch, rows, inner, tiles, strips, hidden, heads, n_blocks, capacity, table_row, table_column,
    x_batch, x_row, w_k_row, w_v_row, cos_row, sin_row, k_outer, k_head, k_row, v_outer, v_head, v_row,
    D: tl.constexpr, HEAD: tl.constexpr, PART: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, TOKEN_MAJOR: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr,
    CACHE_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x is [outer, inner, H], of `tiles` tiles in all; TOKEN_MAJOR: its rows are those of one token, then of the next.

    A head is HEAD columns of a tile, parts of PAD columns of which the first PART are the head's; HEAD is 0 where
    columns are taken as they come. Strides and `hidden` are in units of ALIGN, those of the caches of CACHE_ALIGN.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP_M * strips)
    tall = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    rest = pid - group * GROUP_M * strips
    tile, strip = group * GROUP_M + rest % tall, rest // tall
    inner_tiles = tl.cdiv(inner, BLOCK_M)
    outer = tile // inner_tiles
    m0 = (tile - outer * inner_tiles) * BLOCK_M
    j = tl.arange(0, BLOCK_N)
    if HEAD > 0:
        head, d = strip * (BLOCK_N // HEAD) + j // HEAD, j % HEAD // PAD * PART + j % PAD
        box_part, box_column = strip * (BLOCK_N // PAD), 0
        column_there = (head < heads) & (j % PAD < PART)
    else:
        n = strip * BLOCK_N + j
        head, d = n // D, n % D
        box_part, box_column = 0, strip * BLOCK_N
        column_there = head < heads
    n = head * D + d
    m = m0 + tl.arange(0, BLOCK_M)
    found = (m < inner) & (m >= 0)  # the last tile's may pass 2^31
    hidden *= ALIGN

    k_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    v_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for i in range(0, hidden, BLOCK_K):
            x = tl.reshape(x_ptr.load([outer, m0, i]), (BLOCK_M, BLOCK_K))
            w_k = tl.reshape(w_k_ptr.load([box_part, box_column, i]), (BLOCK_N, BLOCK_K))
            w_v = tl.reshape(w_v_ptr.load([box_part, box_column, i]), (BLOCK_N, BLOCK_K))
            k_acc = tl.dot(x, w_k.T, k_acc, input_precision=PRECISION)
            v_acc = tl.dot(x, w_v.T, v_acc, input_precision=PRECISION)
    else:
        step = tl.arange(0, BLOCK_K)
        sequence, row = _sequence_and_row(m, batch, rows, TOKEN_MAJOR)
        x_row_at = tl.where(found, sequence * x_batch + row.to(tl.int64) * x_row, 0)
        column = tl.minimum(n, heads * D - 1).to(tl.int64)  # sums of others are never stored
        x_at = x_ptr + (x_row_at * ALIGN)[:, None] + step[None, :]
        w_k_at = w_k_ptr + (column * w_k_row * ALIGN)[:, None] + step[None, :]
        w_v_at = w_v_ptr + (column * w_v_row * ALIGN)[:, None] + step[None, :]
        for i in range(0, hidden, BLOCK_K):
            there = (i + step < hidden)[None, :]
            x = tl.load(x_at, mask=there, other=0.0)
            w_k = tl.load(w_k_at, mask=there, other=0.0)
            w_v = tl.load(w_v_at, mask=there, other=0.0)
            k_acc = tl.dot(x, w_k.T, k_acc, input_precision=PRECISION)
            v_acc = tl.dot(x, w_v.T, v_acc, input_precision=PRECISION)
            x_at += BLOCK_K
            w_k_at += BLOCK_K
            w_v_at += BLOCK_K

    sequence, row = _sequence_and_row(outer * inner + m, batch, rows, TOKEN_MAJOR)
    position = start.to(tl.int64) + row
    v_to, there = _row_offsets(
        table_ptr, sequence, 0, position, found, n_blocks, capacity, table_row, table_column,
        v_outer, v_head, v_row, PAGE,
    )  # fmt: skip
    k_to, there = _row_offsets(
        table_ptr, sequence, 0, position, found, n_blocks, capacity, table_row, table_column,
        k_outer, k_head, k_row, PAGE,
    )  # fmt: skip
    mask = there[:, None] & column_there[None, :]
    head = head.to(tl.int64)
    v_acc = _biased(v_acc, b_v_ptr, n, column_there).to(v_ptr.dtype.element_ty)
    tl.store(v_ptr + (v_to * CACHE_ALIGN)[:, None] + (head * v_head * CACHE_ALIGN + d)[None, :], v_acc, mask=mask)
    k_acc = _biased(k_acc, b_k_ptr, n, column_there)
    if norm_ptr is not None:
        if HEAD > D and not TMA:
            k_acc = tl.where(column_there[None, :], k_acc, 0.0)
        k_acc = _normed(k_acc, norm_ptr, eps, D, HEAD, PART, PAD, BLOCK_M, BLOCK_N)
    if HALF > 0:
        k_acc = _rotated(
            k_acc, cos_ptr, sin_ptr, cos_row, sin_row, row, found, HALF, INTERLEAVED, HEAD, PAD, BLOCK_M, BLOCK_N
        )  # fmt: skip
    k_acc = k_acc.to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + (k_to * CACHE_ALIGN)[:, None] + (head * k_head * CACHE_ALIGN + d)[None, :], k_acc, mask=mask)


def head_columns(dim: int, half: int, interleaved: bool, norm: bool) -> dict[str, int]:
    """HEAD, PART and PAD of the kernel."""
    if not half and not norm:
        return {"HEAD": 0, "PART": dim, "PAD": dim}
    parts = 2 if 2 * half == dim and not interleaved else 1
    pad = triton.next_power_of_2(dim // parts)
    return {"HEAD": parts * pad, "PART": dim // parts, "PAD": pad}


def fit(
    config: dict[str, Any],
    rows: int,
    columns: int,
    head: int,
    itemsize: int,
    *,
    tma: bool,
    spare: int = 1,
    programs: int = 1,
) -> dict[str, Any]:
    """The sizes nearest to `config` that suit this many rows of x and columns of K, and make `programs` programs.

    `head`: columns that a head takes where a tile has whole heads, else 0. `spare`: how many times smaller a tile must
    be where the kernel needs registers for more than its sums.
    """
    m, n, k, warps = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"], config["num_warps"]
    most = 2048 // spare  # elements of K that a warp has the registers for
    if itemsize == 4:  # no tensor cores: operands are in registers too
        k, most = 16, 256
    elif spare > 2 or head > 256:
        k, most = 32, min(most, 1024)
    power = triton.next_power_of_2
    m, n = min(m, max(16, power(rows))), max(head, min(n, max(16, power(columns))))
    warps = warps if most == 2048 else 8
    while n * m > most * warps and (m > 16 or n > max(head, 32)):
        m, n = (m, n // 2) if n > max(head, 32) and n >= m else (m // 2, n)
    while triton.cdiv(rows, m) * triton.cdiv(columns, n) < programs and (m > 64 or n > max(32, head)):
        m, n = (m // 2, n) if m > 64 else (m, n // 2)
    stage = (m + 2 * n) * k * itemsize
    stages = min(config["num_stages"], (STAGE_BYTES if tma else POINTER_STAGE_BYTES) // stage)
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": config["GROUP_M"], "num_warps": warps,
        "num_stages": max(stages, 1),
    }  # fmt: skip


def config_for(x: Tensor, dim: int) -> dict[str, Any]:
    """The tuned configuration for x [B, L, H] and heads of `dim`; fp16 has bf16's."""
    key = (("dtype", "float32" if x.dtype == torch.float32 else "bfloat16"), ("D", dim))
    return _tuned.lookup("kv_recompute", x.device, key, log2(x.shape[0] * x.shape[1]), tuple(DEFAULT.items()))


def _can_describe(*tensors: Tensor) -> bool:
    """Whether TMA can read them: sm_90 on, all at multiples of 16 bytes. The interpreter plays along."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return False
    placed = all(t.data_ptr() % 16 == 0 and min(t.stride()[:-1]) > 0 for t in tensors)
    return placed and alignment(*tensors) * tensors[0].element_size() == 16


def _spare(columns: dict[str, int], half: int, interleaved: bool, tma: bool, align: int) -> int:
    """How much smaller than sums would let it be a tile is: pointers take registers, those of single elements more."""
    gathers = half & (half - 1) != 0 and not interleaved and columns["HEAD"] == columns["PAD"]
    return 4 if not tma and align == 1 else 2 if gathers or not tma else 1


def _describe(
    x: Tensor,
    row: int,
    outer: int,
    weights: tuple[Tensor, Tensor],
    columns: dict[str, int],
    sizes: dict[str, Any],
) -> list[TensorDescriptor]:
    """x as [outer, inner, H], its rows `row` apart.

    Weights as [parts, PART, H], or [1, Hkv D, H] where columns are taken as they come.
    """
    m, n, k = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    hidden, inner = x.shape[2], x.shape[0] * x.shape[1] // outer
    between = x.stride(0) if outer > 1 else inner * row
    described = [TensorDescriptor(x, [outer, inner, hidden], [between, row, 1], [1, m, k])]
    for w in weights:
        whole, pad = columns["HEAD"] > 0, columns["PAD"]
        part, row = columns["PART"] if whole else w.shape[0], w.stride(0)
        box = [n // pad, pad, k] if whole else [1, n, k]
        described.append(TensorDescriptor(w, [w.shape[0] // part, part, hidden], [part * row, row, 1], box))
    return described


def launch(
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    k_norm_weight: Tensor | None = None,
    k_norm_eps: float = 1e-6,
    rope_interleaved: bool = False,
    block_table: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Run the kernel; arguments as the op has them, already checked."""
    (batch, rows, hidden), dim = x.shape, k_cache.shape[3]
    heads = k_cache.shape[2 if block_table is not None else 1]
    pages, capacity, table_row, table_column, block = _pages(k_cache, block_table)
    if batch * rows * heads == 0:
        return
    half = 0 if cos is None else cos.shape[1]
    columns = head_columns(dim, half, rope_interleaved, k_norm_weight is not None)
    align, cache_align = alignment(x, w_k, w_v), alignment(k_cache, v_cache)
    if hidden % align:
        align = 1
    # A descriptor's rows are one stride apart: of all rows in either order, else of one sequence at a time.
    plain = batch == 1 or rows == 1 or x.stride(0) == rows * x.stride(1)
    token_major = not plain and x.stride(1) == batch * x.stride(0)
    tma = hidden > 0 and columns["PAD"] <= 256 and _can_describe(x, w_k, w_v) and (plain or token_major or rows >= 64)
    outer = batch if tma and not plain and not token_major else 1
    inner, wide = batch * rows // outer, heads * (columns["HEAD"] or dim)
    sizes = fit(
        config or config_for(x, dim), inner, wide, columns["HEAD"], x.element_size(), tma=tma,
        spare=_spare(columns, half, rope_interleaved, tma, align),
        programs=2 * multiprocessors(x.device) // (3 * outer),  # fewer leave too much idle
    )  # fmt: skip
    tiles, strips = outer * triton.cdiv(inner, sizes["BLOCK_M"]), triton.cdiv(wide, sizes["BLOCK_N"])
    apart = x.stride(0 if token_major or rows == 1 else 1)
    operands = _describe(x, apart, outer, (w_k, w_v), columns, sizes) if tma else (x, w_k, w_v)
    with torch.cuda.device_of(k_cache):
        _recompute_kernel[(tiles * strips,)](
            *operands, b_k, b_v, k_norm_weight, cos if half else None, sin if half else None, k_cache, v_cache,
            block_table, k_norm_eps, start, batch, rows, inner, tiles, strips, hidden // align, heads, pages, capacity,
            table_row, table_column, x.stride(0) // align, x.stride(1) // align,
            w_k.stride(0) // align, w_v.stride(0) // align,
            *((cos.stride(0), sin.stride(0)) if cos is not None and sin is not None else (0, 0)),
            *(s // cache_align for c in (k_cache, v_cache) for s in _strides(c, block > 0)),
            D=dim, HALF=half, INTERLEAVED=rope_interleaved, PAGE=block, TOKEN_MAJOR=token_major, TMA=tma, ALIGN=align,
            CACHE_ALIGN=cache_align, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", **columns, **sizes,
        )  # fmt: skip


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration, and the default with every type, head size, kind of rotation, pages, and pointers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("kv_recompute", gpu) if e["backend"] == "triton"]
    cases: list[tuple[dict[str, Any], torch.dtype, int, int, str]] = [  # D, R
        *((config, bf16, 128, r, "tma") for config in _aot.configurations(SPACE, DEFAULT, []) for r in (0, 128)),
        *((DEFAULT, fp16, d, r, "tma bias norm") for d, r in ((64, 64), (80, 32), (128, 64), (96, 96), (256, 256))),
        (DEFAULT, bf16, 80, 0, "tma bias"), (DEFAULT, bf16, 64, 64, "tma pairs tokens"), (DEFAULT, fp16, 96, 24, "tma"),
        (DEFAULT, bf16, 128, 0, "bias"), (DEFAULT, fp16, 128, 128, "norm paged"), (DEFAULT, fp16, 300, 300, "norm"),
        (DEFAULT, bf16, 33, 10, "odd pairs"), (DEFAULT, fp16, 77, 14, "odd"),
        *((DEFAULT, fp32, d, r, options) for d, r, options in ((64, 64, "tma"), (128, 128, "norm"), (80, 24, "paged"))),
        *((e["config"], getattr(torch, e["key"]["dtype"]), e["key"]["D"], e["key"]["D"], "tma") for e in shipped),
    ]  # fmt: skip
    named: dict[str, _aot.Specialization] = {}
    for config, dtype, d, rotary, text in cases:
        options, element = text.split(), TYPES[dtype]
        tma, pairs = "tma" in options, "pairs" in options
        columns = head_columns(d, rotary // 2, pairs, "norm" in options)
        align = 1 if "odd" in options else 16 // dtype.itemsize
        spare = _spare(columns, rotary // 2, pairs, tma, align)
        sizes = fit(config, 4096, 32 * (columns["HEAD"] or d), columns["HEAD"], dtype.itemsize, tma=tma, spare=spare)
        types = dict.fromkeys(("x_ptr", "w_k_ptr", "w_v_ptr", "k_ptr", "v_ptr"), f"*{element}")
        if tma:
            m, n, k = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            box = f"{n // columns['PAD']},{columns['PAD']}" if columns["HEAD"] else f"1,{n}"
            types["x_ptr"] = f"tensordesc<{element}[1,{m},{k}]>"
            types["w_k_ptr"] = types["w_v_ptr"] = f"tensordesc<{element}[{box},{k}]>"
        if "bias" in options:
            types |= dict.fromkeys(("b_k_ptr", "b_v_ptr"), f"*{element}")
        if "norm" in options:
            types["norm_ptr"] = f"*{element}"
        if rotary:
            types |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
        if "paged" in options:
            types["table_ptr"] = "*i32"
        types |= dict.fromkeys(_SCALARS, "i32") | {"eps": "fp32"}
        constants = columns | {
            "D": d, "HALF": rotary // 2, "INTERLEAVED": pairs, "PAGE": 16 if "paged" in options else 0,
            "TOKEN_MAJOR": "tokens" in options, "TMA": tma, "ALIGN": align, "CACHE_ALIGN": align,
            "PRECISION": "ieee" if dtype == fp32 else "tf32",
        }  # fmt: skip
        name = "-".join([element, f"D{d}", f"R{rotary}", *options, *(f"{v}" for v in sizes.values())])
        named[name] = _aot.Specialization(name, _recompute_kernel, types, constants, sizes, 90 if tma else 80)
    yield from named.values()
