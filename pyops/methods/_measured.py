"""What was measured once on this machine, remembered in files of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def folder() -> Path:
    """Where measurements are kept: FASTOPS_CACHE_DIR, else fastops/ in the user's cache.

    Raises:
        RuntimeError: there is no home.
    """
    own = os.environ.get("FASTOPS_CACHE_DIR")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fastops"


def machine(device: torch.device) -> dict[str, Any]:
    """What every measurement of a device holds for: its name, or a CPU's threads, and torch."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"cpu {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def remembered(
    kind: str, about: dict[str, Any], measure: Callable[[], T], save: Callable[[T], Any], load: Callable[[Any], T]
) -> T:
    """What is in <folder>/<kind>/<hash of about>.json; measured, and written there, where it is not.

    Args:
        kind: of measurement.
        about: all that it depends on, as JSON has it.
        measure: makes it.
        save, load: to JSON and back; load raises ValueError, TypeError, LookupError or AttributeError where it is not
            sound, which is then measured again. A folder that cannot be written costs no more than time.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    try:
        path: Path | None = folder() / kind / f"{key}.json"
    except RuntimeError:
        path = None
    if path is not None:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            content = json.loads(path.read_text())
            if content["about"] == about:
                return load(content["measured"])
    value = measure()
    if path is not None:
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps({"about": about, "measured": save(value)}, indent=2) + "\n")
    return value


def write_atomically(path: Path, text: str) -> None:
    """By renaming: who reads finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
