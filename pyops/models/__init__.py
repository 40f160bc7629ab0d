"""The substrates that methods work on: models in plain PyTorch, with the parts that methods vary as parts."""

from .mar import BASE, HUGE, LARGE, Mar, MarConfig

__all__ = ["BASE", "HUGE", "LARGE", "Mar", "MarConfig"]
