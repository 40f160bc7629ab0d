"""The schedules: the paper's check values, formulas against scans, and the runtime's time against its order of work."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastops.methods import _kvpr_plan as plan
from fastops.methods._kvpr_plan import Rates, Shape, best_plan, split_point, step_seconds

PCIE, GPU = 55e9, 500e12

shapes = st.builds(
    Shape,
    batch=st.integers(1, 128),
    hidden=st.sampled_from([512, 2048, 4096, 5120, 7168]),
    kv_width=st.sampled_from([128, 512, 1024, 4096, 7168]),
    itemsize=st.sampled_from([2.0, 4.0]),
    compress=st.sampled_from([None, "kv", "x", "all"]),
)
rates = st.builds(
    Rates, copy=st.floats(1e9, 1e12), flops=st.floats(1e11, 2e15), other=st.sampled_from([0.0, 1e-4, 2e-3])
)
tokens = st.integers(0, 300)


@pytest.mark.parametrize(("copy", "want"), [(32e9, 671), (64e9, 499)])
def test_the_official_check_values(copy, want):
    assert split_point(1024, 32, 5120, copy=copy, flops=312e12) == want


@settings(deadline=None, max_examples=200)
@given(shapes, rates, tokens, st.integers(0, 300))
def test_the_row_formula_is_the_best_of_all_splits(shape, rate, n, limit):
    most = min(n, limit)
    best = min(plan.row_seconds(shape, rate, n, split) for split in range(most + 1))
    got = plan.row_split(shape, rate, n, most)
    assert 0 <= got <= most
    assert plan.row_seconds(shape, rate, n, got) == pytest.approx(best, rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(shapes, rates, tokens, st.integers(0, 300), st.sampled_from([0.0, 1e6, 1e9]))
def test_the_column_formula_is_the_best_of_all_splits(shape, rate, n, limit, weights):
    most = min(n, limit)
    times = [plan.column_seconds(shape, rate, n, split, weights) for split in range(most + 1)]
    got = plan.column_split(shape, rate, n, most, weights)
    assert 0 <= got <= most
    assert times[got] == pytest.approx(min(times), rel=1e-12)


def test_the_column_formula_without_other_work():
    """2 s' p v_gpu / (4 h v_com + p v_gpu), clipped."""
    for h, copy in ((5120, 64e9), (7168, 128e9), (4096, 32e9)):
        crossing = min(1024.0, 2 * 1024 * 2 * 312e12 / (4 * h * copy + 2 * 312e12))
        assert abs(split_point(1024, 32, h, copy=copy, flops=312e12, schedule="column") - crossing) < 1
    heavy = split_point(1024, 4, 5120, copy=64e9, flops=312e12, schedule="column", weights=2e7)
    shared = split_point(1024, 4, 5120, copy=64e9, flops=312e12, schedule="column", weights=2e7, batches=8)
    assert heavy > shared > split_point(1024, 4, 5120, copy=64e9, flops=312e12, schedule="column")


@pytest.mark.parametrize("schedule", ["row", "column"])
def test_more_arithmetic_moves_the_split_up_and_a_faster_link_down(schedule):
    def at(copy, flops):
        return split_point(2000, 8, 5120, copy=copy, flops=flops, schedule=schedule)

    assert [at(64e9, f) for f in (1e12, 1e13, 1e14, 1e15)] == sorted(at(64e9, f) for f in (1e12, 1e13, 1e14, 1e15))
    down = [at(c, 1e14) for c in (1e9, 1e10, 1e11, 1e12)]
    assert down == sorted(down, reverse=True)
    assert len(set(down)) > 2
    grown = [split_point(n, 8, 5120, copy=64e9, flops=1e14, schedule=schedule) for n in (0, 1, 10, 100, 1000)]
    assert grown == sorted(grown)
    assert grown[0] == 0


def test_splits_are_clipped():
    fast = dict(copy=1e9, flops=1e18)
    assert split_point(100, 1, 512, **fast) == 100
    assert split_point(100, 1, 512, limit=40, **fast) == 40
    assert split_point(0, 1, 512, **fast) == 0


@pytest.mark.parametrize(
    ("group", "compress", "helps"),
    [
        (1, None, True), (2, None, False), (4, None, False), (8, None, False), (1, "kv", False), (1, "all", True),
        (1, "x", True), (2, "x", True), (4, "x", True), (8, "x", False), (4, "all", False), (2, "kv", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["row", "column"])
def test_grouped_heads(group, compress, helps, schedule):
    """Nothing is recomputed where X is not less to send than K and V; 4 bits change which is less."""
    got = split_point(
        1024, 32, 4096, kv_width=4096 // group, compress=compress, copy=PCIE, flops=GPU, schedule=schedule
    )
    assert (got > 0) == helps
    if not helps:
        assert best_plan(Shape(32, 4096, 4096 // group, 2, compress), Rates(PCIE, GPU), 1024).schedule == "full"


def test_compression_weighs_what_it_stores():
    plain, both = Shape(2, 4096, 1024), Shape(2, 4096, 1024, compress="all")
    assert (plain.x_bytes, plain.kv_bytes) == (2 * 8192, 2 * 4096)
    assert both.x_bytes == 2 * (4096 / 2 + 4096 / 64 * 4)
    assert both.kv_bytes / plain.kv_bytes == pytest.approx(4.5 / 16)


@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
def test_the_runtime_s_time_is_the_row_formula_s_up_to_the_crossing(hidden):
    """Copies run on into the next layer, so that beyond the crossing the runtime is faster than the formula."""
    shape, rate = Shape(32, hidden, hidden), Rates(PCIE, GPU, other=1e-4)
    crossing = plan.row_split(shape, rate, 1024, 1024)
    for split in (0, 100, crossing):
        assert step_seconds(shape, rate, 1024, split) == pytest.approx(
            plan.row_seconds(shape, rate, 1024, split), rel=1e-3
        )
    for split in (crossing + 50, 1024):
        got = step_seconds(shape, rate, 1024, split)
        assert got < plan.row_seconds(shape, rate, 1024, split)
        assert got >= plan.column_seconds(shape, rate, 1024, split) * (1 - 1e-9)


@pytest.mark.parametrize(("hidden", "least"), [(4096, 1.95), (5120, 1.75), (7168, 1.55)])
def test_the_pipeline_beats_the_single_split(hidden, least):
    """Beyond KVPR's 2 - l*/s' bound, for the link is never idle; MHA bound 2 x until arithmetic is."""
    shape, rate = Shape(32, hidden, hidden), Rates(PCIE, GPU, other=1e-4, launch=1e-5)
    full, single, pipeline = (best_plan(shape, rate, 1024, s) for s in ("full", "single", "pipeline"))
    assert (full.schedule, single.schedule, pipeline.schedule) == ("full", "single", "pipeline")
    assert full.seconds > single.seconds > pipeline.seconds
    assert full.seconds / pipeline.seconds > least
    size = pipeline.chunk * shape.x_bytes
    assert 0.95 * plan.CHUNKS[0] < size < 1.04 * plan.CHUNKS[-1]
    assert best_plan(shape, rate, 1024).schedule == "pipeline"
    swept = min(step_seconds(shape, rate, 1024, split, pipeline.chunk) for split in range(0, 1025, 16))
    assert pipeline.seconds <= 1.02 * swept


def test_slow_launches_make_chunks_large():
    """Half a millisecond a chunk, about what a grid on an H100 showed, costs a few per cent and not the gain."""
    shape = Shape(32, 4096, 4096)
    rates = [Rates(PCIE, GPU, other=1e-4, launch=launch) for launch in (1e-5, 5e-4)]
    fast, slow = (best_plan(shape, rate, 1024, "pipeline") for rate in rates)
    assert slow.chunk > fast.chunk
    assert slow.seconds <= 1.08 * fast.seconds


@settings(deadline=None, max_examples=60)
@given(shapes, rates, st.integers(1, 300), st.sampled_from(["auto", "full", "single", "pipeline"]))
def test_plans_are_sound(shape, rate, n, schedule):
    best = best_plan(shape, rate, n, schedule, limit=n // 2)
    assert 0 <= best.split <= n // 2
    assert 0 <= best.chunk <= best.split
    assert best.copied == shape.copied(n, best.split)
    assert best.seconds >= plan.column_seconds(shape, rate, n, best.split) * (1 - 1e-9)
    if schedule == "auto":
        others = [best_plan(shape, rate, n, s, limit=n // 2).seconds for s in ("full", "single", "pipeline")]
        assert best.seconds <= min(others) * (1 + 1e-9)


def test_small_copies_cost_what_was_measured():
    rate = Rates(10e9, 1e12, by_size={1 << 16: 1e9, 1 << 20: 5e9, 1 << 24: 10e9})
    assert rate.copy_seconds(1 << 20) == pytest.approx((1 << 20) / 5e9)
    assert rate.copy_seconds(0) == 0
    assert rate.copy_seconds(1 << 26) == pytest.approx((1 << 24) / 10e9 + (3 << 24) / 10e9)
    times = [rate.copy_seconds(1 << n) for n in range(4, 28)]
    assert times == sorted(times)
    assert all(math.isfinite(t) and t > 0 for t in times)


BAD = {
    "batch": (dict(batch=0), "batch must be greater than 0, got 0"),
    "hidden": (dict(hidden=-1), "hidden must be greater than 0, got -1"),
    "tokens": (dict(tokens=-1), "tokens must be 0 or more, got -1"),
    "copy": (dict(copy=0.0), "copy must be greater than 0, got 0.0"),
    "flops": (dict(flops=-1.0), "flops must be greater than 0, got -1.0"),
    "compress": (dict(compress="v"), "compress must be one of None, 'kv', 'x', 'all', got 'v'"),
    "schedule": (dict(schedule="rows"), "schedule must be 'row' or 'column', got 'rows'"),
    "batches": (dict(batches=0), "batches must be 1 or more, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=f"^OffloadedCache: {re.escape(message)}$"):
        split_point(**{**dict(tokens=10, batch=1, hidden=64, copy=1e9, flops=1e12), **changes})
