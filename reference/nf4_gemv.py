"""nf4_gemv, nf4_linear: y = x @ W.T + bias; nf4_linear_dx: dx = dy @ W; W [N, K] stays 4-bit weights.

Source: QLoRA, arXiv:2305.14314, section 3. W is what nf4_dequant makes of packed, [N, K] row-major; its blocks run
across rows where K is no multiple of blocksize. Products are added up in fp32 and rounded once to x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio, unit_roundoff
from .nf4_dequant import nf4_dequant, random_inputs, unsigned, weight_bytes, weights

BUDGET = 4.0  # a chain of sums

# Each weight may be rounded once to x's dtype. The errors of a sum are random: 0.43 u_x sqrt(sum (x w)^2) in the root
# mean square (simulated). Three u_x are seven of those, which no output is large enough to meet by chance; one u_x
# would be 2.3, which one element in fifty exceeds.
WEIGHT_ROUNDINGS = 3.0

CHUNK = 1 << 22  # weights that error() expands at once


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    **scales: Any,
) -> Tensor:
    """[..., N] of x [..., K]."""
    w = nf4_dequant(packed, absmax, (out_features, x.shape[-1]), torch.float32, blocksize, **scales)
    y = x.float() @ w.T
    return (y if bias is None else y + bias.float().reshape(-1)).to(x.dtype)


nf4_gemv = nf4_linear  # for one row


def nf4_linear_dx(
    dy: Tensor, packed: Tensor, absmax: Tensor, in_features: int, blocksize: int = 64, **scales: Any
) -> Tensor:
    """[..., K] of dy [..., N]: the gradient of nf4_linear for x."""
    w = nf4_dequant(packed, absmax, (dy.shape[-1], in_features), torch.float32, blocksize, **scales)
    return (dy.float() @ w).to(dy.dtype)


def cost(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    **scales: Any,
) -> Cost:
    """Read x, the weights and the bias, write [..., N] of x's dtype; a product and a sum for each weight and row."""
    k, rows = x.shape[-1], math.prod(x.shape[:-1])
    elements = rows * (k + out_features) + (0 if bias is None else out_features)
    read = weight_bytes(k * out_features, blocksize, **scales)
    return Cost(read + elements * x.element_size(), 2 * rows * k * out_features)


nf4_linear_dx_cost = cost  # with dy for x and in_features for out_features


class _Case(NamedTuple):
    """Leading sizes of x or dy, weight [n, k]."""

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    blocksize: int = 64
    bias: bool = False
    double_quant: bool = False
    code: float = 0.0  # magnitude of the user's table; NF4's when 0


# Around words, tiles and blocks: rows that start in the middle of a byte and of a block, one weight, none.
_ONE_ROW = (
    _Case("vector", (), 64, 64),
    _Case("matrix", (1,), 96, 128),
    _Case("bias", (1, 1), 130, 256, bias=True),
    _Case("double_quant", (1,), 300, 1024, bias=True, double_quant=True),
    _Case("user_code", (1,), 33, 65, 32, bias=True, code=1.0),
    _Case("large_code", (1,), 40, 96, 32, double_quant=True, code=1000.0),
    _Case("odd", (), 7, 33, 32),
    _Case("odd_double_quant", (1,), 131, 77, 32, double_quant=True),
    _Case("rows_across_blocks", (1,), 9, 100, 128, bias=True),
    _Case("half_blocks", (1,), 17, 96, 64, double_quant=True),
    _Case("one", (), 1, 1),
    _Case("one_output", (1,), 1, 4097, 128),
    _Case("one_input", (1,), 65, 1, bias=True),
    _Case("no_outputs", (1,), 0, 64),
    _Case("no_inputs", (1,), 5, 0, bias=True),
    _Case("big_block", (1,), 5, 4097, 4096, double_quant=True, code=1.0),
    _Case("block_over_all", (1,), 6, 50, 4096),
    _Case("many_tiles", (1,), 257, 512, 128),
    _Case("long", (1,), 3, 8200, 256, bias=True),
)
_MANY_ROWS = (
    *(_Case(f"rows_{m}", (m,), 70, 192) for m in (0, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 129)),
    _Case("tensor", (2, 3, 4), 65, 130, bias=True),
    _Case("empty_tensor", (3, 0), 8, 64, bias=True),
    _Case("tiles", (17,), 300, 1024, bias=True, double_quant=True),
    _Case("more_tiles", (65,), 257, 512, 128, bias=True),
    _Case("odd_rows", (5,), 33, 77, 32, double_quant=True, code=1.0),
    _Case("odd_tile", (19,), 67, 101, 64, bias=True),
    _Case("large_code_rows", (20,), 64, 160, 64, code=1000.0),
    _Case("big_block_rows", (4,), 11, 1030, 4096, double_quant=True),
    _Case("no_outputs_rows", (3,), 0, 64),
    _Case("no_inputs_rows", (3,), 5, 0, bias=True),
)


def _samples(
    cases: tuple[_Case, ...], device: torch.device, dtype: torch.dtype, seed: int, dx: bool = False
) -> Iterator[Sample]:
    for case in cases:
        generator = torch.Generator().manual_seed(seed)
        code = torch.randn(16, generator=generator) * case.code if case.code else None
        packed, absmax, kwargs = random_inputs(
            case.n * case.k, case.blocksize, device, double_quant=case.double_quant, code=code, seed=seed
        )
        given, wanted = (case.n, case.k) if dx else (case.k, case.n)
        x = torch.randn(*case.leading, given, generator=generator) / max(1.0, case.code)
        if case.bias and not dx:
            kwargs["bias"] = torch.randn(case.n, generator=generator).to(device, dtype)
        yield Sample(case.name, (x.to(device, dtype), packed, absmax, wanted, case.blocksize), kwargs)


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """One row against weights of every awkward size."""
    return _samples(_ONE_ROW, device, dtype, seed)


def nf4_linear_samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """The same, and numbers of rows around every tile."""
    return _samples(_ONE_ROW + _MANY_ROWS, device, dtype, seed)


def nf4_linear_dx_samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """The weights and rows of nf4_linear's."""
    return _samples(_ONE_ROW + _MANY_ROWS, device, dtype, seed, dx=True)


def _pieces(
    packed: Tensor, absmax: Tensor, n: int, k: int, blocksize: int, **scales: Any
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of W, W there, the sizes of the terms it is made of), float64 and CHUNK weights or one row at a time."""
    step = max(1, CHUNK // max(k, 1))
    for first in range(0, max(n, 1), step):
        last = min(first + step, n)

        def expand(first: int = first, last: int = last, **scales: Any) -> Tensor:
            flat = weights(packed, absmax, first * k, last * k, blocksize, torch.float64, **scales)
            return flat.reshape(last - first, k)

        w = expand(**scales)
        terms = expand(**unsigned(packed.device, **scales)) if "absmax_code" in scales else w.abs()
        yield slice(first, last), w, terms


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()


def _ratio(got: Tensor, like: Tensor, sums: tuple[Tensor, Tensor, Tensor], bias: Tensor | None = None) -> float:
    """Error ratio of `got` against (sum of x w, sum of |x w|, sum of (x w)^2), per element."""
    shape = (*like.shape[:-1], sums[0].shape[1])
    truth, magnitude, squares = (t.reshape(shape) for t in sums)
    if bias is not None:
        truth, magnitude = truth + bias.reshape(-1).double(), magnitude + bias.reshape(-1).double().abs()
    allowance = WEIGHT_ROUNDINGS * unit_roundoff(like.dtype) / BUDGET * squares.sqrt()
    return error_ratio(got, truth, magnitude, allowance=allowance)


def error(
    got: Tensor,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int = 64,
    *,
    bias: Tensor | None = None,
    **scales: Any,
) -> float:
    """Error ratio against float64 code * absmax.

    At BUDGET an element is 4 (u_out |y| + u_acc sum |x w|) + WEIGHT_ROUNDINGS u_x sqrt(sum (x w)^2) off, u the unit
    roundoffs, where the sums include the bias (but not the root).
    """
    rows, columns = _flat(x), []
    for _, w, terms in _pieces(packed, absmax, out_features, x.shape[-1], blocksize, **scales):
        columns.append((rows @ w.T, rows.abs() @ terms.T, rows.square() @ w.square().T))
    truth, magnitude, squares = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    return _ratio(got, x, (truth, magnitude, squares), bias)


def nf4_linear_dx_error(
    got: Tensor, dy: Tensor, packed: Tensor, absmax: Tensor, in_features: int, blocksize: int = 64, **scales: Any
) -> float:
    """As error()."""
    rows = _flat(dy)
    truth, magnitude, squares = (rows.new_zeros(rows.shape[0], in_features) for _ in range(3))
    for piece, w, terms in _pieces(packed, absmax, dy.shape[-1], in_features, blocksize, **scales):
        some = rows[:, piece]
        truth += some @ w
        magnitude += some.abs() @ terms
        squares += some.square() @ w.square()
    return _ratio(got, dy, (truth, magnitude, squares))
