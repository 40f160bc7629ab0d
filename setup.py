"""Build fastops: one CMake run makes _C (stable ABI) and, where pybind11 is installed, _host.

Environment, all optional:
    FASTOPS_PURE=1           no compiled code at all (Triton and reference remain)
    FASTOPS_CUDA=0           CPU kernels only, even where nvcc is present
    FASTOPS_HOST=0           leave out _host, so that one wheel serves every Python from 3.10 up
    TORCH_CUDA_ARCH_LIST     architectures as torch spells them, e.g. "8.0;9.0a;9.0+PTX"; the default is sm_80, sm_90a
                             and the PTX of 9.0 for every later device
    MAX_JOBS                 parallel compile jobs
A machine that lacks what a build needs (a C++ compiler, CMake, Ninja, Python's headers) gets the pure install and a
line that says why.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pyops/_version.py").read_text()).group(1)
ARCHITECTURES = "80-real;90a-real;90-virtual"  # torch's spelling has no word for PTX alone


def flag(name: str, default: bool) -> bool:
    return os.environ.get(name, "1" if default else "0").lower() not in ("0", "false", "off", "no")


def missing() -> str:
    """What a build needs and this machine lacks, or ""."""
    if not any(shutil.which(c) for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c):
        return "no C++ compiler found"
    for program in ("cmake", "ninja"):
        if not shutil.which(program):
            return f"no {program} on PATH"
    headers = Path(sysconfig.get_path("include"))
    return "" if (headers / "Python.h").is_file() else f"no Python.h in {headers}"


def cuda_architectures(arch_list: str) -> str:
    """CMake's spelling of torch's list: "8.0;9.0a;9.0+PTX" -> "80-real;90a-real;90-real;90-virtual"."""
    out = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: each entry must look like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2] + match[3]
        out.append(f"{number}-real")
        if match[4]:
            out.append(f"{number}-virtual")
    return ";".join(out)


class CMakeBuild(build_ext):
    """Run CMake once and put each module where setuptools expects it."""

    def run(self) -> None:
        if not self.extensions:  # a pure install; `build_ext` was asked for by name
            return
        torch = importlib.util.find_spec("torch")
        if torch is None:
            sys.exit(
                "building fastops needs torch >= 2.10 installed: pip install torch, then pip install "
                "--no-build-isolation ."
            )
        build = Path(self.build_temp).resolve()
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
        args = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DTORCH_DIR={Path(torch.origin).parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTOPS_CUDA={'ON' if flag('FASTOPS_CUDA', True) else 'OFF'}",
            f"-DFASTOPS_HOST={'ON' if flag('FASTOPS_HOST', True) else 'OFF'}",
            # Always given: CMake's cache would remember the list of an earlier run.
            f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(arch_list) if arch_list else ARCHITECTURES}",
        ]  # fmt: skip
        subprocess.run(args, check=True)
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        with open(build / "compile.log", "w") as log:  # what the compilers said, ptxas' resource report included
            done = subprocess.run(
                ["cmake", "--build", str(build), "-j", jobs],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            log.write(done.stdout)
        if done.returncode:
            sys.exit(done.stdout)
        for extension in self.extensions:
            stem = extension.name.rpartition(".")[2]
            target = Path(self.get_ext_fullpath(extension.name))
            for stale in target.parent.glob(f"{stem}.*so"):
                stale.unlink()
            built = sorted(build.glob(f"{stem}.*so"))
            if built:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built[0], target.with_name(built[0].name))
        if self.inplace:
            self.copy_extensions_to_source()

    def copy_extensions_to_source(self) -> None:
        """Copy what was built into pyops/, whatever suffix it carries (_host is optional, _C is abi3)."""
        for extension in self.extensions:
            stem = extension.name.rpartition(".")[2]
            for stale in (ROOT / "pyops").glob(f"{stem}.*so"):
                stale.unlink()
            for built in Path(self.build_temp).glob(f"{stem}.*so"):
                shutil.copy2(built, ROOT / "pyops" / built.name)


class Abi3Wheel(bdist_wheel):
    """Tag the wheel cp310-abi3 when it holds nothing tied to one Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.distribution.ext_modules and not flag("FASTOPS_HOST", True):
            return "cp310", "abi3", platform
        return python, abi, platform


def extensions() -> list[Extension]:
    if flag("FASTOPS_PURE", False):
        return []
    if reason := missing():
        print(f"fastops: {reason}: a pure install (Triton and reference backends)", file=sys.stderr)
        return []
    names = ["fastops._C"] + (["fastops._host"] if flag("FASTOPS_HOST", True) else [])
    return [Extension(n, sources=[], py_limited_api=n == "fastops._C", optional=n == "fastops._host") for n in names]


setup(
    version=VERSION,
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel},
)
