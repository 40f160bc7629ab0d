"""Argument checks: one wording for every backend, "fastops::<op>: <argument> must be <wanted>, got <given>".

csrc/common/check.h says the same in C++; tests compare the two message by message. A check reads shapes, dtypes,
devices and strides, never values, so it also runs on fake tensors and on symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ._ops import qualified

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, message: str) -> NoReturn:
    """Raise the error every backend raises."""
    raise RuntimeError(f"{qualified(op)}: {message}")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def device_name(tensor: Tensor) -> str:
    """`cpu`, `cuda:0`, …"""
    device = tensor.device
    return device.type if device.type in ("cpu", "meta") else f"{device.type}:{device.index or 0}"


def check_same_device(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """`tensor` must live where `first` lives."""
    if tensor.device != first.device:
        fail(op, f"{name} must be on {device_name(first)} like {first_name}, got {device_name(tensor)}")


def check_dtype(op: str, name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    """`tensor` must have exactly this dtype."""
    if tensor.dtype != wanted:
        fail(op, f"{name} must be {dtype_name(wanted)}, got {dtype_name(tensor.dtype)}")


def check_float_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """One of the three data types."""
    if dtype not in FLOAT_DTYPES:
        fail(op, f"{name} must be float32, float16 or bfloat16, got {dtype_name(dtype)}")


def check_power_of_two(op: str, name: str, value: int, low: int, high: int) -> None:
    """A power of two in [low, high]."""
    if not (low <= value <= high) or value & (value - 1):
        fail(op, f"{name} must be a power of two from {low} to {high}, got {value}")


def check_shape(op: str, name: str, shape: Sequence[int]) -> None:
    """No negative size, and a product that a tensor can have."""
    if any(size < 0 for size in shape):
        fail(op, f"{name} must have no negative size, got {list(shape)}")
    if all(isinstance(size, int) for size in shape) and math.prod(shape) >= 2**63:
        fail(op, f"{name} must have fewer than 2^63 weights, got {list(shape)}")


def ceil_div(a: int, b: int) -> int:
    """Ceiling of a / b for a >= 0."""
    return (a + b - 1) // b
