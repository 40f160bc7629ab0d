"""What a call costs before any work: our ways into an op against a bare op of the same schema on the same stable ABI.

64 weights on the CPU, one thread: what is left is boxing, dispatch, argument checks and one small allocation.
The bare op is the floor: it checks nothing and computes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

import fastops
from fastops import _registry
from fastops.reference import nf4_dequant as reference

from . import records
from .bench_nf4_dequant import make
from .harness import Call, Case, Outcome, Session, make_record
from .records import Record
from .timing import FULL, Runner

NAMESPACE = "fastops_bench"
SOURCE = Path(__file__).with_name("bare_op.cpp")
BEST_OF = 7

_kept: list[torch.library.Library] = []  # a Library takes its definitions with it when it dies

CASES = [Case({"path": path}, torch.bfloat16, "cpu") for path in ("torch.ops", "fastops")]


@functools.cache
def bare_op() -> torch._ops.OpOverload:
    """Compile and load bare_op.cpp; its schema is our op's, defined the same way."""
    compiler = next((c for c in map(shutil.which, ("c++", "g++", "clang++")) if c), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler to build the bare op with")
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    schema = _registry.find("nf4_dequant").schema
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "bare_op.so"
        command = [
            compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-w",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(built),
            "-Wl,--push-state,--no-as-needed", str(torch_folder / "lib/libtorch.so"), "-Wl,--pop-state",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr.strip()}")
        torch.ops.load_library(built)  # type: ignore[no-untyped-call]
    _kept.append(library)
    op: torch._ops.OpOverload = getattr(torch.ops, NAMESPACE).nf4_dequant.default
    return op


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loop_us(call: Runner, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def best_us(runners: Mapping[str, Runner], calls: int) -> dict[str, float]:
    """The best of BEST_OF loops of each; they take turns, so that a busy moment of the machine hits all of them."""
    best = dict.fromkeys(runners, float("inf"))
    with one_thread():
        for _ in range(BEST_OF):
            for name, run in runners.items():
                best[name] = min(best[name], _loop_us(run, calls))
    return best


class Overhead:
    """The page: one record for each way into the op."""

    op = results = "overhead"

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernel's files, what stands before it in Python, and the bare op."""
        kernel = records.op_sources("nf4_dequant", backend)
        return (*kernel, "bench/bare_op.cpp", "pyops/_registry.py", "pyops/ops/nf4_dequant.py")

    def cases_on(self, device: torch.device) -> list[Case]:
        """Only a CPU's: a GPU's calls take the same path."""
        return [case for case in CASES if case.device == device.type]

    def bytes_of(self, record: Record) -> int | None:
        """No bytes to speak of."""
        return None

    def runner(self, case: Case, session: Session) -> Runner:
        """One call of the case."""
        return self._runners(case, self._inputs(case))[case.sizes["path"]]

    def measure(self, case: Case, session: Session) -> Outcome:
        """Our path and the bare op, in turns."""
        outcome, path, call = Outcome(case), case.sizes["path"], self._inputs(case)
        if "cpu" not in _registry.find("nf4_dequant").available("cpu"):
            outcome.absent["cpu"] = "the compiled CPU kernel is not here"
            return outcome
        runners = self._runners(case, call)
        error = reference.error(runners[path](), *call.args)
        if error > reference.BUDGET:
            outcome.failures.append(f"{path}: error {error:.3g}, at most {reference.BUDGET:g} allowed")
            return outcome
        try:
            runners["bare"] = functools.partial(bare_op(), *call.args)
        except RuntimeError as why:
            outcome.absent["bare"] = str(why)
            return outcome
        best = best_us(runners, 20000 if session.effort == FULL else 2000)
        bare = best["bare"]
        record = make_record(
            self, case, "cpu", best[path], bare, error, {"bare": round(bare, 3)}, False, session.device
        )
        outcome.records.append({**record, "threads": 1})
        return outcome

    def _inputs(self, case: Case) -> Call:
        return make(Case({"N": 1, "K": 64, "blocksize": 64}, case.dtype, "cpu"), torch.device("cpu"))

    def _runners(self, case: Case, call: Call) -> dict[str, Runner]:
        entry = {"torch.ops": _registry.find("nf4_dequant").default, "fastops": fastops.nf4_dequant}[case.sizes["path"]]
        return {case.sizes["path"]: functools.partial(entry, *call.args)}


BENCH = Overhead()
