"""Shipped and local tuning results: which configuration to launch, by table look-up, never by search.

A table is JSON, one file a device and op, under triton_ops/tuned/<gpu>/<op>.json (shipped) and
$FASTOPS_CACHE_DIR/tuned/<gpu>/<op>.json (written by `python -m fastops tune`, which goes first):

    {"op": "nf4_dequant", "gpu": "h100", "versions": {"torch": …, "triton": …}, "entries": [
      {"backend": "triton", "key": {"dtype": "bfloat16", "double_quant": false}, "size": 16777216,
       "config": {"TILE": 2048, "num_warps": 4}, "us": …, "default_us": …}]}

`key` must match exactly; of the entries that do, the one nearest in log(size) is used.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "tuned"


def local_folder() -> Path:
    """Where this machine's own tuning results live."""
    root = os.environ.get("FASTOPS_CACHE_DIR") or Path.home() / ".cache" / "fastops"
    return Path(root) / "tuned"


def device_slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`, `NVIDIA GeForce RTX 4090` -> `rtx4090`, `NVIDIA A100-SXM4-80GB` -> `a100`."""
    brands = ("", "nvidia", "geforce", "tesla", "quadro", "graphics")
    words = [w for w in re.split(r"[\s\-]+", name.lower()) if w not in brands]
    if not words:
        return "unknown"
    return "".join(words[:2]) if words[0] in ("rtx", "gtx", "titan") else words[0]


@functools.cache
def gpu_slug(index: int) -> str:
    """The slug of CUDA device `index`."""
    return device_slug(torch.cuda.get_device_name(index))


@functools.cache
def table(op: str, gpu: str) -> tuple[dict[str, Any], ...]:
    """All entries for an op on a device: the local ones first, then the shipped ones."""
    entries: list[dict[str, Any]] = []
    for folder in (local_folder(), SHIPPED):
        path = folder / gpu / f"{op}.json"
        if path.is_file():
            entries += json.loads(path.read_text())["entries"]
    return tuple(entries)


def gpus() -> list[str]:
    """Every device that has a table."""
    return sorted({path.name for folder in (local_folder(), SHIPPED) if folder.is_dir() for path in folder.iterdir()})


def nearest(op: str, gpu: str, backend: str, key: dict[str, Any], size: int) -> dict[str, Any] | None:
    """The configuration of the nearest entry, or None when no entry has this key."""
    best, best_distance = None, math.inf
    for entry in table(op, gpu):
        if entry["backend"] == backend and entry["key"] == key:
            distance = abs(math.log(max(size, 1) / max(entry["size"], 1)))
            if distance < best_distance:
                best, best_distance = entry["config"], distance
    return best


@functools.lru_cache(maxsize=4096)
def lookup(
    op: str,
    device: torch.device,
    key: tuple[tuple[str, Any], ...],
    size_log2: int,
    default: tuple[tuple[str, Any], ...],
) -> dict[str, Any]:
    """The Triton configuration for a launch; sizes are told apart by powers of two: this stays a dict look-up."""
    if device.type != "cuda":
        return dict(default)
    found = nearest(op, gpu_slug(device.index or 0), "triton", dict(key), 1 << size_log2)
    return found if found is not None else dict(default)
