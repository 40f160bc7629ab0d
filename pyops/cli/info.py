"""`python -m fastops info`: the machine, the versions, the extension, and who runs each operator."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastops

from .. import _extension, _registry
from ._ops_table import ops_table
from ._terminal import say, show_table


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    markdown: Annotated[
        bool, typer.Option("--ops-table", help="Print README's Markdown table of operators instead (in a checkout).")
    ] = False,
) -> None:
    """Show devices, versions, the extension, and each op's backends."""
    if markdown:
        say(ops_table())
        return
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for title in ("versions", "extension"):
        _show_facts(title, facts[title])
    for device in facts["devices"]:
        _show_facts(f"device {device['device']}", {k: v for k, v in device.items() if k != "device"})
    for device in facts["devices"]:
        say(f"operators on {device['device']}")
        show_table(
            ("op", "chosen", "because", "available", "not available"),
            [_op_row(name, op[device["device"]]) for name, op in facts["ops"].items()],
        )


def collect() -> dict[str, Any]:
    """Everything `info` knows, as JSON types."""
    devices = [cpu_facts(), *(cuda_facts(i) for i in range(torch.cuda.device_count()))]
    return {
        "versions": versions(),
        "extension": extension_facts(),
        "devices": devices,
        "ops": {
            name: {d["device"]: op_facts(op, torch.device(d["device"])) for d in devices}
            for name, op in sorted(_registry.registry.items())
        },
    }


def versions() -> dict[str, str | None]:
    """Of everything that shapes a result; None where it is not there."""
    return {
        "fastops": fastops.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda (of torch)": torch.version.cuda,
        "nvidia driver": driver_version(),
        "bitsandbytes": _version("bitsandbytes"),
    }


def driver_version() -> str | None:
    """The NVIDIA kernel driver's version."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", path.read_text()) if path.exists() else None
    return found[0] if found else None


def extension_facts() -> dict[str, str | bool]:
    """Where the compiled parts are and what they hold, or why they are missing."""
    facts: dict[str, str | bool] = {"kernels": _extension.C_MISSING}
    if _extension.C is not None:
        facts = {
            "kernels": str(_extension.C.__file__),
            "cuda kernels": _extension.HAS_CUDA_KERNELS,
            "cpu instruction set": _extension.C.cpu_isa(),
        }
    return facts | {"host objects": _extension.HOST_MISSING or str(getattr(_extension.host, "__file__", ""))}


def cpu_facts() -> dict[str, Any]:
    """This processor."""
    facts: dict[str, Any] = {"device": "cpu", "name": cpu_name(), "threads of torch": torch.get_num_threads()}
    if _extension.host is None:
        return facts | {"cores": os.cpu_count()}
    cpu = _extension.host.Cpu()
    return facts | {"cores": cpu.cores, "L2": _size(cpu.l2_bytes), "L3": _size(cpu.l3_bytes), "instructions": cpu.isa}


def cpu_name() -> str:
    """The processor's marketing name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def cuda_facts(index: int) -> dict[str, Any]:
    """One CUDA device."""
    device = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": device.name,
        "compute capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": _size(device.total_memory),
        "L2": _size(device.L2_cache_size),
    }


def op_facts(op: _registry.Op, device: torch.device) -> dict[str, Any]:
    """Who can run an operator on a device, who does by default, and why not the others."""
    chosen, reason = op.process_default(device)
    missing = {b: op.unavailable(b, device) for b in _registry.BACKENDS}
    return {
        "chosen": chosen,
        "reason": reason,
        "available": op.available(device),
        "unavailable": {backend: why for backend, why in missing.items() if why},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _size(size: int) -> str:
    """Bytes for people: "512 KiB"; "unknown" for the 0 of a system that does not tell."""
    if size <= 0:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size / 2**10:.4g} KiB"


def _show_facts(title: str, facts: Mapping[str, Any]) -> None:
    say(title)
    width = max(map(len, facts))
    for name, value in facts.items():
        say(f"  {name.ljust(width)}  {_shown(value)}")
    say()


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _op_row(name: str, facts: Mapping[str, Any]) -> list[str]:
    missing = "; ".join(f"{backend}: {why}" for backend, why in facts["unavailable"].items())
    return [name, facts["chosen"], facts["reason"], ", ".join(facts["available"]), missing]
