"""Thin methods: published systems assembled from the operators. A method holds no kernel."""

from ._kvpr_column import generate_column
from ._kvpr_weights import OffloadedWeights
from .bmc import GrowingCache, PaddedAttention, register_attention, transformers_cache
from .cadc import Cadc, compress
from .kvpr import OffloadedCache
from .marche import Marche, MarcheConfig
from .nf4 import (
    Nf4Linear,
    accelerate_bitsandbytes,
    bitsandbytes_state_dict,
    quantize_model,
    restore_bitsandbytes,
)

__all__ = [
    "Cadc",
    "GrowingCache",
    "Marche",
    "MarcheConfig",
    "Nf4Linear",
    "OffloadedCache",
    "OffloadedWeights",
    "PaddedAttention",
    "accelerate_bitsandbytes",
    "bitsandbytes_state_dict",
    "compress",
    "generate_column",
    "quantize_model",
    "register_attention",
    "restore_bitsandbytes",
    "transformers_cache",
]
