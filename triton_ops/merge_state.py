"""merge_state in Triton: a program takes ROWS states of D elements.

Two numbers at 128 x 16 x 64 rows of 64, bf16: 52 MB, 17 us at 3.02 TB/s; 25 Mflop: bytes-bound, one pass.
Reached: bench/results/<gpu>/merge_state.json.
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

DEFAULT = {"ELEMENTS": 4096, "num_warps": 4}  # a program, rows padded to a power of two
SPACE = [{"ELEMENTS": elements, "num_warps": warps} for elements, warps in ((1024, 2), (2048, 4), (2048, 2), (8192, 8))]
_RUNTIME = ["N", "N1", "N2", *(f"{t}_{i}" for t in ("oa", "ob", "la", "lb") for i in range(3))]


@triton.jit
def _part(o_ptr, row, there, weight):
    """o * weight, 0 where the weight is: what lies there may be NaN, and is not read."""
    o = tl.load(o_ptr + row, mask=there & (weight != 0.0), other=0.0)
    return o.to(tl.float32) * weight


@triton.jit(do_not_specialize=_RUNTIME)
def _merge_kernel(
    oa_ptr, la_ptr, ob_ptr, lb_ptr, o_ptr, lse_ptr,
    N, N1, N2, oa_0, oa_1, oa_2, ob_0, ob_1, ob_2, la_0, la_1, la_2, lb_0, lb_1, lb_2,
    UNIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Leading sizes [N / (N1 N2), N1, N2]; strides of o_a and o_b are in units of UNIT elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    i, j, k = row // N2 // N1, row // N2 % N1, row % N2
    a = tl.load(la_ptr + i * la_0 + j * la_1 + k * la_2, mask=inside, other=float("-inf"))
    b = tl.load(lb_ptr + i * lb_0 + j * lb_1 + k * lb_2, mask=inside, other=float("-inf"))
    top = tl.where(a != a, a, tl.where(b > a, b, a))  # a NaN stays one
    top = tl.where(b != b, b, top)
    base = tl.where(top == float("-inf"), 0.0, top)
    wa, wb = tl.exp(a - base), tl.exp(b - base)
    total = wa + wb
    empty = total == 0.0
    lse = base + tl.log(tl.where(empty, 1.0, total))
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), lse), mask=inside)
    share = 1.0 / tl.where(empty, 1.0, total)
    column = tl.arange(0, WIDTH)[None, :]
    there = inside[:, None]
    if D < WIDTH:
        there = there & (column < D)
    at_a = (i * oa_0 + j * oa_1 + k * oa_2) * UNIT
    at_b = (i * ob_0 + j * ob_1 + k * ob_2) * UNIT
    o = _part(oa_ptr, at_a[:, None] + column, there, (wa * share)[:, None])
    o += _part(ob_ptr, at_b[:, None] + column, there, (wb * share)[:, None])
    tl.store(o_ptr + row[:, None] * D + column, o.to(o_ptr.dtype.element_ty), mask=there)


def three(t: Tensor, trailing: int) -> Tensor:
    """The leading dimensions as three: the same memory where strides allow, else a copy."""
    leading = t.shape[: t.dim() - trailing]
    sizes = (math.prod(leading[:-2]), *leading[-2:]) if len(leading) > 3 else (1,) * (3 - len(leading)) + (*leading,)
    return t.reshape(*sizes, *t.shape[t.dim() - trailing :])


def config_for(o: Tensor) -> dict[str, Any]:
    """The tuned configuration for states of this size."""
    key = (("dtype", str(o.dtype).removeprefix("torch.")),)
    return _tuned.lookup("merge_state", o.device, key, max(o.numel(), 1).bit_length() - 1, tuple(DEFAULT.items()))


def launch(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, *, config: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as the op has them, already checked."""
    o, lse = o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)
    n, d = lse.numel(), o_a.shape[-1]
    if n == 0:
        return o, lse
    config = config or config_for(o_a)
    width = triton.next_power_of_2(max(d, 1))
    states, logs = [three(t, 1) for t in (o_a, o_b)], [three(t, 0) for t in (lse_a, lse_b)]
    unit = 8 if all(
        t.data_ptr() % (8 * t.element_size()) == 0 and all(s % 8 == 0 for s in t.stride()[:3]) for t in states
    ) and d % 8 == 0 else 1  # fmt: skip
    strides = [s // unit for t in states for s in t.stride()[:3]] + [s for t in logs for s in t.stride()]
    rows = max(1, config["ELEMENTS"] // width)
    with torch.cuda.device_of(o_a):
        _merge_kernel[(triton.cdiv(n, rows),)](
            states[0], logs[0], states[1], logs[1], o, lse, n, *logs[0].shape[1:], *strides,
            UNIT=unit, D=d, WIDTH=width, ROWS=rows, num_warps=config["num_warps"],
            enable_fp_fusion=False,  # either order of the states gives the same bits
        )  # fmt: skip
    return o, lse


def specializations() -> Iterator[_aot.Specialization]:
    """Every configuration in bf16, and the default for other widths and types."""
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("merge_state", gpu) if e["backend"] == "triton"]
    cases = [(config, 64, "bf16") for config in _aot.configurations(SPACE, DEFAULT, shipped)]
    cases += [(DEFAULT, d, dtype) for d in (80, 128, 256) for dtype in ("fp16", "fp32")]
    for config, d, dtype in cases:
        width = triton.next_power_of_2(d)
        types = {**dict.fromkeys(("oa_ptr", "ob_ptr", "o_ptr"), f"*{dtype}"), **dict.fromkeys(_RUNTIME, "i32")}
        types |= {**dict.fromkeys(("la_ptr", "lb_ptr", "lse_ptr"), "*fp32"), "N": "i64"}
        constants = {"UNIT": 8, "D": d, "WIDTH": width, "ROWS": max(1, config["ELEMENTS"] // width)}
        name = f"{dtype}-{d}-{config}"
        options = {"num_warps": config["num_warps"]}
        yield _aot.Specialization(name, _merge_kernel, types, constants, options)
