"""How near the 4-bit model stays to its float original: SQNR, PSNR and SSIM of pairs, the Frechet distance of sets.

    sqnr(noise_float, noise_4bit)                    dB over all values
    psnr(images, images_4bit)                        dB, one value an image; both from the same noise
    ssim(images, images_4bit)                        1 where equal, one value an image
    a = FeatureStatistics.empty(extractor.num_features)
    a.update(extractor.features(images))             any number of times
    frechet_distance(a, b)                           0 where mean and covariance agree

PSNR and SSIM are torchmetrics', which is imported nowhere else. The Frechet distance is written out here: torchmetrics' class
takes stored statistics only through its undocumented attributes, and where there are fewer images than features its eigenvalues
of a non-symmetric product are wrong from the eighth digit of the trace on, which makes distances of near sets negative.
tests/test_metrics.py holds the two against each other, and against scipy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError

SSIM_WINDOW = 11  # pixels of a side; a Gaussian of sigma 1.5, mirrored at the borders
CHUNK_VALUES = 2**22  # SSIM takes so many values of a side at once: its intermediate tensors are some 15 times as large


class FeatureExtractor(Protocol):
    """Turns images into the vectors whose distribution a Frechet distance compares."""

    @property
    def num_features(self) -> int:
        """d, the length of a vector."""

    def features(self, images: Tensor) -> Tensor:
        """Images float (N, C, H, W) in [0, 1] -> features (N, d)."""


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio over everything: 10 log10(sum ref^2 / sum (ref - other)^2).

    Args:
        reference, other: tensors of one shape, of any floating dtype; summed in float64.
    Returns:
        dB. inf where they are equal, -inf where only the reference is all zero, nan where a value is.
    Raises:
        HalfbyteError: when the shapes differ.
    """
    ratio = SignalToNoise()
    ratio.add(reference, other)
    return ratio.decibel


@dataclass
class SignalToNoise:
    """`sqnr` over as many pairs of tensors as are added."""

    signal: float = 0.0  # energy of the references
    noise: float = 0.0  # energy of the differences to them

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Raises HalfbyteError when the shapes differ."""
        _check_shapes(reference, other)
        for left, right in zip(reference.detach().flatten().split(2**20), other.detach().flatten().split(2**20), strict=True):
            left, right = left.cpu().double(), right.cpu().double()
            self.signal += left.square().sum().item()
            self.noise += (left - right).square().sum().item()

    @property
    def decibel(self) -> float:
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return -math.inf if ratio == 0 else 10 * math.log10(ratio)


def psnr(reference: Tensor, other: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 log10(data_range^2 / mean square error).

    Args:
        reference, other: float (N, C, H, W).
        data_range: difference of the largest and the smallest value that a pixel may have.
    Returns:
        dB, float32 (N,); inf where the two images are equal.
    Raises:
        HalfbyteError: when the shapes differ or the values span more than data_range.
        MissingExtraError: without torchmetrics.
    """
    reference, other = _image_pair(reference, other)
    for images in (reference, other):
        if (images.amax() - images.amin()).item() > data_range * 1.0001:
            low, high = images.amin().item(), images.amax().item()
            raise HalfbyteError(f"pixels span {low:.4g} to {high:.4g}, more than data_range {data_range:g}; scale or clamp them")
    measure = _torchmetrics_image().peak_signal_noise_ratio
    return cast(Tensor, measure(other, reference, data_range=float(data_range), reduction="none", dim=(1, 2, 3)))


def ssim(reference: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window, sigma 1.5, 11x11 pixels, mirrored at the borders.

    Args:
        reference, other: float (N, C, H, W) in [0, 1], H and W at least 6; the mean over pixels and channels is taken.
    Returns:
        float32 (N,); 1 where the two images are equal. float32 rounding moves nearly flat images by some 1e-4.
    Raises:
        HalfbyteError: when the shapes differ, images are too small or pixels lie outside [0, 1].
        MissingExtraError: without torchmetrics.
    """
    reference, other = _image_pair(reference, other)
    for images in (reference, other):
        low, high = images.amin().item(), images.amax().item()
        if low < -1e-4 or high > 1.0001:
            raise HalfbyteError(f"pixels span {low:.4g} to {high:.4g}; SSIM needs values in [0, 1], so scale or clamp them")
    if min(reference.shape[2:]) <= SSIM_WINDOW // 2:
        size = "x".join(map(str, reference.shape[2:]))
        raise HalfbyteError(f"images are {size} pixels; SSIM needs at least {SSIM_WINDOW // 2 + 1} a side")
    measure: Callable[..., Tensor] = _torchmetrics_image().structural_similarity_index_measure
    step = max(1, CHUNK_VALUES // reference[0].numel())
    pairs = zip(other.split(step), reference.split(step), strict=True)
    return torch.cat([measure(left, right, data_range=1.0, reduction="none") for left, right in pairs])


def spread(values: Tensor) -> dict[str, float | None]:
    """Mean and standard error of a value an image, as results.json holds them.

    Args:
        values: (N,), N at least 1.
    Returns:
        {"mean", "stderr"}; stderr is None where it has no meaning: one value, or one that is not finite.
    """
    values = values.detach().double()
    known = len(values) > 1 and bool(values.isfinite().all())
    return {"mean": values.mean().item(), "stderr": (values.std() / math.sqrt(len(values))).item() if known else None}


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
    covariances = a.covariance, b.covariance
    if not all(matrix.isfinite().all() for matrix in covariances):
        return math.nan
    root_a, root_b = (_root(matrix) for matrix in covariances)
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    means = (a.mean - b.mean).square().sum()
    return max(0.0, float(means + covariances[0].trace() + covariances[1].trace() - 2 * overlap))


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance (d, d); eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _image_pair(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 on the device of the reference, checked to be equal shapes (N, C, H, W) of at least one image."""
    _check_shapes(reference, other)
    if reference.ndim != 4 or not reference.numel() or not (reference.is_floating_point() and other.is_floating_point()):
        kinds = " and ".join(str(images.dtype).removeprefix("torch.") for images in (reference, other))
        raise HalfbyteError(f"images are {kinds} {tuple(reference.shape)}; they must be float (N, C, H, W) with N at least 1")
    return reference.detach().float(), other.detach().to(reference.device).float()


def _check_shapes(reference: Tensor, other: Tensor) -> None:
    if reference.shape != other.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise HalfbyteError(f"shapes {shapes} differ; both must come from the same noise")


def _torchmetrics_image() -> ModuleType:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingExtraError("PSNR and SSIM need torchmetrics: pip install 'halfbyte[eval]'") from error
    return cast(ModuleType, image)
