"""tree_build in Triton: from each node's parent, which nodes it sees and how deep it stands.

Two numbers at B 64, T 64: 66 KB, 0.02 us at 3.02 TB/s; nothing to compute: the launch is the time.
A program takes a sequence. All nodes climb at once, twice as far each time: 6 gathers for the 64 bits of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot

WIDTHS = (16, 32, 64)  # nodes a program is compiled for


@triton.jit(do_not_specialize=["stride_pb", "stride_pt", "stride_n", "T"])
def _build_kernel(
    parent_ptr, q_lens_ptr, mask_ptr, depth_ptr, stride_pb, stride_pt, stride_n, T,
    WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Strides of parent [B, T] and q_lens [B]; STEPS: doublings until a chain of WIDTH nodes is climbed."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, WIDTH)
    inside = row < T
    ancestor = tl.load(parent_ptr + b * stride_pb + row.to(tl.int64) * stride_pt, mask=inside, other=-1)
    ancestor = tl.where((ancestor >= 0) & (ancestor < row), ancestor, -1)
    mask = tl.full((WIDTH,), 1, tl.int64) << row.to(tl.int64)  # bit 63 is the sign
    depth = (ancestor >= 0).to(tl.int32)
    for _ in tl.static_range(STEPS):
        known, at = ancestor >= 0, tl.maximum(ancestor, 0)
        above, higher, farther = tl.gather(mask, at, 0), tl.gather(depth, at, 0), tl.gather(ancestor, at, 0)
        mask = tl.where(known, mask | above, mask)
        depth = tl.where(known, depth + higher, depth)
        ancestor = tl.where(known, farther, -1)
    if q_lens_ptr is not None:
        there = row < tl.load(q_lens_ptr + b * stride_n)
        mask, depth = tl.where(there, mask, 0), tl.where(there, depth, 0)
    tl.store(mask_ptr + b * T + row, mask, mask=inside)
    tl.store(depth_ptr + b * T + row, depth, mask=inside)


def _width(rows: int) -> int:
    return next(width for width in WIDTHS if width >= rows)


def launch(parent: Tensor, *, q_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as the op has them, already checked."""
    batch, rows = parent.shape
    mask, depth = parent.new_empty(batch, rows, dtype=torch.int64), parent.new_empty(batch, rows)
    if mask.numel():
        width = _width(rows)
        with torch.cuda.device_of(parent):
            _build_kernel[(batch,)](
                parent, q_lens, mask, depth, *parent.stride(), 0 if q_lens is None else q_lens.stride(0), rows,
                WIDTH=width, STEPS=width.bit_length() - 1, num_warps=1,
            )  # fmt: skip
    return mask, depth


def specializations() -> Iterator[_aot.Specialization]:
    """Every width, with and without q_lens."""
    scalars = dict.fromkeys(("stride_pb", "stride_pt", "stride_n", "T"), "i32")
    for width in WIDTHS:
        for ragged in (False, True):
            types = {"parent_ptr": "*i32", "mask_ptr": "*i64", "depth_ptr": "*i32"} | scalars
            if ragged:
                types["q_lens_ptr"] = "*i32"
            constants = {"WIDTH": width, "STEPS": width.bit_length() - 1}
            name = f"{width}{'-ragged' * ragged}"
            yield _aot.Specialization(name, _build_kernel, types, constants, {"num_warps": 1})
