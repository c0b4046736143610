"""The Frechet distance against scipy and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError
from halfbyte.metrics import FeatureStatistics, frechet_distance

WIDTH = 12


def vectors(count: int, width: int = WIDTH, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Correlated features of very different spread, as those of a network are."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=make).double() * torch.logspace(0, -3, width).double()
    return torch.randn(count, width, generator=make).double() @ mix + shift


def statistics(features: Tensor) -> FeatureStatistics:
    made = FeatureStatistics.empty(features.shape[1])
    made.update(features)
    return made


def torchmetrics_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """FrechetInceptionDistance with its states set to ours; the empty updates give it a dtype."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()
    features.num_features = a.num_features
    metric = FrechetInceptionDistance(features)
    for real, given in ((True, a), (False, b)):
        side = "real" if real else "fake"
        metric.update(torch.empty(0, a.num_features, dtype=torch.float64), real=real)
        setattr(metric, f"{side}_features_sum", given.features_sum)
        setattr(metric, f"{side}_features_cov_sum", given.features_cov_sum)
        setattr(metric, f"{side}_features_num_samples", torch.tensor(given.count))
    return metric.compute().item()


def scipy_distance(x: Tensor, y: Tensor) -> float:
    """The textbook formula on the vectors themselves: covariances by numpy, the matrix root by scipy."""
    x, y = x.numpy(), y.numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


PAIRS = {
    "many": (vectors(500), vectors(400, seed=1, shift=0.3)),
    "near": (vectors(5000), vectors(5000) + 1e-3 * vectors(5000, seed=2)),
    "fewer images than features": (vectors(5), vectors(7, seed=1)),
    "two images": (vectors(2), vectors(2, seed=1)),
    "few against many": (vectors(4), vectors(300, seed=1)),
    "dead features": (vectors(200) * (torch.arange(WIDTH) < 5), vectors(200, seed=1) * (torch.arange(WIDTH) > 2)),
    "far from zero": (vectors(300, shift=50.0), vectors(300, seed=1, shift=49.0)),
}


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # scipy says so of some pairs; its root is still good enough here
@pytest.mark.parametrize(("x", "y"), PAIRS.values(), ids=PAIRS)
def test_frechet_agrees_with_scipy_and_torchmetrics(x, y):
    a, b = statistics(x), statistics(y)
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(scipy_distance(x, y), rel=1e-3)
    assert distance == pytest.approx(torchmetrics_distance(a, b), rel=1e-3)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_of_plain_gaussians():
    """Diagonal covariances: the distance is |difference of means|^2 + |difference of standard deviations|^2."""
    deviations = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    means = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    sides = []
    for mean, deviation in zip(means, deviations, strict=True):
        outer = 10 * torch.outer(mean, mean) + 9 * torch.diag(deviation**2)
        sides.append(FeatureStatistics(10 * mean, outer, 10))
    assert frechet_distance(*sides) == pytest.approx(5 + 4 + 1 + 0.25, rel=1e-12)


@pytest.mark.parametrize("count", [2, 5, 1000])
def test_frechet_of_a_set_with_itself_is_zero(count):
    a = statistics(vectors(count, shift=1.0))
    assert 0 <= frechet_distance(a, a) < 1e-12 * a.covariance.trace()


def test_frechet_of_broken_features_is_nan():
    broken = vectors(20)
    broken[3, 3] = math.nan
    assert math.isnan(frechet_distance(statistics(broken), statistics(vectors(20))))


def test_statistics_are_those_of_numpy_however_they_came():
    features = vectors(50, shift=2.0)
    pieces = FeatureStatistics.empty(WIDTH)
    for piece in features.split(17):
        pieces.update(piece)
    pieces.update(features[:0])
    assert pieces.count == 50
    np.testing.assert_allclose(pieces.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(pieces.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-14)


def test_statistics_from_stored_tensors():
    made = statistics(vectors(9))
    again = FeatureStatistics(made.features_sum.float(), made.features_cov_sum.float(), torch.tensor(9))
    assert again.features_sum.dtype == again.features_cov_sum.dtype == torch.float64
    assert again.count == 9
    assert type(again.count) is int


def test_updates_leave_the_given_tensors_alone():
    total, outer = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    FeatureStatistics(total, outer, 0).update(torch.ones(3, 2))
    assert total.sum() == outer.sum() == 0


def test_statistics_refuse_what_does_not_fit():
    with pytest.raises(HalfbyteError, match=r"need sums of shape \(d,\) and \(d, d\).*got \(3,\), \(3, 2\) and count 1"):
        FeatureStatistics(torch.zeros(3), torch.zeros(3, 2), 1)
    with pytest.raises(HalfbyteError, match=r"features are \(5, 3\); these statistics need \(N, 4\)"):
        FeatureStatistics.empty(4).update(torch.zeros(5, 3))
    with pytest.raises(HalfbyteError, match="of 1 images; at least 2 are needed"):
        frechet_distance(statistics(vectors(1)), statistics(vectors(9)))
    with pytest.raises(HalfbyteError, match="of 0 images; at least 1"):
        _ = FeatureStatistics.empty(3).mean
    with pytest.raises(HalfbyteError, match="features of length 3 and 4"):
        frechet_distance(statistics(vectors(9, 3)), statistics(vectors(9, 4)))


def test_statistics_from_moments_are_those_of_the_vectors():
    features = vectors(50, shift=2.0)
    mean, covariance = features.mean(0), torch.from_numpy(np.cov(features.numpy(), rowvar=False))
    made, other = FeatureStatistics.from_moments(mean.float(), covariance.float(), 7), statistics(vectors(60, seed=1))
    assert frechet_distance(made, other) == pytest.approx(frechet_distance(statistics(features), other), rel=1e-5)
