"""What was measured, on disk: bench/results/<device>/<op>.json (methods/<method>.json) and bench/peaks/<device>.json.

The keys of a record are fixed, since reports and checks read them. A newer measurement of the same (op, case, backend,
dtype, graphed) replaces the older one; `kernel_hash` tells whether the backend's sources have changed since.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastops.triton_ops._tuned import device_slug

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PEAKS = ROOT / "bench" / "peaks"

Record = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The name of results' folders: `cpu`, `h100`, `h200`, `a100`, …"""
    return "cpu" if device.type == "cpu" else device_slug(full_name(device))


def full_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver."""
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if match:
            return match[1]
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])


def _output(command: Sequence[str]) -> str | None:
    """First line a command prints, or None when it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.partition("\n")[0].strip() or None
    return None


def commit() -> str:
    """$FASTOPS_COMMIT (a copy of the tree may have no .git), or the checked-out commit."""
    return os.environ.get("FASTOPS_COMMIT") or _output(["git", "rev-parse", "HEAD"]) or "unknown"


@functools.cache
def environment(device: torch.device) -> Record:
    """The keys that are the same for every record of a run."""
    on_gpu = device.type == "cuda"
    env = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return env if on_gpu else {**env, "threads": torch.get_num_threads()}


def op_sources(stem: str, backend: str) -> tuple[str, ...]:
    """The files a backend's kernel is made of, as globs under the root.

    Only its own, headers as far as it includes them, so that other edits leave the results valid. Of `cuda` the headers
    are the .cuh, whose code runs on the device, and those that choose what runs (*_plan.h); what another host header
    changes does not run there, constants of the format and the layout of arguments aside.

    Args:
        stem: the op, or its family's chief member.
        backend: "cuda" | "triton" | "cpu" | "reference".
    """
    return {
        "cuda": _with_headers(f"csrc/cuda/{stem}.cu", (".cuh", "_plan.h")),
        "triton": _with_shared(f"triton_ops/{stem}.py"),
        "cpu": _with_headers(f"csrc/cpu/{stem}.cpp", (".h",)),
        "reference": (f"reference/{stem}.py",),
    }[backend]


def _with_headers(source: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    """`source` and what it includes of csrc/common, directly or not, under these endings."""
    seen, left = {source}, [source]
    while left:
        file = ROOT / left.pop()
        text = file.read_text() if file.exists() else ""
        new = {f"csrc/{name}" for name in re.findall(r'^\s*#include "(common/\S+)"', text, re.MULTILINE)} - seen
        seen |= new
        left += new
    return (source, *sorted(f for f in seen - {source} if f.endswith(endings)))


def _with_shared(page: str) -> tuple[str, ...]:
    """`page` of triton_ops and the files of kernels' parts, `from ._name import`, that it shares with others."""
    file = ROOT / page
    text = file.read_text() if file.exists() else ""
    return page, *(f"triton_ops/{name}.py" for name in re.findall(r"^from \.(_\w+) import", text, re.MULTILINE))


def kernel_hash(sources: Iterable[str]) -> str:
    """16 hex digits of SHA-256 over the names and contents of the files that `sources` match."""
    digest = hashlib.sha256()
    for file in sorted({f for pattern in sources for f in ROOT.glob(pattern) if f.is_file()}):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def key(record: Record) -> str:
    """What a newer record must share with an older one to replace it."""
    return json.dumps([record[k] for k in ("op", "case", "backend", "dtype", "graphed")], sort_keys=True)


def case_key(record: Record) -> str:
    """The case alone, whatever ran it."""
    return json.dumps([record["case"], record["dtype"]], sort_keys=True)


def _order(record: Record) -> tuple[Any, ...]:
    sizes = [(name, *_comparable(value)) for name, value in record["case"].items()]
    return record["dtype"], sizes, record["graphed"], record["backend"]


def _comparable(value: Any) -> tuple[float, str]:
    """Numbers in numeric order, before words."""
    return (float(value), "") if isinstance(value, (int, float)) else (float("inf"), str(value))


def write_json(path: Path, content: Any) -> None:
    """Pretty-printed, by atomic rename: a run that is cut off leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def load(device: str, name: str) -> list[Record]:
    """The committed records of a page on a device; `name` is its file's: an op's, or "methods/<method>"."""
    path = RESULTS / device / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def save(device: str, name: str, new: Sequence[Record]) -> None:
    """Put `new` in the place of older measurements of the same."""
    merged = {key(r): r for r in [*load(device, name), *new]}
    write_json(RESULTS / device / f"{name}.json", sorted(merged.values(), key=_order))


def prune(device: str, name: str, cases: Iterable[str]) -> None:
    """Drop records of cases (as `case_key`) that the bench no longer has: nothing can bring them up to date."""
    wanted, old = set(cases), load(device, name)
    kept = [r for r in old if case_key(r) in wanted]
    if len(kept) < len(old):
        write_json(RESULTS / device / f"{name}.json", kept)


def save_peaks(device: torch.device, peaks: Mapping[str, float]) -> None:
    """What this run found the device can do."""
    env = environment(device)
    write_json(PEAKS / f"{env['device']}.json", {**env, "name": full_name(device), **peaks})


def all_results() -> dict[str, dict[str, list[Record]]]:
    """{device: {op or method: records}} of everything committed, methods last."""
    found: dict[str, dict[str, list[Record]]] = {}
    for file in [*sorted(RESULTS.glob("*/*.json")), *sorted(RESULTS.glob("*/methods/*.json"))]:
        found.setdefault(file.relative_to(RESULTS).parts[0], {})[file.stem] = json.loads(file.read_text())
    return found
