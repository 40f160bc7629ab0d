"""The rules of the house: one op, one name, the same place in every folder; imports climb no floor and are quiet."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastops
from fastops import _registry
from fastops.reference._truth import truth

ROOT = Path(__file__).parent.parent
CHECKOUT = (ROOT / "pyops").is_dir()
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="needs the source checkout")

# Low to high: a file may import from its own floor or below. Optimised code never imports a reference.
FLOORS = {"reference": 0, "triton_ops": 1, "ops": 2, "models": 3, "methods": 4, "cli": 5}
MACHINERY = 2  # pyops/*.py

# An op's file in each folder carries the name of the chief member of its family.
FAMILY = {name: op.family for name, op in _registry.registry.items()}
# Ops with C++ CPU kernels (design.md, section 1); for the rest the vectorised reference is the CPU path.
CPU_OPS = re.compile(r"nf4_|kv_|\w*_attn|exit_argmax|mf_sgd|dense_linear")
CPU_ONLY = {"dense_linear"}  # on a GPU torch's own product of plain weights is the best there is


@pytest.mark.parametrize("op", FAMILY)
def test_siblings_exist(op):
    name = FAMILY[op]
    needed = [f"reference/{name}.py", f"pyops/ops/{name}.py", f"tests/test_{name}.py", f"bench/bench_{name}.py"]
    if op not in CPU_ONLY:
        needed.append(f"triton_ops/{name}.py")  # CUDA stands beside it where it measures faster
    if CPU_OPS.match(op):
        needed.append(f"csrc/cpu/{name}.cpp")
    missing = [path for path in needed if not (ROOT / path).is_file()]
    assert not missing, f"{op} lacks {missing}"


@pytest.mark.parametrize("op", FAMILY)
def test_a_family_has_one_page(op):
    assert FAMILY[FAMILY[op]] == FAMILY[op], "files carry the name of a member, the chief one"
    assert getattr(fastops, op).__module__ == f"fastops.ops.{FAMILY[op]}"
    assert _registry.registry[op]._triton in (None, FAMILY[op])


@pytest.mark.parametrize("op", FAMILY)
def test_the_reference_page_is_whole(op):
    page = importlib.import_module(f"fastops.reference.{FAMILY[op]}")
    assert callable(getattr(page, op)), f"reference/{FAMILY[op]}.py lacks {op}"
    about = truth(op, FAMILY[op])  # its own cost, samples, error and BUDGET, or the family's
    assert about.budget >= 0
    assert all(callable(part) for part in about[:3])
    assert callable(getattr(fastops, op))
    assert op in fastops.__all__


@pytest.mark.parametrize("op", [name for name, op in _registry.registry.items() if op.cuda_configs])
def test_every_cuda_configuration_can_be_tuned(op):
    """Python's count and the kernel's list of configurations agree."""
    places = (f"csrc/cuda/{FAMILY[op]}.cu", f"csrc/common/{FAMILY[op]}.cuh")  # kernels that ops share lie in common
    source = "".join((ROOT / place).read_text() for place in places if (ROOT / place).is_file())
    listed = re.search(r"kConfigs\[\] = \{(.*?)\};", source, flags=re.S)[1]
    assert listed.count("{") == _registry.registry[op].cuda_configs


def test_no_stray_kernel_files():
    names = set(FAMILY.values())
    for folder, suffix in (("csrc/cuda", ".cu"), ("csrc/cpu", ".cpp"), ("triton_ops", ".py"), ("reference", ".py")):
        stray = [
            p.name for p in (ROOT / folder).glob(f"*{suffix}") if p.stem not in names and not p.stem.startswith("_")
        ]
        assert not stray, f"{folder} holds {stray}, which belong to no op"


def floor_of(module: str) -> int | None:
    """The floor of `fastops.x.y`, or None outside the package."""
    parts = module.split(".")
    if parts[0] != "fastops":
        return None
    return FLOORS.get(parts[1], MACHINERY) if len(parts) > 1 else MACHINERY


def imported_modules(path: Path, package: str) -> list[str]:
    """Absolute names of what a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


SOURCES = [
    (path, "fastops" if folder == "pyops" and not relative.parent.name else f"fastops.{relative.parent.name or folder}")
    for folder in ("pyops", "triton_ops", "reference")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for relative in [path.relative_to(ROOT / folder)]
]


@pytest.mark.parametrize(
    ("path", "package"), SOURCES, ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else ""
)
def test_imports_climb_no_floor(path, package):
    own = FLOORS["cli"] if path.name == "__main__.py" else FLOORS.get(package.partition(".")[2], MACHINERY)
    for module in imported_modules(path, package):
        floor = floor_of(module)
        if floor is None:
            continue
        names = module.split(".")
        if path.name == "__init__.py" and package == "fastops":
            continue  # the front door names what is public
        assert floor <= own, f"{path.name} (floor {own}) imports {module} (floor {floor})"
        if own == FLOORS["triton_ops"]:
            assert "reference" not in names, f"optimised code imports the reference: {module}"


def test_floor_rule_sees_a_violation(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from ..methods import nf4\nfrom ..reference import nf4_dequant\n")
    modules = imported_modules(bad, "fastops.triton_ops")
    assert modules == ["fastops.methods.nf4", "fastops.reference.nf4_dequant"]
    assert floor_of(modules[0]) > FLOORS["triton_ops"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc").rglob("*.c*")) + sorted((ROOT / "csrc").rglob("*.h")), ids=lambda p: p.name
)
def test_kernels_include_common_only(path):
    own = re.findall(r'#include "([^"]+)"', path.read_text())
    assert all(name.startswith("common/") for name in own), own


def test_kernel_files_state_their_floor():
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cpu").glob("*.cpp")]:
        head = path.read_text()[:1200]
        assert head.startswith(f"// {path.stem}: "), f"{path.name} must open with its op"
        for stated in ("Floor at ", "bench/results/"):
            assert stated in head, f"{path.name} must state its floor and its results"


def test_the_namespace_is_named_once():
    """Another namespace must be one line away (Hugging Face kernels generate it): nobody spells torch.ops.fastops."""
    for path, _ in SOURCES:
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.fastops")), path


def test_import_is_quiet_quick_and_touches_no_gpu():
    code = (
        "import time, torch; start = time.perf_counter(); import fastops; took = time.perf_counter() - start\n"
        "assert not torch.cuda.is_initialized(); assert took < 2, took\n"
        "import sys; assert 'cupy' not in sys.modules and 'fastops.triton_ops.nf4_dequant' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_only_interop_imports_cupy():
    for path, _ in SOURCES:
        if path.name != "interop.py":
            assert not re.search(r"^\s*(import|from) cupy", path.read_text(), flags=re.M), path
