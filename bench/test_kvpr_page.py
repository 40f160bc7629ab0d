"""KVPR's page on a tiny model and this machine: what a GPU would run, proven to run; it claims no speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastops.methods import _kvpr_profile

from .floors import Peaks
from .harness import Case, Session
from .methods import bench_kvpr
from .timing import QUICK

SESSION = Session(torch.device("cpu"), Peaks(10.0, 0.1, 0.1), QUICK)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A profile of moments, in a folder of its own."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(_kvpr_profile, "SIZES", {"cpu": [1 << 14, 1 << 16]})
    monkeypatch.setattr(_kvpr_profile, "MEMORY_BYTES", {"cpu": 1 << 18})
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))
    bench_kvpr._held.clear()


def test_a_comparison_of_the_schedules() -> None:
    case = Case({"model": "tiny", "batch": 2, "context": 24}, torch.float32, "cpu")
    outcome = bench_kvpr.BENCH.measure(case, SESSION)
    assert not outcome.failures
    (record,) = outcome.records
    wanted = {"speedup_single_split", "speedup_pipeline", "copy_share", "predicted_over_measured", "chosen_over_best"}
    assert wanted <= set(record["figures"])
    assert all(value >= 0 for value in record["figures"].values())
    assert set(outcome.absent) | set(record["peers"]) == {"hf_offloaded"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_point_of_the_grid(share: float, tmp_path: Path) -> None:
    case = Case({"model": "tiny", "batch": 2, "context": 24, "l": share}, torch.float32, "cpu")
    outcome = bench_kvpr.BENCH.measure(case, SESSION)
    assert not outcome.failures
    (record,) = outcome.records
    assert record["figures"]["ms_predicted"] > 0
    pytest.importorskip("matplotlib")
    assert bench_kvpr.draw_predictions(tmp_path / "plot.png", [record]) == 1


def test_the_column_schedule() -> None:
    case = Case({"model": "tiny", "batch": 2, "context": 24, "batches": 3}, torch.float32, "cpu")
    outcome = bench_kvpr.BENCH.measure(case, SESSION)
    assert not outcome.failures
    (record,) = outcome.records
    assert record["figures"]["speedup_column"] > 0
    assert record["figures"]["l_column"] <= 24 + 3 + bench_kvpr.WARM


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastops.methods import _kvpr_transfer

    monkeypatch.setattr(_kvpr_transfer.Transfer, "send", lambda self, targets, *where: [t.zero_() for t in targets])
    case = Case({"model": "tiny", "batch": 2, "context": 24}, torch.float32, "cpu")
    outcome = bench_kvpr.BENCH.measure(case, SESSION)
    assert not outcome.records
    assert "the logits at l = 0" in outcome.failures[0]


def test_the_timeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = bench_kvpr.draw_timeline(tmp_path / "trace", "tiny", 2, 24, torch.device("cpu"))
    assert drawn.stat().st_size > 1000
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_grid_has_points_enough() -> None:
    assert sum("l" in case.sizes for case in bench_kvpr.CASES) >= 24
