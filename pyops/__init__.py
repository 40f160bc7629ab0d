"""fastops: GPU kernels for fast inference, under torch.ops.fastops, each with a reference and a CPU path.

    import torch, fastops
    packed, absmax = fastops.nf4_quantize(weight)
    weight_again = fastops.nf4_dequant(packed, absmax, weight.shape, torch.bfloat16)

The same operators are torch.ops.fastops.*; `fastops.explain(op, *args)` says which kernel runs, `python -m fastops`
lists, proves and measures them.
"""

from . import _extension as _extension  # isort: skip  # compiled kernels register before their schemas are defined
from . import interop
from ._registry import debug_checks, explain, use_backend
from ._version import __version__
from .ops.attn_received import attn_received
from .ops.decode_attn import decode_attn
from .ops.dense_linear import dense_linear, dense_panels
from .ops.kv_append import kv_append, kv_compact, kv_scatter
from .ops.kv_recompute import kv_recompute
from .ops.merge_state import merge_state
from .ops.mf_sgd import mf_sgd
from .ops.nf4_dequant import nf4_dequant
from .ops.nf4_gemv import nf4_gemv, nf4_linear, nf4_linear_dx
from .ops.nf4_quantize import nf4_quantize
from .ops.prefill_attn import prefill_attn
from .ops.split_attn import split_attn
from .ops.tree_build import tree_build

__all__ = [
    "__version__",
    "attn_received",
    "debug_checks",
    "decode_attn",
    "dense_linear",
    "dense_panels",
    "explain",
    "interop",
    "kv_append",
    "kv_compact",
    "kv_recompute",
    "kv_scatter",
    "merge_state",
    "mf_sgd",
    "nf4_dequant",
    "nf4_gemv",
    "nf4_linear",
    "nf4_linear_dx",
    "nf4_quantize",
    "prefill_attn",
    "split_attn",
    "tree_build",
    "use_backend",
]
