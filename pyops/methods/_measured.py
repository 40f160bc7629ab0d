"""What was measured once on this machine, remembered in a file of the user's."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def folder() -> Path:
    """Where measurements are kept: FASTOPS_CACHE, else fastops/ in the user's cache."""
    own = os.environ.get("FASTOPS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastops"


def machine(device: torch.device) -> str:
    """What measurements of a device hold for: its name, the threads where it is a CPU, and torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"cpu of {os.cpu_count()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def remembered(name: str, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures under `key` in <folder>/<name>.json; measured, and written there, where they are missing.

    A file that cannot be read, or does not hold figures, counts as missing; one that cannot be written is left.
    """
    path = folder() / f"{name}.json"
    known = _read(path)
    if key in known:
        return known[key]
    figures = measure()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({**_read(path), key: figures}, file, indent=1)
        os.replace(file.name, path)  # readers see the old file or the new one, whole
    return figures


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        key: figures
        for key, figures in known.items()
        if isinstance(figures, dict) and all(isinstance(f, (int, float)) for f in figures.values())
    }
