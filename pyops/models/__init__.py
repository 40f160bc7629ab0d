"""Models that the methods run on: one decoder with parts that plug in, and the networks of the papers."""

from ._rows import Rows
from ._sampling import Sampling
from .caches import KVCache, UpfrontCache
from .decoder import Attention, Decoder, FullAttention
from .generation import Decoding, OneToken
from .mar import MAR_BASE, MAR_HUGE, MAR_LARGE, Mar, MarConfig
from .two_tower import Tower, TwoTower

__all__ = [
    "MAR_BASE",
    "MAR_HUGE",
    "MAR_LARGE",
    "Attention",
    "Decoder",
    "Decoding",
    "FullAttention",
    "KVCache",
    "Mar",
    "MarConfig",
    "OneToken",
    "Rows",
    "Sampling",
    "Tower",
    "TwoTower",
    "UpfrontCache",
]
