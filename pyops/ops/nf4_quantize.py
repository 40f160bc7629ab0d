"""The page of nf4_quantize; double quantisation of the scales is built here from torch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _extension
from .._checks import FLOAT_DTYPES, ceil_div, check_float_dtype, dtype_name
from .._registry import Op, TuningCase
from ..reference import nf4_quantize as reference
from .nf4_dequant import check_blocksize, check_code

ABSMAX_BLOCKSIZE = 256  # bitsandbytes' nested blocksize

SCHEMA = "nf4_quantize(Tensor w, int blocksize=64, *, Tensor? code=None) -> (Tensor packed, Tensor absmax)"


def _check(w: Tensor, blocksize: int = 64, *, code: Tensor | None = None) -> None:
    check_float_dtype("nf4_quantize", "w", w.dtype)
    check_blocksize("nf4_quantize", "blocksize", blocksize)
    check_code("nf4_quantize", code, "w", w)


def _fake(w: Tensor, blocksize: int = 64, *, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
    n = w.numel()
    packed = w.new_empty((ceil_div(n, 2),), dtype=torch.uint8)
    return packed, w.new_empty((ceil_div(n, blocksize),), dtype=torch.float32)


def _describe(backend: str, w: Tensor, blocksize: int = 64, **kwargs: object) -> str:
    if backend == "cpu" and _extension.C is not None:
        return f"{_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    if backend == "triton":
        from ..triton_ops import nf4_quantize as triton_page

        return str(triton_page.config_for(w.device, w.numel(), w.dtype, blocksize))
    return ""


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    for dtype in FLOAT_DTYPES:
        for rows, columns in ((1024, 1024), (4096, 4096), (28672, 8192)):
            w = torch.randn(rows, columns, device=device, dtype=dtype)
            yield TuningCase({"dtype": dtype_name(dtype)}, w.numel(), (w,), {})


OP = Op(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference=reference.nf4_quantize,
    triton="nf4_quantize",
    describe=_describe,
    tuning=_tuning,
)


def _dynamic_code() -> tuple[float, ...]:
    """256 values, ascending: seven decades of means of evenly spaced boundaries, both signs, 0 and 1.

    Source: 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561; values as in bitsandbytes.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return tuple(sorted([*positive, *(-v for v in positive), 0.0, 1.0]))


DYNAMIC_CODE = _dynamic_code()


def double_quantize(absmax: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """8-bit scales: (absmax as uint8, the keyword arguments that undo it in nf4_dequant and the products)."""
    code = torch.tensor(DYNAMIC_CODE, dtype=torch.float32, device=absmax.device)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    n = absmax.numel()
    padded = torch.nn.functional.pad(absmax - offset, (0, -n % ABSMAX_BLOCKSIZE)).reshape(-1, ABSMAX_BLOCKSIZE)
    scale = padded.abs().amax(dim=1) if n else absmax.new_zeros(0)
    normed = padded * (1.0 / scale.clamp(min=reference.MIN_ABSMAX))[:, None]
    bounds = (code[:-1] + code[1:]) / 2
    quantized = torch.bucketize(normed.reshape(-1)[:n], bounds).to(torch.uint8)
    return quantized, {
        "absmax_code": code,
        "absmax_scale": scale,
        "absmax_offset": offset,
        "absmax_blocksize": ABSMAX_BLOCKSIZE,
    }


@overload
def nf4_quantize(
    w: Tensor,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    double_quant: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def nf4_quantize(
    w: Tensor,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    double_quant: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]: ...


def nf4_quantize(
    w: Tensor,
    blocksize: int = 64,
    *,
    code: Tensor | None = None,
    double_quant: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Any]]:
    """Quantise weights to 4 bits, a scale for each block of consecutive weights.

    absmax[b] = max |w| over block b; each nibble is the code nearest to w / absmax (of two equally near, the lower).
    Equal to bitsandbytes' CPU path. An all-zero block has scale 0 and the code of 0; a block with a NaN has scale NaN.

    Args:
        w: fp32, fp16 or bf16, any shape and strides; quantised in row-major order.
        blocksize: weights a block, a power of two from 32 to 4096.
        code: fp32 [16], the value of each nibble in any order; NF4 when None.
        double_quant: also quantise absmax to 8 bits, as bitsandbytes' compress_statistics does.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        (packed, absmax): uint8 [ceil(n / 2)], the high nibble first, and fp32 [ceil(n / blocksize)]. With double_quant
        (packed, absmax, dq): absmax is uint8, and dq holds the keyword arguments that nf4_dequant then needs, so that
        nf4_dequant(packed, absmax, w.shape, w.dtype, blocksize, **dq) undoes it.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is.

    Source: QLoRA, arXiv:2305.14314, section 3. Cost: n (itemsize + 0.5 + 4 / blocksize) bytes. Deterministic.
    """
    packed, absmax = OP(backend, w, blocksize, code=code)
    if not double_quant:
        return packed, absmax
    quantized, dq = double_quantize(absmax)
    return packed, quantized, dq
