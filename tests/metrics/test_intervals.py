"""Confidence intervals: right on average, the same for the same seed, and honest where nothing can be said."""

import math

import pytest
import torch
from torch import Tensor

from halfbyte.metrics import Estimate, FeatureStatistics, frechet_distance, inception_score, intervals, kernel_distance, spread
from halfbyte.metrics.intervals import of_frechet, of_inception_score, of_kernel_distance, of_mean


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spread():
    assert spread(torch.tensor([1.0, 2.0, 3.0, 6.0])) == {"mean": 3.0, "stderr": pytest.approx(math.sqrt(14 / 3 / 4))}
    assert spread(torch.tensor([4.0])) == {"mean": 4.0, "stderr": None}
    assert spread(torch.tensor([4.0, math.inf])) == {"mean": math.inf, "stderr": None}


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = 3 + draw(400)
    found = of_mean(values)
    assert found.value == pytest.approx(values.double().mean().item())
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found.bias is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = 0
    for seed in range(100):
        found = of_mean(draw(50, seed=seed))
        inside += found.low <= 0 <= found.high
    assert 88 <= inside <= 99


def test_the_bias_of_small_samples_is_seen():
    """Frechet distances of samples lie too high; estimate less bias is nearer to the truth, which is 0.25 * 16."""
    reference = FeatureStatistics.from_moments(torch.zeros(16), torch.eye(16), 1000)
    values, corrected = [], []
    for seed in range(8):
        found = of_frechet(0.5 + draw(100, 16, seed=seed), reference)
        assert found.bias > 0
        assert found.low < found.value < found.high
        values.append(found.value)
        corrected.append(found.value - found.bias)
    assert abs(sum(corrected) / 8 - 4) < 0.5 * abs(sum(values) / 8 - 4)


def test_estimates_hold_the_plain_figures():
    x, y = draw(40, 6), draw(40, 6, seed=1) + 0.3
    assert of_frechet(x, y).value == frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert of_frechet(x, FeatureStatistics.of(y)).value == of_frechet(x, y).value
    assert of_kernel_distance(x, y).value == kernel_distance(x, y)
    assert of_inception_score(x).value == inception_score(x)


def test_pairs_from_the_same_noise_make_narrow_intervals():
    x = draw(60, 6)
    y = x + 0.05 * draw(60, 6, seed=1)
    paired, apart = of_kernel_distance(x, y, paired=True), of_kernel_distance(x, y)
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    near = of_frechet(x, y)
    assert near.high - near.low < 0.3 * (of_frechet(x, FeatureStatistics.of(y)).high - of_frechet(x, FeatureStatistics.of(y)).low)


@pytest.mark.parametrize("figure", [of_mean, lambda x: of_frechet(x[:, None].expand(-1, 2), x[:, None].expand(-1, 2) + 1)])
def test_what_is_not_finite_has_no_interval(figure):
    broken = draw(10)
    broken[3] = math.nan
    found = figure(broken)
    assert (math.isnan(found.value), found.low, found.high, found.bias) == (True, None, None, None)


def test_one_value_has_no_interval():
    assert of_mean(torch.tensor([4.0])) == Estimate(4.0)
    assert of_mean(torch.tensor([4.0, math.inf])) == Estimate(math.inf)
    assert Estimate(1.0).to_dict() == {"value": 1.0, "low": None, "high": None, "bias": None}


def test_the_same_seed_gives_the_same_bits(monkeypatch):
    x, y = draw(30, 5), draw(30, 5, seed=1)
    figures = (
        lambda seed: of_mean(x[:, 0], seed),
        lambda seed: of_frechet(x, y, seed),
        lambda seed: of_kernel_distance(x, y, seed=seed),
    )
    for figure in figures:
        assert figure(3) == figure(3)
        assert figure(3) != figure(4)
    monkeypatch.setattr(intervals, "WIDE", 4)  # fewer resamples where they are dear
    assert of_frechet(x, y).value == frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
