"""Figures with intervals from what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from halfbyte.errors import EvaluationError
from halfbyte.metrics import Estimate, FeatureStatistics, precision_recall
from halfbyte.metrics.intervals import of_frechet, of_inception_score, of_kernel_distance, of_mean
from halfbyte.metrics.sets import NEIGHBOUR

FEATURES = ("pooled", "spatial", "logits")  # of a measurement; everything else in it is a value an image


@dataclass
class Reference:
    """The real images that sets are compared with: their statistics, and their features where they are at hand."""

    name: str
    count: int
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    pooled: Tensor | None = None  # (M, d); precision, recall and kernel distance need it

    @classmethod
    def of(cls, name: str, measured: Mapping[str, Tensor]) -> "Reference":
        """From the measurement of real images."""
        pooled, spatial = measured["pooled"], measured.get("spatial")
        known = None if spatial is None else FeatureStatistics.of(spatial)
        return cls(name, len(pooled), FeatureStatistics.of(pooled), known, pooled)


def figures(
    measured: Mapping[str, Tensor],
    original: Mapping[str, Tensor] | None = None,
    reference: Reference | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All figures that a measurement allows.

    Args:
        measured: of a model's images, as `measure.merged` gives it.
        original: of the float model's images from the same noise; None: this is the float model.
        reference: of real images.
        seed: of the resamples. The same seed draws the same images in every run, so that intervals compare.
    Returns:
        psnr, ssim, perceptual, lpips and scores: means over images; frechet, sfrechet, kernel, precision, recall: against real
        images; frechet_float, kernel_float: against the float model's images; inception_score.
    """
    found = {name: of_mean(values, seed) for name, values in measured.items() if name not in FEATURES}
    if "logits" in measured:
        found["inception_score"] = of_inception_score(measured["logits"], seed)
    if reference is not None:
        found |= _against_real(measured, reference, seed)
    if original is not None and "pooled" in measured:
        found["frechet_float"] = of_frechet(measured["pooled"], original["pooled"], seed)
        found["kernel_float"] = of_kernel_distance(measured["pooled"], original["pooled"], paired=True, seed=seed)
    return found


def _against_real(measured: Mapping[str, Tensor], reference: Reference, seed: int) -> dict[str, Estimate]:
    pooled = measured.get("pooled")
    if pooled is None:
        raise EvaluationError("real images are compared in the features of a network; give one with --features")
    if pooled.shape[1] != reference.statistics.num_features:
        width = reference.statistics.num_features
        raise EvaluationError(f"{reference.name} has {width} features an image, this extractor {pooled.shape[1]}; use the same one")
    found = {"frechet": of_frechet(pooled, reference.statistics, seed)}
    if "spatial" in measured and reference.spatial is not None:
        found["sfrechet"] = of_frechet(measured["spatial"], reference.spatial, seed)
    if reference.pooled is not None:
        found["kernel"] = of_kernel_distance(pooled, reference.pooled, seed=seed)
        if min(len(pooled), len(reference.pooled)) > NEIGHBOUR:
            inside, covered = precision_recall(pooled, reference.pooled)
            found |= {"precision": of_mean(inside.double(), seed), "recall": of_mean(covered.double(), seed)}
    return found
