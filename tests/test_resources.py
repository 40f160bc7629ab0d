"""What the compiler made of the CUDA kernels: no spills, no local memory, and code for every promised architecture."""

import re
import subprocess
from pathlib import Path

import pytest

import fastops

if not fastops._extension.HAS_CUDA_KERNELS:
    pytest.skip("fastops._C has no CUDA kernels", allow_module_level=True)
_aot = pytest.importorskip("fastops.triton_ops._aot", reason="cuobjdump comes with Triton or the CUDA toolkit")

LIBRARY = Path(fastops._extension.C.__file__)


def cuobjdump(*arguments):
    return subprocess.run(
        [_aot.cuobjdump(), *arguments, str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def usage():
    """(kernel, registers, stack, local memory) of every kernel in every architecture."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert found, "cuobjdump printed no kernel"
    return [(name, int(registers), int(stack), int(local)) for name, registers, stack, local in found]


def test_no_kernel_spills(usage):
    """Bandwidth kernels hold everything in registers; products may park a few values, but never in their loop."""
    spilling = [row for row in usage if (row[2] or row[3]) and "nf4_gemv" not in row[0]]
    assert not spilling, spilling
    heavy = [row for row in usage if row[2] > 64]
    assert not heavy, heavy


def test_products_keep_their_loop_in_registers():
    """Between the first and the last matrix instruction of a kernel there is no access to local memory."""
    found = []
    for name, code in re.findall(r"Function : (\S*nf4_gemv\S*)(.*?)(?=Function : |\Z)", cuobjdump("-sass"), re.DOTALL):
        loop = re.search(r"\b(?:HMMA|HGMMA)\b.*\b(?:HMMA|HGMMA)\b", code, re.DOTALL)
        if loop and re.search(r"\b(?:STL|LDL)\b", loop[0]):
            found.append(name)
    assert not found, found


def test_registers_leave_room_for_full_blocks(usage):
    """Bandwidth kernels need threads: at 64 registers a multiprocessor holds 1024 of them."""
    heavy = [(name, registers) for name, registers, _, _ in usage if "dequant" in name or "nf4_quantize" in name]
    heavy = [(name, registers) for name, registers in heavy if registers > 64]
    assert not heavy, heavy


def test_architectures(usage):
    cubins = cuobjdump("-lelf")
    ptx = cuobjdump("-lptx")
    assert "sm_80" in cubins
    assert "sm_90" in cubins
    assert "sm_90" in ptx, "later devices need PTX"


def test_registers_are_reported(usage, record_property):
    """The report CI prints (pytest -rP): registers by kernel family."""
    by_family: dict[str, list[int]] = {}
    for name, registers, _, _ in usage:
        family = re.search(r"fastops\d+(nf4_\w+?)\d", name)
        by_family.setdefault(family[1] if family else name, []).append(registers)
    for family, registers in sorted(by_family.items()):
        print(f"{family}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers, no spills")
    assert by_family
