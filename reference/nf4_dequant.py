"""nf4_dequant: out[i] = code[nibble i] * absmax[i // blocksize].

Source: QLoRA, arXiv:2305.14314, section 3; layout as in bitsandbytes: packed is flat and row-major with the high nibble
first, blocks run across rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio

# Quantiles of a standard normal scaled to [-1, 1]: QLoRA, appendix E.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

BUDGET = 2.0  # one product, rounded once


def code_table(code: Tensor | None, device: torch.device) -> Tensor:
    """[16] fp32: the user's table, or NF4's."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device) if code is None else code.reshape(-1)


def block_scales(
    absmax: Tensor,
    absmax_code: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    absmax_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """[n_blocks] in `dtype`: the scale of each block, double quantisation undone (product first, then the offset)."""
    if absmax_code is None or absmax_scale is None:
        return absmax.reshape(-1).to(dtype)
    scale = absmax_scale.reshape(-1).to(dtype).repeat_interleave(absmax_blocksize)[: absmax.numel()]
    scale = absmax_code.reshape(-1).to(dtype)[absmax.reshape(-1).long()] * scale
    return scale if absmax_offset is None else scale + absmax_offset.reshape(()).to(dtype)


def unpack(packed: Tensor, n: int) -> Tensor:
    """[n] int64 nibbles, the high one of each byte first."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=-1).reshape(-1)[:n].long()


def weights(
    packed: Tensor,
    absmax: Tensor,
    start: int,
    end: int,
    blocksize: int,
    dtype: torch.dtype,
    *,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
) -> Tensor:
    """Weights `start` to `end` of the flat tensor, everything computed in `dtype`."""
    nibbles = unpack(packed.reshape(-1)[start // 2 : -(-end // 2)], end - start // 2 * 2)[start % 2 :]
    scales = block_scales(absmax, absmax_code, absmax_scale, absmax_offset, absmax_blocksize, dtype)
    scales = scales[start // blocksize : -(-end // blocksize)].repeat_interleave(blocksize)
    return code_table(code, packed.device).to(dtype)[nibbles] * scales[start % blocksize :][: end - start]


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
) -> Tensor:
    """Multiply in fp32 and round once to `dtype`; with dtype=torch.float64 everything is computed in float64."""
    values = weights(
        packed, absmax, 0, math.prod(shape), blocksize, torch.float64 if dtype == torch.float64 else torch.float32,
        code=code, absmax_code=absmax_code, absmax_scale=absmax_scale, absmax_offset=absmax_offset,
        absmax_blocksize=absmax_blocksize,
    )  # fmt: skip
    return values.to(dtype).reshape(tuple(shape))


def unsigned(device: torch.device, **scales: Any) -> dict[str, Any]:
    """The double quantisation and code without signs: what they make are the sizes of the terms of each weight."""
    positive = {k: v.abs() if isinstance(v, Tensor) else v for k, v in scales.items()}
    return {**positive, "code": code_table(positive.get("code"), device).abs()}


def weight_bytes(
    n: int,
    blocksize: int,
    *,
    code: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_blocksize: int = 256,
) -> int:
    """What must be read of n weights in b = ceil(n / blocksize) blocks.

    ceil(n / 2) packed, 4 b of absmax; double-quantised instead b + 4 ceil(b / absmax_blocksize) + 1024 (its table) +
    4 (offset, if any); 64 for a code table of the user's.
    """
    blocks = -(-n // blocksize)
    read = -(-n // 2) + (64 if code is not None else 0)
    if absmax_code is None:
        return read + 4 * blocks
    return read + blocks + 4 * -(-blocks // absmax_blocksize) + 1024 + (4 if absmax_offset is not None else 0)


def cost(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int = 64, **scales: Any
) -> Cost:
    """Read the weights; write n elements of dtype.

    One product a weight, and two operations a block to undo double quantisation.
    """
    n = math.prod(shape)
    undo = 2 * -(-n // blocksize) if scales.get("absmax_code") is not None else 0
    return Cost(weight_bytes(n, blocksize, **scales) + n * dtype.itemsize, n + undo)


def random_inputs(
    n: int,
    blocksize: int,
    device: torch.device,
    *,
    double_quant: bool = False,
    code: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Random packed weights and scales: (packed, absmax, keyword arguments of the double quantisation and code)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, (-(-n // 2),), generator=generator, dtype=torch.uint8).to(device)
    kwargs: dict[str, object] = {} if code is None else {"code": code.to(device)}
    if not double_quant:
        return packed, torch.rand(blocks, generator=generator).add_(1e-3).to(device), kwargs
    absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8).to(device)
    kwargs |= {
        "absmax_code": torch.linspace(-1, 1, 256).to(device),
        "absmax_scale": torch.rand(-(-blocks // 256), generator=generator).to(device),
        "absmax_offset": torch.tensor(1.25, device=device),
    }
    return packed, absmax, kwargs


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Sizes around every boundary of the kernels: words, tiles, blocks, odd lengths, one weight, none."""
    user_code = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    for name, shape, blocksize, double_quant, code in (
        ("matrix", (96, 128), 64, False, None),
        ("double_quant", (130, 257), 64, True, None),
        ("user_code", (33, 65), 32, False, user_code),
        ("odd", (3, 7, 11), 64, False, None),
        ("one", (1,), 64, False, None),
        ("empty", (0, 64), 64, False, None),
        ("big_block", (5, 4097), 4096, True, user_code),
        ("many_tiles", (257, 1024), 128, False, None),
    ):
        packed, absmax, kwargs = random_inputs(
            math.prod(shape), blocksize, device, double_quant=double_quant, code=code, seed=seed
        )
        yield Sample(name, (packed, absmax, list(shape), dtype, blocksize), kwargs)


def error(got: Tensor, packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int = 64,
          **kwargs: object) -> float:  # fmt: skip
    """Error ratio against float64; the terms are code * (absmax_code * absmax_scale) and code * absmax_offset."""
    truth = nf4_dequant(packed, absmax, shape, torch.float64, blocksize, **kwargs)  # type: ignore[arg-type]
    if "absmax_code" not in kwargs:
        return error_ratio(got, truth)
    terms = nf4_dequant(packed, absmax, shape, torch.float64, blocksize, **unsigned(packed.device, **kwargs))
    return error_ratio(got, truth, terms)
