"""PSNR and SSIM against formulas written out in numpy, and against scikit-image."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.metrics import psnr, ssim


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pair(n: int = 3, channels: int = 3, height: int = 20, width: int = 26) -> tuple[Tensor, Tensor]:
    """Smooth images and noisier copies, the noise growing from image to image: a reduction over the batch would show."""
    coarse = draw(n, channels, height // 2, width // 2)
    reference = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    strength = torch.linspace(0.02, 0.2, n).view(-1, 1, 1, 1)
    return reference, (reference + strength * (draw(n, channels, height, width, seed=1) - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("data_range", [1.0, 2.5])
@pytest.mark.parametrize("n", [1, 3])
def test_psnr_is_the_formula(n, data_range):
    reference, other = pair(n)
    error = ((reference.double() - other.double()) ** 2).numpy().mean((1, 2, 3))
    values = psnr(reference, other, data_range)
    assert values.shape == (n,)
    np.testing.assert_allclose(values.numpy(), 10 * np.log10(data_range**2 / error), rtol=1e-5)


def ssim_written_out(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one image (C, H, W), after Wang et al. 2004, pixel by pixel; borders mirrored without repeating the edge."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for a, b in zip(x, y, strict=True):
        a, b = (np.pad(plane, 5, mode="reflect") for plane in (a, b))
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                both = (window * (p - mean_p) * (q - mean_q)).sum()
                top = (2 * mean_p * mean_q + c1) * (2 * both + c2)
                values.append(top / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("n", "channels"), [(3, 3), (1, 1)])
def test_ssim_is_the_formula(n, channels):
    reference, other = pair(n, channels)
    expected = [ssim_written_out(x, y) for x, y in zip(reference.double().numpy(), other.double().numpy(), strict=True)]
    values = ssim(reference, other)
    assert values.shape == (n,)
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-5)
    if n > 1:
        assert expected[0] > expected[1] > expected[2]


def test_an_image_counts_the_same_alone_and_in_a_batch(monkeypatch):
    reference, other = pair(5)
    together = ssim(reference, other), psnr(reference, other)
    monkeypatch.setattr("halfbyte.metrics.images.CHUNK_VALUES", 2 * reference[0].numel())  # SSIM in chunks of 2, 2 and 1
    torch.testing.assert_close(ssim(reference, other), together[0])
    for index, (x, y) in enumerate(zip(reference.split(1), other.split(1), strict=True)):
        torch.testing.assert_close(ssim(x, y), together[0][index : index + 1])
        torch.testing.assert_close(psnr(x, y), together[1][index : index + 1])


@pytest.mark.parametrize("image", [draw(1, 3, 16, 16), torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)])
def test_equal_images(image):
    assert psnr(image, image.clone()).item() == math.inf
    assert ssim(image, image.clone()).item() == pytest.approx(1, abs=1e-4)


def test_a_broken_image_spoils_only_itself():
    reference, other = pair(3)
    other[1, 0, 3, 3] = math.nan
    for measure in (psnr, ssim):
        assert measure(reference, other).isnan().tolist() == [False, True, False]


def test_half_precision_images_are_measured_in_float32():
    reference, other = (images.bfloat16() for images in pair(2))
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(reference, other), measure(reference.float(), other.float()))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_that_are_not_images(measure):
    image = draw(2, 1, 16, 16)
    cases = {
        r"shapes \(2, 1, 16, 16\) and \(1, 1, 16, 16\) differ": (image, image[:1]),
        r"float32 and float32 \(1, 16, 16\)": (image[0], image[0]),
        r"float32 and float32 \(0, 1, 16, 16\)": (image[:0], image[:0]),
        "uint8 and uint8": (image.byte(), image.byte()),
        "pixels span -1 to 1": (torch.tensor([-1.0, 1.0] * 32).view(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)),
        "pixels span 0 to 255": (torch.zeros(1, 1, 8, 8), torch.tensor([0.0, 255.0] * 32).view(1, 1, 8, 8)),
    }
    for sentence, images in cases.items():
        with pytest.raises(HalfbyteError, match=sentence):
            measure(*images)


def test_the_smallest_image_of_ssim():
    assert ssim(draw(1, 1, 6, 6), draw(1, 1, 6, 6)).item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(HalfbyteError, match="images are 6x5 pixels; SSIM needs at least 6 a side"):
        ssim(draw(1, 1, 6, 5), draw(1, 1, 6, 5))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_without_torchmetrics_the_pip_line_is_given(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'halfbyte\[eval\]'"):
        measure(*pair())


def test_psnr_and_ssim_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    reference, other = pair(3, height=48, width=40)
    for index, (x, y) in enumerate(zip(reference.double().numpy(), other.double().numpy(), strict=True)):
        expected = metrics.peak_signal_noise_ratio(x, y, data_range=1.0)
        assert psnr(reference, other)[index].item() == pytest.approx(expected, rel=1e-5)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "win_size": 11, "full": True}
        _, full = metrics.structural_similarity(x, y, data_range=1.0, channel_axis=0, **options)
        # scikit-image leaves the borders, which it mirrors in another way, out of its mean
        inner = _ssim_map(reference[index : index + 1], other[index : index + 1])[0, :, 5:-5, 5:-5]
        np.testing.assert_allclose(inner.numpy(), full[:, 5:-5, 5:-5], atol=1e-4)  # single pixels, in float32
        assert inner.mean().item() == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-5)


def _ssim_map(reference: Tensor, other: Tensor) -> Tensor:
    """SSIM pixel by pixel, as `ssim` averages it."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    mean, full = structural_similarity_index_measure(other, reference, data_range=1.0, reduction="none", return_full_image=True)
    torch.testing.assert_close(mean, ssim(reference, other))
    torch.testing.assert_close(full.mean((1, 2, 3)), mean, rtol=0, atol=1e-6)
    return full
