"""How sure a figure is: confidence intervals by the bootstrap, and the bias of small samples.

The images are drawn again with replacement, the figure is worked out anew, and the deviation of those figures is its standard
error; an interval is the figure plus and minus 1.96 of them. For distances of sets this is better than the percentiles of the
resampled figures: a resample holds duplicates, so its distance is too large, and the percentiles may not even hold the figure. How
much larger the resamples are on average estimates how much too large the figure itself is, and is given as its bias.

Everything is a function of the values and a seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.metrics.frechet import FeatureStatistics, Gaussian
from halfbyte.metrics.sets import check_features, inception_score, kernel_distance, kernel_resamples

NORMAL = 1.96  # standard errors that hold 95 %
MEAN_RESAMPLES = 1000
SET_RESAMPLES = 200
WIDE = 512  # features above which a resample takes seconds,
WIDE_RESAMPLES = 20  # and fewer of them must do
CHUNK = 2**22  # values drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float | None = None  # None: unknown, as for a single image or where a value is not finite
    high: float | None = None
    bias: float | None = None  # by how much a sample of this size makes it too large, on average; None: not at all

    @classmethod
    def of(cls, value: float, resamples: Tensor, biased: bool = False) -> "Estimate":
        """From a figure and the same figure of resamples (R,)."""
        if not math.isfinite(value) or len(resamples) < 2 or not resamples.isfinite().all():
            return cls(value)
        error = NORMAL * float(resamples.std())
        return cls(value, value - error, value + error, float(resamples.mean()) - value if biased else None)

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "bias": self.bias}


def spread(values: Tensor) -> dict[str, float | None]:
    """Mean and standard error of a value an image.

    Args:
        values: (N,), N at least 1.
    Returns:
        {"mean", "stderr"}; stderr is None where it has no meaning: one value, or one that is not finite.
    """
    values = values.detach().double()
    known = len(values) > 1 and bool(values.isfinite().all())
    return {"mean": values.mean().item(), "stderr": (values.std() / math.sqrt(len(values))).item() if known else None}


def draws(count: int, resamples: int, seed: int) -> Tensor:
    """Indices of the images of each resample, int64 (R, N)."""
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))


def of_mean(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of a value an image, (N,)."""
    values = values.detach().cpu().double()
    mean, known = values.mean().item(), len(values) > 1 and bool(values.isfinite().all())
    if not known:
        return Estimate(mean)
    step = max(1, CHUNK // len(values))
    parts = range(0, MEAN_RESAMPLES, step)
    means = [values[draws(len(values), min(step, MEAN_RESAMPLES - at), seed + at)].mean(1) for at in parts]
    return Estimate.of(mean, torch.cat(means))


def of_frechet(features: Tensor, reference: "FeatureStatistics | Tensor", seed: int = 0) -> Estimate:
    """Frechet distance of features (N, d) to a fixed set's statistics, or to the features (N, d) of the same images made otherwise.

    Pairs of images are drawn together.
    """
    other = features if isinstance(reference, FeatureStatistics) else reference
    check_features(features, other)

    def distance(chosen: Any) -> float:
        mine = Gaussian.of(FeatureStatistics.of(features[chosen]))
        return mine.distance(fixed or Gaussian.of(FeatureStatistics.of(other[chosen])))

    fixed = Gaussian.of(reference) if isinstance(reference, FeatureStatistics) else None
    return _resampled(distance, len(features), features.shape[1], seed)


def of_inception_score(logits: Tensor, seed: int = 0) -> Estimate:
    """Inception score of logits (N, classes)."""
    return _resampled(lambda chosen: inception_score(logits[chosen]), len(logits), logits.shape[1], seed)


def _resampled(figure: Callable[[Any], float], count: int, width: int, seed: int) -> Estimate:
    value = figure(slice(None))
    if not math.isfinite(value):
        return Estimate(value)
    chosen = draws(count, WIDE_RESAMPLES if width > WIDE else SET_RESAMPLES, seed)
    return Estimate.of(value, torch.tensor([figure(rows) for rows in chosen]).double(), biased=True)


def of_kernel_distance(x: Tensor, y: Tensor, paired: bool = False, seed: int = 0) -> Estimate:
    """Kernel distance of features (N, d) and (M, d); `paired`: of the same images made otherwise, drawn together."""
    value = kernel_distance(x, y, paired)
    if not math.isfinite(value):
        return Estimate(value)
    counts_x = _counts(len(x), seed)
    counts_y = counts_x if paired else _counts(len(y), seed + 1)
    return Estimate.of(value, kernel_resamples(x, y, counts_x, counts_y, paired))


def _counts(count: int, seed: int) -> Tensor:
    """How often each image is in each resample, float64 (N, R)."""
    chosen = draws(count, SET_RESAMPLES, seed)
    return torch.zeros(SET_RESAMPLES, count).double().scatter_add_(1, chosen, torch.ones(chosen.shape).double()).T
