"""Ahead-of-time compilation of a page's kernels for a GPU that is not here: what CI compiles, and what it learns."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory a block can have (bytes), by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Specialization:
    """One compilation of a kernel: pointer and scalar types by argument name, compile-time values, launch options.

    `since`: the lowest compute capability that is launched so (tensor descriptors are for sm_90 on).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Mapping[str, Any]
    since: int = 80


@dataclass(frozen=True)
class Report:
    """What the compiler used."""

    registers: int
    stack: int
    shared: int


def configurations(
    space: list[dict[str, Any]], default: dict[str, Any], entries: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every configuration that can be launched: the default, the search space and the shipped winners, each once."""
    seen: list[dict[str, Any]] = []
    for config in (default, *space, *(e["config"] for e in entries)):
        if config not in seen:
            seen.append(config)
            yield config


def compile_for(capability: int, spec: Specialization) -> Report:
    """Compile for sm_<capability> without a GPU and report registers, stack (spills) and shared memory, in bytes."""
    names = spec.kernel.arg_names
    constants = {**spec.constants, **{k: v for k, v in spec.config.items() if k not in _OPTIONS}}
    constants.update({n: None for n in names if n not in spec.types and n not in constants})
    signature = {n: spec.types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    options = {k: v for k, v in spec.config.items() if k in _OPTIONS} | {"enable_fp_fusion": False}
    compiled = triton.compile(
        ASTSource(spec.kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump(), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return Report(int(registers), int(stack), compiled.metadata.shared)


def cuobjdump() -> str:
    """The disassembler: the toolkit's, or the one in Triton's wheel."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or str(bundled)
