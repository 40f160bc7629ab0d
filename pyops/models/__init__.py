"""Models that the methods run on: one decoder with parts that plug in, and the networks of the papers."""

from ._rows import Rows
from ._sampling import Sampling
from .caches import KVCache, UpfrontCache
from .decoder import Attention, Decoder, FullAttention
from .generation import Decoding, OneToken

__all__ = [
    "Attention",
    "Decoder",
    "Decoding",
    "FullAttention",
    "KVCache",
    "OneToken",
    "Rows",
    "Sampling",
    "UpfrontCache",
]
