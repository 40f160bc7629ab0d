"""The rules of the house for measurements: nothing wrong is reported, records replace, stale results are found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastops import _registry

from . import harness, records, report
from .bench_nf4_dequant import BENCH, case
from .floors import Peaks
from .peers import PEERS, Peer
from .timing import QUICK, rotation

CPU = torch.device("cpu")
SMALL = case(64, 256, torch.bfloat16, device="cpu", dq=True)
SESSION = harness.Session(CPU, Peaks(copy_gbps=10.0, matmul_tflops=0.1), QUICK)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty bench/results."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def compiled() -> bool:
    return "cpu" in _registry.find("nf4_dequant").available("cpu")


needs_kernel = pytest.mark.skipif(not compiled(), reason="the extension was not built")


@needs_kernel
def test_a_wrong_output_is_a_failure_and_no_record() -> None:
    def off_by_one(call: harness.Call, output: Any) -> Any:
        return BENCH.chunks(call, output + 1)

    outcome = dataclasses.replace(BENCH, chunks=off_by_one).measure(SMALL, SESSION)
    assert not outcome.records
    assert outcome.failures
    assert outcome.failures[0].startswith("cpu: error ")


@needs_kernel
def test_a_peer_that_computes_something_else_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Peer(lambda call: lambda: torch.zeros(call.args[2]))
    monkeypatch.setitem(PEERS, "nf4_dequant", {"wrong": wrong, "torch": PEERS["nf4_dequant"]["torch"]})
    outcome = BENCH.measure(SMALL, SESSION)
    assert "differs from ours" in outcome.absent["wrong"]
    assert [set(r["peers"]) for r in outcome.records] == [{"torch"}]


@needs_kernel
def test_a_record_replaces_its_elder_and_gets_stale(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BENCH.measure(SMALL, SESSION).records
    records.save("cpu", "nf4_dequant", first)
    records.save("cpu", "nf4_dequant", [{**r, "us": 1.0} for r in first])
    assert [r["us"] for r in records.load("cpu", "nf4_dequant")] == [1.0]
    assert not report.stale()
    monkeypatch.setattr(records, "kernel_hash", lambda sources: "another")
    assert len(report.stale()) == 1
    records.prune("cpu", "nf4_dequant", [])
    assert not records.load("cpu", "nf4_dequant")


@pytest.mark.parametrize(
    ("edited", "older"),
    [
        ("csrc/common/nf4.h", {"cpu"}),
        ("csrc/cpu/nf4_dequant.cpp", {"cpu"}),
        ("csrc/common/nf4.cuh", {"cuda"}),
        ("csrc/cuda/nf4_dequant.cu", {"cuda"}),
        ("triton_ops/nf4_dequant.py", {"triton"}),
        ("reference/nf4_dequant.py", {"reference"}),
        ("csrc/cuda/nf4_quantize.cu", set()),
    ],
)
def test_an_edit_makes_its_own_backend_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str, older: set[str]
) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for file in ("csrc/common/nf4.h", "csrc/common/nf4.cuh", edited):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("before")

    def hashes() -> dict[str, str]:
        return {b: records.kernel_hash(BENCH.sources(b)) for b in _registry.BACKENDS}

    before = hashes()
    (tmp_path / edited).write_text("after")
    assert {b for b, now in hashes().items() if now != before[b]} == older


def test_chunks_cover_the_whole_output() -> None:
    big = case(3, 1 << 21, torch.float16, device="cpu", blocksize=4096, dq=True)
    call = BENCH.inputs(big, CPU)
    output = BENCH._ours(None)(call)()
    pieces = list(BENCH.chunks(call, output))
    assert len(pieces) == 2
    assert sum(piece.numel() for piece, _ in pieces) == output.numel()
    assert all(BENCH.reference.error(piece, *c.args, **c.kwargs) <= 2 for piece, c in pieces)


@pytest.mark.parametrize("op", harness.page_names())
def test_every_case_states_its_bytes(op: str) -> None:
    page = harness.page(op)
    for each in (*page.cases_on(torch.device("cuda")), *page.cases_on(CPU)):
        moved = page.bytes_of({"case": dict(each.sizes), "dtype": each.dtype_name})
        assert moved is None or moved > 0


def test_sets_rotate_through_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert rotation(CPU, 43 << 20) == 5
    assert rotation(CPU, 1 << 30) == 2


def test_the_readme_holds_the_committed_results() -> None:
    text = (records.ROOT / "README.md").read_text()
    assert report.readme_tables() in text, "run: python -m fastops bench --report"
