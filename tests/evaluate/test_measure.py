"""Measurements by parts, and the figures made of them: equal to those of all images at once."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from halfbyte.errors import CorruptError, EvaluationError
from halfbyte.evaluate.extractors import Features
from halfbyte.evaluate.figures import Reference, figures
from halfbyte.evaluate.measure import Instruments, measure_batch, measure_folder, merged
from halfbyte.evaluate.sampling import Share
from halfbyte.metrics import kernel_distance, psnr, ssim


class Tiny:
    """A convolution as an extractor."""

    name, digest = "tiny", "00ff"

    def __init__(self):
        torch.manual_seed(0)
        self.convolution, self.head, self.seen = nn.Conv2d(1, 6, 3), nn.Linear(6, 4), 0

    def extract(self, images):
        self.seen += len(images)
        activations = torch.relu(self.convolution(images))
        pooled = activations.mean((2, 3))
        return Features(pooled, pooled[:, :3] ** 2, self.head(pooled), [activations])


class Memory:
    """Images in memory as a set."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def read(self, start, stop):
        return self.pixels[start:stop]


def pixels(count, seed=0):
    return torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


MINE, THEIRS = pixels(11), (pixels(11).float() * 0.9).to(torch.uint8)
PROMPTS = ("a cat", "a dog", "a hat")
SCORERS = {"length": lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts])}


@pytest.fixture
def tools():
    return Instruments(Tiny(), None, SCORERS)


@pytest.fixture
def measured(tools, tmp_path):
    measure_folder(tools, tmp_path / "parts", Memory(MINE), 11, 4, Memory(THEIRS), PROMPTS)
    return merged(tmp_path / "parts", 11, 4)


def test_parts_are_the_whole(tools, measured):
    said = [PROMPTS[index % 3] for index in range(11)]
    whole = measure_batch(tools, MINE, THEIRS, said)
    assert set(measured) == {"pooled", "spatial", "logits", "psnr", "ssim", "perceptual", "length"}
    for name, tensor in whole.items():
        torch.testing.assert_close(measured[name], tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["psnr"], psnr(THEIRS / 255, MINE / 255))
    torch.testing.assert_close(whole["ssim"], ssim(THEIRS / 255, MINE / 255))
    assert measured["length"].tolist() == [float(len(prompt)) for prompt in said]


def test_what_is_there_is_not_worked_out_again_and_processes_share(tools, measured, tmp_path):
    folder = tmp_path / "parts"
    before, seen = {file.name: file.read_bytes() for file in folder.iterdir()}, tools.extractor.seen
    (folder / "000004.safetensors").unlink()
    steps = []
    measure_folder(tools, folder, Memory(MINE), 11, 4, Memory(THEIRS), PROMPTS, progress=lambda *at: steps.append(at))
    assert tools.extractor.seen == seen + 2 * 4
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for rank in (1, 0):
        measure_folder(tools, tmp_path / "shared", Memory(MINE), 11, 4, Memory(THEIRS), PROMPTS, Share(rank, 2))
    for place in (folder, tmp_path / "shared"):
        assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_parts_that_are_missing_or_damaged_are_named(measured, tmp_path):
    folder = tmp_path / "parts"
    with pytest.raises(EvaluationError, match=r"000008.safetensors holds 3 images instead of 4"):
        merged(folder, 12, 4)
    part = folder / "000004.safetensors"
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(CorruptError, match="truncated"):
        merged(folder, 11, 4)
    part.unlink()
    with pytest.raises(EvaluationError, match="lacks the part of images 4 to 7"):
        merged(folder, 11, 4)


def test_small_images_have_no_ssim_and_float_ones_no_pairs(tools):
    assert "ssim" not in measure_batch(tools, MINE[:, :, :5, :5], THEIRS[:, :, :5, :5])
    assert set(measure_batch(tools, MINE)) == {"pooled", "spatial", "logits"}
    assert set(measure_batch(Instruments(), MINE, THEIRS)) == {"psnr", "ssim"}
    assert Instruments().identity() == {}
    assert tools.identity() == {"length": "length", "extractor": "00ff"}


def textbook(x, y):
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # scipy says so of dead features; its root is good enough here
def test_figures_of_a_measurement(tools, measured):
    original, real = measure_batch(tools, THEIRS), measure_batch(tools, pixels(40, seed=5))
    found = figures(measured, original, Reference.of("photos", real), seed=1)
    assert set(found) == {
        *("psnr", "ssim", "perceptual", "length", "inception_score", "precision", "recall"),
        *("frechet", "sfrechet", "kernel", "frechet_float", "kernel_float"),
    }
    assert found["psnr"].value == pytest.approx(measured["psnr"].mean().item())
    x, y = (side["pooled"].double().detach().numpy() for side in (measured, real))
    assert found["frechet"].value == pytest.approx(textbook(x, y), rel=1e-3)
    assert found["kernel"].value == pytest.approx(kernel_distance(measured["pooled"], real["pooled"]))
    assert found["frechet"].bias > 0
    assert figures(measured, original, Reference.of("photos", real), seed=1) == found
    float_figures = figures(original, None, Reference.of("photos", real))
    assert set(float_figures) == {"inception_score", "frechet", "sfrechet", "kernel", "precision", "recall"}
    assert set(figures({"psnr": measured["psnr"]}, original)) == {"psnr"}


def test_sets_in_different_features_are_refused(measured):
    other = {"pooled": torch.rand(9, 5)}
    with pytest.raises(EvaluationError, match="photos has 5 features an image, this extractor 6"):
        figures(measured, None, Reference.of("photos", other))
    with pytest.raises(EvaluationError, match="give one with --features"):
        figures({"psnr": measured["psnr"]}, None, Reference.of("photos", other))
