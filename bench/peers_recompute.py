"""The competition of kv_recompute: eager PyTorch, and the bare product at the speed of the matrix library.

The bare product, one of [w_k; w_v], leaves out bias, norm, rotation and the caches: it is no peer that a user could
take instead but the rate that ours is held against.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import PRODUCT, Absent, Peer

if TYPE_CHECKING:
    from .harness import Call
    from .timing import Runner


def torch_recompute(call: Call) -> Runner:
    """Two linear layers, the rotary embedding as transformers has it, and a copy into each cache."""
    x, w_k, w_v, b_k, b_v, cos, sin, k_cache, v_cache, start = call.args
    if call.kwargs:
        raise Absent("it is written for contiguous caches, halves, and no norm")
    heads, dim = k_cache.shape[1], k_cache.shape[3]
    rows = slice(start, start + x.shape[1])
    full = None if cos is None else [torch.cat([t, t], dim=-1).to(x.dtype) for t in (cos, sin)]

    def run() -> tuple[Tensor, Tensor]:
        k, v = (F.linear(x, w, b).unflatten(-1, (heads, dim)).transpose(1, 2) for w, b in ((w_k, b_k), (w_v, b_v)))
        if full is not None:
            first, second = k.chunk(2, dim=-1)
            k = k * full[0] + torch.cat([-second, first], dim=-1) * full[1]
        k_cache[:, :, rows], v_cache[:, :, rows] = k, v
        return k_cache, v_cache

    return run


def bare_product(call: Call) -> Runner:
    """[B, L, 2 Hkv D]."""
    return functools.partial(F.linear, call.args[0], torch.cat([call.args[1], call.args[2]]))


RECOMPUTE = {
    "torch": Peer(torch_recompute, PRODUCT),
    # Its output is no cache, so what it computes is not compared.
    "cublas": Peer(bare_product, math.inf, device="cuda"),
    "bare product": Peer(bare_product, math.inf, device="cpu"),
}
