"""What stands between the products of a decoder: norms, rotary embedding, activation.

Functions of tensors alone, so that torch.compile fuses each into a kernel or two once, for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm): RMSNorm, or LayerNorm where there is a bias. Both [N, H]."""
    if delta is not None:
        x = x + delta
    if bias is not None:
        return x, functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, functional.rms_norm(x, x.shape[-1:], weight, eps)


def split_heads(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, norm: Tensor | None, eps: float, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, Hq, D], k and v [N, Hkv, D] of qkv [N, (Hq + 2 Hkv) D].

    Heads of q and k are normed (norm [Hq + Hkv, D], Qwen3), then rotated by cos and sin [N, R / 2] fp32: element i
    of the first half of R with element i of the second.
    """
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if norm is not None:
        wide = qk.float()
        qk = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(qk.dtype) * norm
    if cos is not None and sin is not None:
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        low, high = qk[..., :half].float(), qk[..., half : 2 * half].float()
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(qk.dtype)
        qk = turned if 2 * half == qk.shape[-1] else torch.cat([turned, qk[..., 2 * half :]], dim=-1)
    return qk[:, :heads], qk[:, heads:], v


def activate(up: Tensor, gated: bool) -> Tensor:
    """silu(gate) * up of [N, 2 I] that holds the gates first, or relu(up)."""
    if not gated:
        return up.relu()
    gate, up = up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@functools.cache
def glue(compiled: bool) -> Any:
    """The functions above, eager or compiled."""
    make: Callable[..., Any] = (
        functools.partial(torch.compile, fullgraph=True, dynamic=True) if compiled else lambda f: f
    )
    return SimpleNamespace(add_norm=make(add_norm), split_heads=make(split_heads), activate=make(activate))
