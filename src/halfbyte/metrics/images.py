"""Images in pairs: PSNR and SSIM, both torchmetrics'."""

from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.metrics.sqnr import check_shapes

SSIM_WINDOW = 11  # pixels of a side; a Gaussian of sigma 1.5, mirrored at the borders
CHUNK_VALUES = 2**22  # SSIM takes so many values of a side at once: its intermediate tensors are some 15 times as large


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


def _image_pair(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 on the device of the reference, checked to be equal shapes (N, C, H, W) of at least one image."""
    check_shapes(reference, other)
    if reference.ndim != 4 or not reference.numel() or not (reference.is_floating_point() and other.is_floating_point()):
        kinds = " and ".join(str(images.dtype).removeprefix("torch.") for images in (reference, other))
        raise HalfbyteError(f"images are {kinds} {tuple(reference.shape)}; they must be float (N, C, H, W) with N at least 1")
    return reference.detach().float(), other.detach().to(reference.device).float()


def _torchmetrics_image() -> ModuleType:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingExtraError("PSNR and SSIM need torchmetrics: pip install 'halfbyte[eval]'") from error
    return cast(ModuleType, image)
