"""Shipped and local tuning results: which configuration to launch, by table look-up, never by search.

A table is JSON, one file a device and op, under triton_ops/tuned/<gpu>/<op>.json (shipped) and
$FASTOPS_CACHE_DIR/tuned/<gpu>/<op>.json (written by `python -m fastops tune`, which goes first):

    {"op": "nf4_dequant", "gpu": "h100", "versions": {"torch": …, "triton": …}, "entries": [
      {"backend": "triton", "key": {"dtype": "bfloat16", "double_quant": false}, "size": 16777216,
       "config": {"WORDS": 2048, "num_warps": 4}, "us": …, "default_us": …}]}

`key` must match exactly; of the entries that do, the one nearest in log(size) is used.

A shipped table that is wrong fails loudly. The user's never stop an import: without a readable folder there are none,
and what is damaged, or was written by a version with other names, is left out with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "tuned"

Shape = frozenset[tuple[str, type]]  # the names in an entry's key and config, with the types of their values


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
    return (*_local(op, gpu), *_shipped(op, gpu))


def _shipped(op: str, gpu: str) -> list[dict[str, Any]]:
    path = SHIPPED / gpu / f"{op}.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"] if path.is_file() else []
    return entries


def _local(op: str, gpu: str) -> list[dict[str, Any]]:
    """The sound entries of this machine's own table; one warning for a file with others."""
    try:
        path = local_folder() / gpu / f"{op}.json"
        content = path.read_bytes()
    except (OSError, RuntimeError):  # no such file, none that this user may read, or (RuntimeError) no home
        return []
    try:
        entries = json.loads(content)["entries"]
    except (ValueError, LookupError, TypeError, RecursionError) as why:
        return _ignored(path, f"it holds no table ({type(why).__name__}: {why})")
    if not isinstance(entries, list):
        return _ignored(path, "its entries are no list")
    known = _shapes(op)
    good = [e for e in entries if _is_sound(e) and _is_current(e, known)]
    if len(good) < len(entries):
        _ignored(path, f"{len(entries) - len(good)} of its {len(entries)} entries are malformed or of another version")
    return good


def _ignored(path: Path, why: str) -> list[dict[str, Any]]:
    """Say once which file was not used, or not all of it, and what to do."""
    warnings.warn(f"fastops ignores tuning results in {path}: {why}; run `python -m fastops tune` again", stacklevel=2)
    return []


def _is_sound(entry: Any) -> bool:
    """Whether an entry has every field that a look-up reads, of the right type."""
    if not isinstance(entry, dict) or not {"backend", "key", "size", "config"} <= entry.keys():
        return False
    key, size, config = entry["key"], entry["size"], entry["config"]
    if not (isinstance(key, dict) and isinstance(config, dict) and type(size) is int and 0 < size < 1 << 63):
        return False
    if not isinstance(getattr(torch, str(key.get("dtype", "float32")), None), torch.dtype):
        return False
    return entry["backend"] != "cuda" or (type(config.get("index")) is int and config["index"] >= 0)


def _shape(entry: dict[str, Any]) -> Shape:
    return frozenset((name, type(value)) for part in ("key", "config") for name, value in entry[part].items())


def _shapes(op: str) -> dict[str, set[Shape]]:
    """{backend: the shapes of its shipped entries}, from all devices."""
    shapes: dict[str, set[Shape]] = {}
    for path in SHIPPED.glob(f"*/{op}.json"):
        for entry in _shipped(op, path.parent.name):
            shapes.setdefault(entry["backend"], set()).add(_shape(entry))
    return shapes


def _is_current(entry: dict[str, Any], known: dict[str, set[Shape]]) -> bool:
    """Whether a sound entry has the shape of a shipped one, where any are shipped: an older fastops had others."""
    shapes = known.get(str(entry["backend"]))
    return shapes is None or _shape(entry) in shapes


def gpus() -> list[str]:
    """Every device that has a table."""
    names = {path.name for path in SHIPPED.iterdir()} if SHIPPED.is_dir() else set()
    with contextlib.suppress(OSError, RuntimeError):  # as in _local
        names |= {path.name for path in local_folder().iterdir()}
    return sorted(names)


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
