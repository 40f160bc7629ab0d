"""kv_recompute: rows start … start + L - 1 of the caches made again from the inputs of their layer, in place.

K = x w_k^T + b_k, with an RMS norm of each head and a rotary embedding where asked for; V = x w_v^T + b_v. All in fp32,
rounded once to the caches' dtype. Caches lie as kv_append has them; a row whose page is not there is skipped here, as
on a GPU. Source: KVPR, arXiv:2411.17089.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._truth import Cost, Sample, error_ratio
from .kv_append import random_caches, rotate, same_bits

BUDGET = 4.0  # a chain of sums


def _split(y: Tensor, dim: int) -> Tensor:
    """[B, Hkv, L, D] of [B, L, Hkv D]."""
    return y.reshape(*y.shape[:2], y.shape[2] // dim, dim).transpose(1, 2)


def _project(x: Tensor, w: Tensor, bias: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype) @ w.to(dtype).T
    return _split(y if bias is None else y + bias.to(dtype), dim)


def write(cache: Tensor, rows: Tensor, start: int, block_table: Tensor | None) -> None:
    """Rows [B, Hkv, L, D] to positions start … start + L - 1 of a cache."""
    if block_table is None:
        cache[:, :, start : start + rows.shape[2]] = rows
        return
    position = torch.arange(start, start + rows.shape[2], device=cache.device)
    block = max(cache.shape[1], 1)
    page = block_table[:, position // block].long()
    there = (page >= 0) & (page < cache.shape[0])
    cache[page[there], (position % block).expand_as(page)[there]] = rows.transpose(1, 2)[there].to(cache.dtype)


def kv_recompute(
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
) -> None:
    """Norm before rotation; row i of cos and sin is that of row i of x."""
    dim = k_cache.shape[3]
    k, v = _project(x, w_k, b_k, dim, torch.float32), _project(x, w_v, b_v, dim, torch.float32)
    if k_norm_weight is not None:
        k = k * (k.square().mean(-1, keepdim=True) + k_norm_eps).rsqrt() * k_norm_weight.float()
    if cos is not None and sin is not None:
        k = rotate(k, cos.float(), sin.float(), rope_interleaved)
    write(k_cache, k, start, block_table)
    write(v_cache, v, start, block_table)


def cost(
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
) -> Cost:
    """Read x (B L H) and the weights (2 Hkv D H), write K and V (2 B L Hkv D); 4 B L H Hkv D flops.

    Biases, norm weight, angles and the pages of the rows are read too; norm and rotation are a few flops for each of K.
    """
    batch, rows, _ = x.shape
    columns = w_k.shape[0]
    small = [t for t in (b_k, b_v, cos, sin, k_norm_weight) if t is not None]
    size = (x.numel() + w_k.numel() + w_v.numel() + 2 * batch * rows * columns) * x.element_size()
    size += sum(t.numel() * t.element_size() for t in small)
    if block_table is not None and rows:
        block = max(k_cache.shape[1], 1)
        size += 4 * batch * ((start + rows - 1) // block - start // block + 1)
    flops = 4 * x.numel() * columns
    flops += 0 if k_norm_weight is None else 4 * batch * rows * columns
    flops += 0 if cos is None else 6 * batch * rows * columns // max(k_cache.shape[3], 1) * cos.shape[1]
    return Cost(size, flops)


def _sums(x: Tensor, w: Tensor, bias: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """(x w^T + b, the same of absolute values), [B, Hkv, L, D] in float64."""
    return _project(x, w, bias, dim, torch.float64), _project(
        x.abs(), w.abs(), None if bias is None else bias.abs(), dim, torch.float64
    )


def _normed(y: Tensor, magnitude: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """An RMS norm and its magnitude: what an error u `magnitude` of y becomes.

    With r = 1 / sqrt(mean(y^2) + eps) and z = y r w, errors d of y move z by w r (d_i - y_i r^2 mean(y d)), at most
    |w| r (|d_i| + |y_i| r^2 mean(|y d|)). The norm's own roundings are some u |z|, and |z| is within |w| r `magnitude`.
    """
    r = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    spread = (y.abs() * magnitude).mean(-1, keepdim=True)
    return y * r * weight, (magnitude + y.abs() * r.square() * spread) * r * weight.abs()


def error(
    got: tuple[Tensor, Tensor],
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
) -> float:
    """Error ratio of the written rows, given the caches before the call; all else must be what it was, bit for bit.

    The magnitude of an element is the sum of its |x w| and of the bias, which a norm and a rotation hand on. At BUDGET
    it is 4 (u_out |y| + u_acc magnitude) off, u the unit roundoffs: what is summed is rounded to fp32 many times, and
    to the caches' dtype once.
    """
    dim = k_cache.shape[3]
    k, k_magnitude = _sums(x, w_k, b_k, dim)
    if k_norm_weight is not None:
        k, k_magnitude = _normed(k, k_magnitude, k_norm_weight.double(), k_norm_eps)
    if cos is not None and sin is not None:
        k = rotate(k, cos.double(), sin.double(), rope_interleaved)
        k_magnitude = rotate(k_magnitude, cos.double().abs(), sin.double().abs(), rope_interleaved, 1.0)
    worst = 0.0
    for now, before, truth, magnitude in (
        (got[0], k_cache, k, k_magnitude),
        (got[1], v_cache, *_sums(x, w_v, b_v, dim)),
    ):
        rows, there = read(now, start, x.shape[1], block_table)
        ratio = error_ratio(torch.where(there, rows, 0), torch.where(there, truth, 0), magnitude)
        want = before.clone()
        write(want, rows, start, block_table)
        worst = max(worst, ratio, 0.0 if same_bits(now, want) else float("inf"))
    return worst


def read(cache: Tensor, start: int, rows: int, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows start … start + rows - 1 of a cache [B, Hkv, L, D], which of them lie in a page that exists)."""
    if block_table is None:
        some = cache[:, :, start : start + rows]
        return some, torch.ones_like(some, dtype=torch.bool)
    position = torch.arange(start, start + rows, device=cache.device)
    block = max(cache.shape[1], 1)
    page = block_table[:, position // block].long()
    there = (page >= 0) & (page < cache.shape[0])
    some = cache.new_zeros(*page.shape, *cache.shape[2:])
    some[there] = cache[page[there], (position % block).expand_as(page)[there]]
    return some.transpose(1, 2), there[:, None, :, None].expand(-1, cache.shape[2], -1, cache.shape[3])


class _Case(NamedTuple):
    """B, L, H, Hkv and D, where the rows go, and what is done to them."""

    name: str
    sizes: tuple[int, int, int, int, int]
    capacity: int
    start: int = 0
    block: int = 0
    layout: str = "contiguous"
    bias: bool = False
    norm: bool = False
    rotary: int = 0  # R
    interleaved: bool = False
    data_type_angles: bool = False


# Around vectors, tiles and pages; heads that share a tile and heads of several; the last row a cache has room for.
_CASES = (
    _Case("one", (1, 1, 1, 1, 1), 1),
    _Case("step", (3, 1, 64, 2, 64), 40, 39),
    _Case("opt", (2, 7, 96, 3, 64), 33, 5, bias=True),
    _Case("llama", (2, 9, 80, 2, 128), 20, 0, rotary=128),
    _Case("llama_pages", (2, 9, 80, 2, 64), 32, 3, 8, rotary=64),
    _Case("qwen", (2, 5, 72, 2, 64), 17, 12, bias=True, norm=True, rotary=64),
    _Case("norm", (1, 6, 40, 3, 80), 12, 6, norm=True),
    _Case("norm_odd", (2, 3, 33, 2, 33), 12, 1, layout="padded", norm=True, rotary=10, interleaved=True),
    _Case("neox_part", (2, 4, 64, 2, 80), 16, 2, bias=True, rotary=32),
    _Case("pairs", (2, 4, 48, 3, 64), 16, 2, rotary=64, interleaved=True, layout="transposed"),
    _Case("pairs_part", (2, 3, 50, 2, 96), 24, 8, 8, rotary=48, interleaved=True, data_type_angles=True),
    _Case("odd", (3, 5, 77, 3, 29), 11, 4, layout="padded", bias=True),
    _Case("odd_pages", (3, 9, 65, 2, 65), 35, 6, 7, "padded", rotary=14),
    _Case("small_heads", (2, 4, 130, 9, 5), 9, 3, rotary=4),
    _Case("small_pages", (2, 6, 40, 2, 40), 21, 7, 1),
    _Case("together", (2, 16, 64, 4, 32), 20, 4, layout="together", rotary=32),
    _Case("pages_together", (2, 4, 64, 2, 64), 32, 13, 16, "together"),
    _Case("pages_transposed", (2, 17, 64, 3, 64), 64, 30, 32, "transposed", rotary=64),
    _Case("wide", (1, 3, 17, 1, 300), 9, 2, norm=True, rotary=300),
    _Case("many_rows", (3, 67, 40, 1, 64), 70, 2, bias=True, norm=True),
    _Case("long", (1, 19, 1031, 2, 64), 24, 5, bias=True, rotary=64),
    _Case("no_inputs", (2, 3, 0, 2, 16), 8, 1, bias=True, rotary=16),
    _Case("no_rows", (3, 0, 64, 2, 64), 8, 8, rotary=64),
    _Case("no_sequences", (0, 3, 64, 2, 64), 8, 1),
    _Case("no_heads", (2, 3, 64, 0, 64), 8, 1),
)


def _inputs(
    case: _Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """x, the weights and biases, angles; of a padded case x and the weights are parts of larger tensors."""
    batch, rows, hidden, heads, dim = case.sizes
    gap = 3 if case.layout == "padded" else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(batch, rows + gap, hidden + gap).to(device, dtype)[:, gap:, gap:]
    both = (normal(2 * heads * dim, hidden + gap) / max(hidden, 1) ** 0.5).to(device, dtype)[:, :hidden]
    biases: tuple[Any, ...] = (None, None)
    if case.bias:
        biases = tuple(normal(heads * dim).to(device, dtype) for _ in range(2))
    angles: tuple[Any, ...] = (None, None)
    if case.rotary:
        angle = torch.rand(rows, case.rotary // 2, generator=generator) * 6.3
        angles = tuple(
            t.to(device, dtype if case.data_type_angles else torch.float32) for t in (angle.cos(), angle.sin())
        )
    kwargs: dict[str, Any] = {}
    if case.norm:
        kwargs |= {"k_norm_weight": (1 + normal(dim) / 4).to(device, dtype), "k_norm_eps": 1e-5}
    if case.interleaved:
        kwargs["rope_interleaved"] = True
    return (x, both[: heads * dim], both[heads * dim :], *biases, *angles), kwargs


def samples(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    """Sizes around vectors, tiles and pages, every layout of a cache, with and without bias, norm and rotation."""
    for case in _CASES:
        generator = torch.Generator().manual_seed(seed)
        batch, _, _, heads, dim = case.sizes
        k_cache, v_cache, table = random_caches(
            batch, heads, case.capacity, dim, device, dtype, block=case.block, layout=case.layout, seed=seed
        )
        args, kwargs = _inputs(case, device, dtype, generator)
        if table is not None:
            kwargs["block_table"] = table
        yield Sample(case.name, (*args, k_cache, v_cache, case.start), kwargs)
