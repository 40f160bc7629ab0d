"""nf4_quantize: absmax[b] = max |w| over block b, and each weight the code nearest to w / absmax.

Source: QLoRA, arXiv:2305.14314, section 3. The arithmetic is that of bitsandbytes' CPU path, which fixes every tie: a
full block multiplies by the reciprocal of its absmax, a last partial block divides by it and stores it no smaller than
1e-38, and a value equal to the midpoint of two codes takes the lower one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._truth import Cost, Sample
from .nf4_dequant import code_table

MIN_ABSMAX = 1e-38
BUDGET = 0.0  # every nibble and every absmax exactly


def midpoints(code: Tensor) -> tuple[Tensor, Tensor]:
    """([15] decision boundaries between neighbouring codes, [16] sorted position -> nibble), never a NaN's."""
    ordered, order = torch.sort(code, stable=True)
    middle = (ordered[:-1] + ordered[1:]) / 2
    return torch.where(middle.isnan(), torch.inf, middle), order


def nf4_quantize(w: Tensor, blocksize: int = 64, *, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(packed [ceil(n / 2)] uint8, absmax [ceil(n / blocksize)] fp32) of a tensor of n weights."""
    flat = w.reshape(-1).float()
    n, full = flat.numel(), flat.numel() // blocksize * blocksize
    blocks = flat[:full].reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]).reshape(-1)
    if full < n:
        last = flat[full:].abs().amax().clamp(min=MIN_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[full:] / last])
    if n % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    bounds, order = midpoints(code_table(code, w.device))
    nibbles = order[(~(scaled[:, None] <= bounds)).sum(dim=1)].to(torch.uint8)
    return nibbles[0::2] << 4 | nibbles[1::2], absmax


def cost(w: Tensor, blocksize: int = 64, *, code: Tensor | None = None) -> Cost:
    """Read n weights (and 64 bytes of a user's code); write ceil(n / 2) packed and 4 bytes a block.

    A weight costs a magnitude and a maximum, a product, and 4 comparisons of a binary search: 7 operations.
    """
    n = w.numel()
    moved = n * w.element_size() + -(-n // 2) + 4 * -(-n // blocksize)
    return Cost(moved + (64 if code is not None else 0), 7 * n)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Normal weights of every awkward size, a zero block, subnormals, and code tables in any order."""
    generator = torch.Generator().manual_seed(seed)
    fp4 = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])
    zeros = torch.randn(4, 64, generator=generator)
    zeros[1] = 0
    for name, w, blocksize, code in (
        ("matrix", torch.randn(96, 128, generator=generator), 64, None),
        ("odd", torch.randn(3, 7, 11, generator=generator), 64, None),
        ("fp4", torch.randn(40, 100, generator=generator), 128, torch.cat([fp4, -fp4])),
        ("user_code", torch.randn(33, 65, generator=generator), 32, torch.randn(16, generator=generator)),
        ("zero_block", zeros, 64, None),
        ("zero_partial", torch.zeros(70), 64, None),
        ("subnormal", torch.randn(8, 64, generator=generator) * 1e-40, 64, None),
        ("one", torch.randn(1, generator=generator), 64, None),
        ("empty", torch.zeros(0, 64), 64, None),
        ("big_block", torch.randn(3, 4097, generator=generator), 4096, None),
    ):
        kwargs = {} if code is None else {"code": code.to(device)}
        yield Sample(name, (w.to(device, dtype), blocksize), kwargs)


def error(got: tuple[Tensor, Tensor], w: Tensor, blocksize: int = 64, *, code: Tensor | None = None) -> float:
    """How many bytes and scales differ from the reference."""
    packed, absmax = nf4_quantize(w.cpu(), blocksize, code=None if code is None else code.cpu())
    same_absmax = (got[1].cpu() == absmax) | (got[1].cpu().isnan() & absmax.isnan())
    return float((got[0].cpu() != packed).sum() + (~same_absmax).sum())
