"""What judges the small MAR's samples, and its training, on made-up images: the real ones need a wheel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastops.models import MarConfig

from .floors import Peaks
from .harness import Session
from .methods import bench_marche, digits
from .peers import Absent
from .timing import QUICK


def test_the_frechet_distance_of_gaussians() -> None:
    """Shifted features are their shift squared apart, scaled ones (1 - scale)^2 times their variance."""
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert digits.frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert digits.frechet(x, x + 2) == pytest.approx(20, rel=1e-6)
    assert digits.frechet(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-6)
    other = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert 0 < digits.frechet(x, other) < 0.05


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes of images: a bright row or column each."""

    def images(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(400) % 10
        pixels = torch.rand(400, side, side, generator=torch.Generator().manual_seed(0)) * 0.2
        for i, label in enumerate(labels.tolist()):
            pixels[i, label % 5 if label < 5 else slice(None), label % 5 if label >= 5 else slice(None)] = 1.0
        return pixels, labels

    monkeypatch.setattr(digits, "images", images)
    monkeypatch.setattr(digits, "moments", digits.moments.__wrapped__)
    monkeypatch.setattr(digits, "classifier", digits.classifier.__wrapped__)
    monkeypatch.setattr(digits, "HELD_OUT", 80)


@pytest.mark.usefixtures("stripes")
def test_the_classifier_tells_classes_apart() -> None:
    pixels, labels = digits.images(8)
    assert digits.classifier(8)[1] > 0.95
    accuracy, distance = digits.judge(pixels, labels)
    assert accuracy > 95
    assert distance < 1e-6
    accuracy, distance = digits.judge(pixels, labels.roll(1))
    assert accuracy < 5
    assert digits.judge(torch.rand_like(pixels), labels)[1] > 1


@pytest.mark.usefixtures("stripes")
def test_training_repeats_and_learns() -> None:
    tiny = dataclasses.replace(digits.SMALL, steps=30, batch=8)
    mar, again = (digits.train(tiny, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(mar.parameters(), again.parameters(), strict=True))
    pixels, labels = digits.images(8)
    mean, deviation = digits.moments(8)
    tokens = ((pixels - mean) / deviation).flatten(1)[:64, :, None]

    def loss(model: object) -> float:
        with torch.no_grad():
            draws = [
                digits.loss_of(model, tokens, labels[:64], 16 * i, torch.Generator().manual_seed(i)) for i in range(4)
            ]
        return float(sum(draws))

    untrained = digits.train(dataclasses.replace(tiny, steps=0), torch.device("cpu"))
    assert loss(mar) < 0.95 * loss(untrained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_page_measures_speed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(bench_marche.MODELS, "tiny", MarConfig(64, 3, 2, 32, 2, 32, 4, 8, 10))
    monkeypatch.setattr(bench_marche, "HEAD_STEPS", 3)
    session = Session(torch.device("cpu"), Peaks(28.0, 0.2, 0.3), QUICK)
    outcome = bench_marche.BENCH.measure(bench_marche.speed("tiny", 2, 6, dtype, "cpu"), session)
    assert not outcome.failures
    (record,) = outcome.records
    assert set(record["peers"]) == {"mar", "torch"}
    assert record["figures"]["speedup_transformer"] > 0
    assert record["figures"]["rows_bound"] >= 1


def test_the_page_refuses_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_marche.MODELS, "tiny", MarConfig(64, 3, 2, 32, 2, 32, 4, 8, 10))
    monkeypatch.setattr(bench_marche.Marche, "predict", lambda self, *args: self.mar.predict(*args) * 1.1)
    session = Session(torch.device("cpu"), Peaks(28.0, 0.2, 0.3), QUICK)
    outcome = bench_marche.BENCH.measure(bench_marche.speed("tiny", 2, 6, torch.float32, "cpu"), session)
    assert not outcome.records
    assert "refreshed differs by" in outcome.failures[0]


@pytest.mark.usefixtures("stripes")
def test_the_page_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = dataclasses.replace(digits.SMALL, name="tiny", steps=2, batch=4, a_class=2, generation_steps=4, head_steps=3)
    monkeypatch.setitem(digits.SETTINGS, "tiny", tiny)
    monkeypatch.setattr(digits, "KEPT", tmp_path)
    session = Session(torch.device("cpu"), Peaks(28.0, 0.2, 0.3), QUICK)
    outcome = bench_marche.BENCH.measure(bench_marche.quality("tiny", 1, 16, "cpu"), session)
    assert not outcome.failures
    figures = outcome.records[0]["figures"]
    assert figures["accuracy"] == figures["accuracy_mar"]
    assert figures["frechet"] == figures["frechet_mar"]
    assert len(list(tmp_path.glob("mar-tiny-*.pt"))) == 1
    digits.trained.cache_clear()
    again = digits.trained(tiny, torch.device("cpu"))  # from the file
    assert not again.training


def test_the_real_images() -> None:
    try:
        pixels, labels = digits.images(16)
    except Absent as why:
        pytest.skip(str(why))
    assert pixels.shape == (1797, 16, 16)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
