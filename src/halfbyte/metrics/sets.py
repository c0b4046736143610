"""Sets of images by their features: kernel distance, precision and recall, inception score."""

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError

BLOCK = 1024  # rows of a pairwise matrix held at a time
NEIGHBOUR = 3  # k of precision and recall
SPLIT = 5000  # images a part of the inception score, as the literature's 50,000 in 10 parts


def kernel_distance(x: Tensor, y: Tensor, paired: bool = False) -> float:
    """Squared maximum mean discrepancy of two sets (KID; Binkowski et al. 2018) with the kernel (x.y / d + 1)^3.

    The unbiased estimate over all pairs. Other tools average over random subsets, which estimates the same number with more noise.

    Args:
        x, y: features (N, d) and (M, d), each of at least two images.
        paired: image i of both comes from the same noise. Such a pair is left out (Gretton et al. 2012, equation 4): its likeness
            would make the sets seem nearer than they are.
    Returns:
        0 on average where both sets come from one distribution, and then often a little below; nan where a feature is not finite.
    Raises:
        HalfbyteError: when the widths differ or a set is too small.
    """
    check_features(x, y)
    if paired and len(x) != len(y):
        raise HalfbyteError(f"sets of {len(x)} and {len(y)} images cannot come from the same noise")
    return float(_weighted_distance(x, y, torch.ones(len(x), 1), torch.ones(len(y), 1), paired))


def kernel_resamples(x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor, paired: bool = False) -> Tensor:
    """`kernel_distance` of resampled sets, without a new kernel matrix for each.

    An image that was drawn twice makes no pair with itself: such a pair would look like a near neighbour that is none.

    Args:
        counts_x, counts_y: how often each resample holds each image, (N, R) and (M, R).
    Returns:
        float64 (R,).
    """
    check_features(x, y)
    return _weighted_distance(x, y, counts_x, counts_y, paired)


def _weighted_distance(x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor, paired: bool) -> Tensor:
    within_x = _pair_means(x, x, counts_x, counts_x, itself=True)
    within_y = _pair_means(y, y, counts_y, counts_y, itself=True)
    return within_x + within_y - 2 * _pair_means(x, y, counts_x, counts_y, itself=paired)


def _pair_means(x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor, itself: bool) -> Tensor:
    """Mean of the kernel over pairs, (R,); with `itself`, image i makes no pair with image i."""
    x, y, counts_x, counts_y = x.double(), y.double(), counts_x.double(), counts_y.double()
    total, pairs = torch.zeros(counts_x.shape[1]).double(), torch.zeros(counts_x.shape[1]).double()
    for start in range(0, len(x), BLOCK):
        rows, weights = x[start : start + BLOCK], counts_x[start : start + BLOCK]
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        if itself:
            kernel.diagonal(start).zero_()
        total += (weights * (kernel @ counts_y)).sum(0)
        others = counts_y.sum(0) - weights if itself else counts_y.sum(0)
        pairs += (weights * others).sum(0)
    return total / pairs


def precision_recall(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, k = 3).

    Args:
        generated, real: features (N, d) and (M, d), each of more than three images.
    Returns:
        Whether each generated image lies in the neighbourhood of a real one, bool (N,), and whether each real image lies in that of
        a generated one, bool (M,): the means are precision and recall.
    Raises:
        HalfbyteError: when the widths differ or a set is too small.
    """
    check_features(generated, real, at_least=NEIGHBOUR + 1)
    return _covered(generated, real), _covered(real, generated)


def _covered(points: Tensor, centres: Tensor) -> Tensor:
    """Whether each point is as near to some centre as that centre's k-th neighbour."""
    radii = torch.cat([block.kthvalue(NEIGHBOUR + 1).values for block in _distances(centres, centres)])  # the first is itself
    return torch.cat([(block <= radii).any(1) for block in _distances(points, centres)])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Distances of the rows of x to those of y in float64, some rows at a time."""
    y = y.double()
    return (torch.cdist(block.double(), y, compute_mode="use_mm_for_euclid_dist") for block in x.split(BLOCK))


def inception_score(logits: Tensor) -> float:
    """exp of the mean divergence of each image's class distribution from their mean (Salimans et al. 2016).

    Averaged over parts of 5000 images, in their order; fewer images than that are one part, and give too low a score.

    Args:
        logits: (N, classes).
    Returns:
        1 to the number of classes; nan where a logit is not finite.
    Raises:
        HalfbyteError: without images.
    """
    if logits.ndim != 2 or not len(logits):
        raise HalfbyteError(f"logits are {tuple(logits.shape)}; an inception score needs (N, classes) of at least one image")
    parts = max(1, len(logits) // SPLIT)
    scores = []
    for part in logits.double().tensor_split(parts):
        known = part.log_softmax(1)
        mean = known.exp().mean(0, keepdim=True)
        scores.append((known.exp() * (known - mean.log())).nansum(1).mean().exp() if known.isfinite().all() else known.sum())
    return float(torch.stack(scores).mean())


def check_features(x: Tensor, y: Tensor, at_least: int = 2) -> None:
    """Raises HalfbyteError when the two cannot be compared."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise HalfbyteError(f"features are {tuple(x.shape)} and {tuple(y.shape)}; both sets need (N, d) of the same extractor")
    if min(len(x), len(y)) < at_least:
        raise HalfbyteError(f"sets of {len(x)} and {len(y)} images; at least {at_least} are needed in each")
