"""README's table of operators, made from the source folders so that it is the same on every machine."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import typer

import fastops

from .. import _registry

HEADER = "| op | what it does | backends | results |\n| --- | --- | --- | --- |"


def ops_table() -> str:
    """One Markdown row an operator: name, first line of its docstring, its backends, its result files."""
    root = source_root()
    return "\n".join([HEADER, *(_row(root, name) for name in sorted(_registry.registry))])


def source_root() -> Path:
    """The checkout this package is imported from."""
    root = Path(_registry.__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():
        raise typer.BadParameter(f"--ops-table needs a checkout with csrc/, got fastops installed in {root}")
    return root


def backends_in(root: Path, name: str) -> list[str]:
    """The backends an operator has sources for: a family lives in the file named after its chief member."""
    stem = getattr(fastops, name).__module__.rpartition(".")[2]
    has = {
        "cuda": _registers(root / "csrc/cuda" / f"{stem}.cu", name),
        "triton": (root / "triton_ops" / f"{stem}.py").exists(),
        "cpu": _registers(root / "csrc/cpu" / f"{stem}.cpp", name),
        "reference": True,
    }
    return [backend for backend in _registry.BACKENDS if has[backend]]


def _registers(source: Path, name: str) -> bool:
    return source.exists() and re.search(rf'FO_IMPL\(\w+, "{name}"', source.read_text()) is not None


def _row(root: Path, name: str) -> str:
    does = (inspect.getdoc(getattr(fastops, name)) or "").partition("\n")[0].replace("|", "\\|")
    results = sorted(p.relative_to(root) for p in (root / "bench/results").glob(f"*/{name}.json"))
    links = ", ".join(f"[{path.parent.name}]({path.as_posix()})" for path in results)
    return f"| `{name}` | {does} | {', '.join(backends_in(root, name))} | {links or 'not measured yet'} |"
