"""Metrics against formulas written out in numpy, and the Frechet distance against scipy and torchmetrics."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.metrics import FeatureStatistics, frechet_distance, psnr, spread, sqnr, ssim


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pair(n: int = 3, channels: int = 3, height: int = 20, width: int = 26) -> tuple[Tensor, Tensor]:
    """Smooth images and noisier copies, the noise growing from image to image: a reduction over the batch would show."""
    coarse = draw(n, channels, height // 2, width // 2)
    reference = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    strength = torch.linspace(0.02, 0.2, n).view(-1, 1, 1, 1)
    return reference, (reference + strength * (draw(n, channels, height, width, seed=1) - 0.5)).clamp(0, 1)


# SQNR


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sqnr_is_the_formula(dtype):
    reference, other = (draw(5, 7, seed=seed).to(dtype) for seed in (0, 1))
    r, o = reference.double().numpy(), other.double().numpy()
    assert sqnr(reference, other) == pytest.approx(10 * np.log10((r**2).sum() / ((r - o) ** 2).sum()), rel=1e-12)


def test_sqnr_of_a_tenth_is_twenty_decibels():
    assert sqnr(torch.ones(4), torch.full((4,), 0.9, dtype=torch.float64)) == pytest.approx(20)


def test_sqnr_sums_in_float64_over_chunks():
    reference = torch.full((2**20 + 3,), 0.1)  # more than one chunk, and a float32 sum of it would be off in the fourth digit
    other = reference.clone()
    other[-1] = 0.0
    assert sqnr(reference, other) == pytest.approx(10 * math.log10(2**20 + 3), rel=1e-12)


def test_sqnr_at_the_edges():
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr(one, one) == math.inf
    assert sqnr(zero, zero) == math.inf
    assert sqnr(zero, one) == -math.inf
    assert math.isnan(sqnr(one, torch.tensor([1.0, math.nan, 1.0])))
    assert sqnr(one, torch.tensor([1.0, math.inf, 1.0])) == -math.inf
    assert math.isnan(sqnr(torch.full((3,), math.inf), one))
    assert sqnr(one.requires_grad_(), 2 * one) == 0


def test_sqnr_refuses_other_shapes():
    with pytest.raises(HalfbyteError, match=r"shapes \(3,\) and \(1, 3\) differ"):
        sqnr(torch.ones(3), torch.ones(1, 3))


# PSNR and SSIM


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
    monkeypatch.setattr("halfbyte.metrics.CHUNK_VALUES", 2 * reference[0].numel())  # SSIM in chunks of 2, 2 and 1
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


# Mean and standard error


def test_spread():
    assert spread(torch.tensor([1.0, 2.0, 3.0, 6.0])) == {"mean": 3.0, "stderr": pytest.approx(math.sqrt(14 / 3 / 4))}
    assert spread(torch.tensor([4.0])) == {"mean": 4.0, "stderr": None}
    assert spread(torch.tensor([4.0, math.inf])) == {"mean": math.inf, "stderr": None}


# Frechet distance

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
