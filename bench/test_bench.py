"""The operators' cases under pytest-benchmark: `pytest bench --benchmark-only`, `-k nf4_dequant` for one of them.

pytest-benchmark times a whole call by the host clock, the device waited for; our own figures (time, floor, share,
error, peers) are in extra_info. Nothing is written to bench/results: `python -m fastops bench` does that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import harness
from .timing import QUICK

DEVICE = harness.pick_device()
JOBS = [
    pytest.param(page, case, id=f"{page.op}[{case}]".replace(" ", "-"))
    for page in map(harness.page, harness.page_names())
    if page.results == page.op  # a method runs whole models
    for case in page.cases_on(DEVICE)
]


@pytest.fixture(scope="module")
def session() -> harness.Session:
    """The floors, measured once."""
    return harness.Session.start(DEVICE, QUICK)


@pytest.mark.parametrize(("page", "case"), JOBS)
def test_bench(benchmark: Any, session: harness.Session, page: harness.Page, case: harness.Case) -> None:
    outcome = page.measure(case, session)
    assert not outcome.failures
    run = page.runner(case, session)

    def call_and_wait() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["records"] = outcome.records
    benchmark.extra_info["absent"] = outcome.absent
    benchmark.pedantic(call_and_wait, rounds=5, iterations=1, warmup_rounds=1)
