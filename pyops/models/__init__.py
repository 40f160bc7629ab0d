"""Models that the methods run on: decoders, and the networks of the papers."""

from .two_tower import Tower, TwoTower

__all__ = ["Tower", "TwoTower"]
