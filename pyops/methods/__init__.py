"""Thin methods: published systems assembled from the operators. A method holds no kernel."""

from .nf4 import Nf4Linear, quantize_model

__all__ = ["Nf4Linear", "quantize_model"]
