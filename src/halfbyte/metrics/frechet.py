"""The Frechet distance of feature vectors.

It is written out here: torchmetrics' class takes stored statistics only through its undocumented attributes, and where there are
fewer images than features its eigenvalues of a non-symmetric product are wrong from the eighth digit of the trace on, which makes
distances of near sets negative. tests/metrics/test_frechet.py holds the two against each other, and against scipy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError


@dataclass
class FeatureStatistics:
    """Running sums of feature vectors, the ones torchmetrics' FrechetInceptionDistance keeps; enough for mean and covariance."""

    features_sum: Tensor  # float64 (d,), over all images
    features_cov_sum: Tensor  # float64 (d, d), the outer products of each image's features with themselves
    count: int  # images

    def __post_init__(self) -> None:
        self.features_sum, self.features_cov_sum = self.features_sum.cpu().double(), self.features_cov_sum.cpu().double()
        self.count = int(self.count)
        width = self.features_sum.shape[0] if self.features_sum.ndim == 1 else None
        if self.features_cov_sum.shape != (width, width) or self.count < 0:
            got = f"{tuple(self.features_sum.shape)}, {tuple(self.features_cov_sum.shape)} and count {self.count}"
            raise HalfbyteError(f"feature statistics need sums of shape (d,) and (d, d) and a count of at least 0, got {got}")

    @classmethod
    def empty(cls, num_features: int) -> "FeatureStatistics":
        """Statistics of no image yet."""
        return cls(torch.zeros(num_features), torch.zeros(num_features, num_features), 0)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> "FeatureStatistics":
        """Statistics of known mean (d,) and unbiased covariance (d, d), as ADM's reference files hold them, of `count` images."""
        mean, covariance = mean.double(), covariance.double()
        return cls(count * mean, (count - 1) * covariance + count * torch.outer(mean, mean), count)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of features (N, d)."""
        made = cls.empty(features.shape[1])
        made.update(features)
        return made

    @property
    def num_features(self) -> int:
        return self.features_sum.shape[0]

    def update(self, features: Tensor) -> None:
        """Add the features (N, d) of N images; of any dtype and device, summed in float64."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise HalfbyteError(f"features are {tuple(features.shape)}; these statistics need (N, {self.num_features})")
        features = features.detach().cpu().double()
        self.features_sum = self.features_sum + features.sum(0)
        self.features_cov_sum = self.features_cov_sum + features.T @ features
        self.count += len(features)

    @property
    def mean(self) -> Tensor:
        """float64 (d,)."""
        self._need(1)
        return self.features_sum / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 (d, d), unbiased: divided by count - 1."""
        self._need(2)
        return (self.features_cov_sum - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    def _need(self, images: int) -> None:
        if self.count < images:
            raise HalfbyteError(f"feature statistics of {self.count} images; at least {images} are needed here")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of the Gaussians with these means and covariances: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With roots A = R_a R_a^T and B = R_b R_b^T, the trace of (A B)^(1/2) is the sum of the singular values of R_a^T R_b. It keeps
    all digits where the covariances are singular (fewer images than features). Estimates from few images lie too high: compare
    only those over equal counts, and only in the same features.

    Returns:
        The distance, never negative; nan where a feature was NaN or infinite (images of a broken model).
    Raises:
        HalfbyteError: when the numbers of features differ, or there are fewer than two images on a side.
    """
    if a.num_features != b.num_features:
        raise HalfbyteError(f"features of length {a.num_features} and {b.num_features}; both sets need the same extractor")
    return Gaussian.of(a).distance(Gaussian.of(b))


@dataclass(frozen=True)
class Gaussian:
    """Mean, covariance and a root of it: what one side brings to a Frechet distance, worked out once for many of them."""

    mean: Tensor  # float64 (d,)
    trace: float  # of the covariance
    root: Tensor | None  # float64 (d, d), R with R R^T = covariance; None: a feature was NaN or infinite

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> "Gaussian":
        covariance = statistics.covariance
        if not covariance.isfinite().all():
            return cls(statistics.mean, math.nan, None)
        values, vectors = torch.linalg.eigh(covariance)  # eigenvalues that rounding made negative count as zero
        return cls(statistics.mean, float(covariance.trace()), vectors * values.clamp(min=0).sqrt())

    def distance(self, other: "Gaussian") -> float:
        """As `frechet_distance`."""
        if self.root is None or other.root is None:
            return math.nan
        overlap = torch.linalg.svdvals(self.root.T @ other.root).sum()
        means = (self.mean - other.mean).square().sum()
        return max(0.0, float(means + self.trace + other.trace - 2 * overlap))
