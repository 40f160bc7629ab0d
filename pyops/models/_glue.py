"""What stands between the products of a decoder: norms, rotary embedding, activation.

Functions of tensors alone, so that torch.compile fuses each into a kernel or two once, for all layers.
"""

from __future__ import annotations

import functools
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm): RMSNorm, with eps [1] fp32, or LayerNorm where there is a bias. Both [N, H].

    functional.rms_norm is eight kernels on a CPU, this is five: what one row waits for is kernels, not elements.
    """
    if delta is not None:
        x = x + delta
    if bias is not None:
        assert isinstance(eps, float)
        return x, functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert isinstance(eps, Tensor)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    if torch.compiler.is_compiling():  # where sizes are symbols, and all of this is one kernel anyway
        inverse = torch.rsqrt(length * length / x.shape[-1] + eps)
    else:
        inverse = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return x, (x * inverse).mul_(weight).to(x.dtype)


def split_heads(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: Tensor | None,
    eps: float | Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, Hq, D], k and v [N, Hkv, D] of qkv [N, (Hq + 2 Hkv) D].

    Heads of q and k are normed (norm [Hq + Hkv, D], Qwen3), then rotated by cos and sin [N, 1, R] fp32, as
    Decoder.angles makes them: element i of the first half of R with element i of the second.
    """
    qk, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads + kv_heads, kv_heads), dim=1)
    if norm is not None:
        wide = qk.float()
        qk = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(qk.dtype) * norm
    if cos is not None and sin is not None:
        rotary = cos.shape[-1]
        turning = qk[..., :rotary].float()
        turned = torch.addcmul(turning * cos, turning.roll(rotary // 2, -1), sin).to(qk.dtype)
        qk = turned if rotary == qk.shape[-1] else torch.cat([turned, qk[..., rotary:]], dim=-1)
    q, k = qk.split((heads, kv_heads), dim=1)
    return q, k, v


def activate(up: Tensor, gated: bool) -> Tensor:
    """silu(gate) * up of [N, 2 I] that holds the gates first, or relu(up)."""
    if not gated:
        return up.relu()
    gate, up = up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


@functools.cache
def glue(compiled: bool, *kind: Any) -> Any:
    """The functions above, eager or compiled: for each `kind` of decoder apart.

    torch.compile keeps eight variants of a code object and then refuses; a kind of decoder has fewer than that.
    """
    functions = {f.__name__: f for f in (add_norm, split_heads, activate)}
    if compiled:
        functions = {name: _compiled(f) for name, f in functions.items()}
    return SimpleNamespace(**functions)


def _compiled(f: Any) -> Any:
    own = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True)
