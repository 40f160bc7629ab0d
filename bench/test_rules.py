"""The rules of the house for measurements: nothing wrong is reported, records replace, stale results are found."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastops import _registry
from fastops.reference._truth import Cost

from . import bench_kv_append, bench_kv_recompute, bench_nf4_gemv, harness, plots, records, report
from .bench_nf4_dequant import BENCH, case
from .floors import Peaks
from .methods import bench_nf4
from .peers import PEERS, Absent, Peer
from .timing import QUICK, rotation

CPU = torch.device("cpu")
SMALL = case(64, 256, torch.bfloat16, device="cpu", dq=True)
SESSION = harness.Session(CPU, Peaks(copy_gbps=10.0, matmul_tflops=0.1), QUICK)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty bench/results, and nowhere else to write."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "PEAKS", tmp_path / "peaks")
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


def test_a_peer_of_another_device_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "nf4_dequant", {"other": Peer(lambda call: None.missing, device="cuda")})  # type: ignore[attr-defined]
    outcome = harness.Outcome(SMALL)
    assert not BENCH._peers(BENCH.inputs(SMALL, CPU), torch.zeros(64, 256), outcome)
    assert not outcome.absent
    monkeypatch.setitem(PEERS, "nf4_dequant", {"broken": Peer(lambda call: None.missing)})  # type: ignore[attr-defined]
    assert not BENCH._peers(BENCH.inputs(SMALL, CPU), torch.zeros(64, 256), outcome)
    assert "missing" in outcome.absent["broken"]


@pytest.mark.parametrize("dq", [False, True], ids=["plain", "double_quant"])
@pytest.mark.parametrize("bench", bench_nf4_gemv.BENCHES, ids=lambda bench: bench.op)
def test_peers_compute_the_product(bench: harness.Bench, dq: bool) -> None:
    rows = 1 if bench.op == "nf4_gemv" else 3
    call = bench.inputs(bench_nf4_gemv.case(rows, (64, 256), device="cpu", dq=dq), CPU)
    ours = getattr(torch.ops.fastops, bench.op)(*call.args, **call.kwargs)
    (piece, whole), *more = bench.chunks(call, ours)
    assert not more
    assert bench.reference.error(piece, *whole.args, **whole.kwargs) <= bench.reference.budget
    distances = {}
    for name, peer in PEERS[bench.op].items():
        if name == "gnf4":
            continue  # there is no way to run it without a GPU
        with contextlib.suppress(Absent):
            distances[name] = harness.difference(peer.prepare(call)(), ours) / peer.tolerance
    assert {"cublas", "torch", "dequant+cublas"} <= set(distances)
    assert max(distances.values()) <= 1, distances


@needs_kernel
@pytest.mark.parametrize("more", [{}, {"page_size": 16}, {"rope": True}], ids=str)
@pytest.mark.parametrize("bench", bench_kv_append.BENCHES, ids=lambda bench: bench.op)
def test_what_is_written_in_place_is_proved_and_compared(bench: harness.Bench, more: dict[str, Any]) -> None:
    """Each backend and each peer starts from the caches as they were."""
    if bench.op == "kv_scatter" and more:
        pytest.skip("never paged, never rotated")
    small = bench_kv_append.case(3, 8, 20, (2, 32), torch.float32, device="cpu", **more)
    call = bench.inputs(small, CPU)
    before = call.clone()
    outcome = harness.Outcome(small)
    errors, output = bench._prove(call, CPU, outcome)
    assert set(errors) == {"cpu"}
    assert not outcome.failures
    assert all(torch.equal(a, b) for a, b in zip(call.args, before.args, strict=True))
    peers = bench._peers(call, output, outcome)
    static = {"hf_static"} if bench.op == "kv_append" and "page_size" not in more else set()
    assert set(peers) == {"torch"} | static, outcome.absent
    spoilt = dataclasses.replace(bench, chunks=lambda call, output: [((output[0] + 1, output[1]), call)])
    assert not spoilt._prove(call, CPU, outcome)[0]
    assert outcome.failures[0].startswith("cpu: error ")


@needs_kernel
@pytest.mark.parametrize("more", [{}, {"bias": True}, {"rope": True}, {"page_size": 16}], ids=str)
def test_recomputed_rows_are_proved_and_compared(more: dict[str, Any]) -> None:
    """Sequence by sequence where there are no pages; the bare product is timed, whatever it is good for."""
    bench = bench_kv_recompute.BENCH
    small = bench_kv_recompute.case(3, 16, (40, 2, 32), torch.float32, device="cpu", **more)
    call = bench.inputs(small, CPU)
    outcome = harness.Outcome(small)
    errors, output = bench._prove(call, CPU, outcome)
    assert set(errors) == {"cpu"}
    assert not outcome.failures
    assert len(list(bench.chunks(call, output))) == (1 if "page_size" in more else 3)
    peers = bench._peers(call, output, outcome)
    assert set(peers) == {"bare product"} | (set() if "page_size" in more else {"torch"}), outcome.absent
    product = PEERS["kv_recompute"]["bare product"].prepare(call)()
    if not more:
        want = product.unflatten(-1, (2, 2, 32)).permute(2, 0, 3, 1, 4)
        assert harness.difference(want.unbind(0), [o[:, :, :16] for o in output]) < 1e-5


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


@needs_kernel
def test_cases_left_out_keep_their_results(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "nf4_dequant", {})
    both = dataclasses.replace(BENCH, cases=[SMALL, case(64, 128, torch.bfloat16, device="cpu")])
    assert len(list(harness.run([both], SESSION))) == 2
    assert [str(outcome.case) for _, outcome in harness.run([both], SESSION, only=["K=256"])] == [str(SMALL)]
    assert len(records.load("cpu", "nf4_dequant")) == 2
    assert len(list(harness.run([dataclasses.replace(both, cases=[SMALL])], SESSION, only=["K=1"]))) == 0
    assert len(records.load("cpu", "nf4_dequant")) == 1, "a case that is no more keeps nothing"


@pytest.mark.parametrize(
    ("only", "found"),
    [
        ((), True),
        (("N=64",), True),
        (("N=64 double_quant",), True),
        (("N=64,K=256,bfloat16",), True),
        (("N=6",), False),
        (("N=64 float16",), False),
        (("float16", "K=256"), True),
    ],
)
def test_only_goes_by_the_words_of_a_case(only: tuple[str, ...], found: bool) -> None:
    assert harness.matches(SMALL, only) == found


def test_every_op_has_a_page_and_its_own_truth() -> None:
    assert set(_registry.registry) <= set(harness.page_names())
    for bench in bench_nf4_gemv.BENCHES:
        assert harness.page(bench.op) is bench
        assert bench.results == bench.op
        assert bench.sources("cpu") == bench_nf4_gemv.GEMV.sources("cpu")
    # dy is [M, N] and dx [M, K]: what nf4_linear reads and writes, the other way round
    wide, tall = (bench_nf4_gemv.case(4, shape, device="cpu") for shape in ((64, 256), (256, 64)))
    assert bench_nf4_gemv.DX.cost(wide) == bench_nf4_gemv.LINEAR.cost(tall)


@pytest.mark.parametrize(
    ("edited", "older"),
    [
        ("csrc/common/nf4.h", {"cpu"}),
        ("csrc/common/simd.h", {"cpu"}),
        ("csrc/cpu/nf4_dequant.cpp", {"cpu"}),
        ("csrc/common/nf4.cuh", {"cuda"}),
        ("csrc/common/nf4_plan.h", {"cuda"}),
        ("csrc/cuda/nf4_dequant.cu", {"cuda"}),
        ("triton_ops/nf4_dequant.py", {"triton"}),
        ("reference/nf4_dequant.py", {"reference"}),
        ("csrc/cuda/nf4_quantize.cu", set()),
        ("csrc/common/other.cuh", set()),
    ],
)
def test_an_edit_makes_its_own_backend_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str, older: set[str]
) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for file, included in {
        "csrc/cpu/nf4_dequant.cpp": ["nf4.h"],
        "csrc/common/nf4.h": ["simd.h"],
        "csrc/cuda/nf4_dequant.cu": ["nf4.cuh"],
        "csrc/common/nf4.cuh": ["nf4.h", "nf4_plan.h"],
        edited: [],
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / file).open("a") as text:
            text.writelines(f'#include "common/{name}"\n' for name in included)

    def hashes() -> dict[str, str]:
        return {b: records.kernel_hash(BENCH.sources(b)) for b in _registry.BACKENDS}

    before = hashes()
    with (tmp_path / edited).open("a") as text:
        text.write("// after\n")
    assert {b for b, now in hashes().items() if now != before[b]} == older


def test_an_edit_of_a_shared_part_makes_its_kernels_stale() -> None:
    assert harness.page("decode_attn").sources("triton") == ("triton_ops/decode_attn.py", "triton_ops/_attention.py")
    assert BENCH.sources("triton") == ("triton_ops/nf4_dequant.py",)


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


def method_record(case: harness.Case, **figures: float) -> dict[str, Any]:
    timed = bench_nf4.Timed({"fastops": 2e4, "bitsandbytes": 5e4, "dense": 3e4}, Cost(10**8, 10**9), figures)
    return bench_nf4.BENCH._record(case, timed, SESSION)


def test_a_method_has_figures(results: Path) -> None:
    for each in bench_nf4.CASES:
        records.save("cpu", "methods/nf4", [method_record(each, memory_mb=1.5)])
    (found,) = records.all_results()["cpu"].values()
    assert (results / "cpu" / "methods" / "nf4.json").exists()
    assert len(found) == len(bench_nf4.CASES)
    assert {r["graphed"] for r in found} == {False, True}
    assert found[0]["figures"] == {
        "ms_per_token": 20.0,
        "ms_per_token_bitsandbytes": 50.0,
        "speedup_vs_bitsandbytes": 2.5,
        "ms_per_token_dense": 30.0,
        "speedup_vs_dense": 1.5,
        "memory_mb": 1.5,
    }
    (table,) = report.tables()
    assert len({*map(len, table.rows), len(table.columns)}) == 1
    assert table.title == "nf4 on cpu"
    assert "speedup vs bitsandbytes" in report.short_tables()
    (line,) = report.lines(harness.Outcome(bench_nf4.CASES[0], [method_record(bench_nf4.CASES[0])]))
    assert "ms_per_token 20," in line


def test_products_are_shown_by_rows(results: Path) -> None:
    def save(bench: harness.Bench, m: int, **timed: float) -> None:
        one = bench_nf4_gemv.case(m, (64, 256))
        peers = {"bitsandbytes": 3.0 * m, "gnf4": 9.0}
        new = [harness.make_record(bench, one, b, us, 1.0, 1.0, peers, True, CPU) for b, us in timed.items()]
        records.save("cpu", bench.op, new)

    save(bench_nf4_gemv.GEMV, 1, cuda=2.0, triton=3.0)
    save(bench_nf4_gemv.LINEAR, 2, cuda=3.0, triton=2.5)
    text = report.short_tables()
    assert "| matrix | M = 1 | M = 2 |" in text
    assert "| 64 × 256 | 2 (1.50, –) | 2.5 (2.40, –) |" in text
    by_op = records.all_results()["cpu"]
    assert not plots.curves(by_op["nf4_linear"]), "two points are no curve"
    save(bench_nf4_gemv.LINEAR, 8, cuda=4.0)
    by_op = records.all_results()["cpu"]
    panels = plots.curves([*by_op["nf4_gemv"], *by_op["nf4_linear"]])
    assert panels == {
        "64 × 256 bfloat16": {
            "floor": {1: 1.0, 2: 1.0, 8: 1.0},
            "bitsandbytes": {1: 3.0, 2: 6.0, 8: 24.0},
            "fastops cuda": {1: 2.0, 2: 3.0, 8: 4.0},
            "fastops triton": {1: 3.0, 2: 2.5},
        }
    }
    pytest.importorskip("matplotlib")
    assert plots.draw(results / "docs" / "some.png", "nf4_linear", "cpu", by_op)
    assert not plots.draw(results / "docs" / "none.png", "nf4_linear", "cpu", {"nf4_linear": []})


def test_the_readme_holds_the_committed_results() -> None:
    text = (records.ROOT / "README.md").read_text()
    assert report.short_tables(report.README_TABLES) in text, "run: python -m fastops bench --report"
