"""Thin methods: published systems assembled from the operators. A method holds no kernel."""

from .marche import Marche, MarcheConfig
from .nf4 import (
    Nf4Linear,
    accelerate_bitsandbytes,
    bitsandbytes_state_dict,
    quantize_model,
    restore_bitsandbytes,
)

__all__ = [
    "Marche",
    "MarcheConfig",
    "Nf4Linear",
    "accelerate_bitsandbytes",
    "bitsandbytes_state_dict",
    "quantize_model",
    "restore_bitsandbytes",
]
