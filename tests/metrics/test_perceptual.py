"""Perceptual distances: the formula, and LPIPS through torchmetrics."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.metrics import Lpips, perceptual_distance


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_formula_pixel_by_pixel():
    maps, others = [[draw(2, 3, 4, 4, seed=s), draw(2, 5, 2, 2, seed=s)] for s in (0, 1)]
    expected = np.zeros(2)
    for left, right in zip(maps, others, strict=True):
        for n in range(2):
            values = []
            for i in range(left.shape[2]):
                for j in range(left.shape[3]):
                    a, b = left[n, :, i, j].numpy(), right[n, :, i, j].numpy()
                    values.append(((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
            expected[n] += np.mean(values)
    np.testing.assert_allclose(perceptual_distance(maps, others).numpy(), expected, rtol=1e-5)


def test_equal_maps_and_dead_pixels():
    maps = [torch.zeros(2, 3, 4, 4)]
    assert perceptual_distance(maps, maps).tolist() == [0, 0]
    assert perceptual_distance([draw(1, 2, 3, 3)], [2 * draw(1, 2, 3, 3)]).item() == pytest.approx(0, abs=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(HalfbyteError, match="0 and 1 layers"):
        perceptual_distance([], [draw(1, 1, 2, 2)])
    with pytest.raises(HalfbyteError, match="differ"):
        perceptual_distance([draw(1, 1, 2, 2)], [draw(1, 2, 2, 2)])
    with pytest.raises(HalfbyteError, match="'alex', 'vgg' and 'squeeze', got 'resnet'"):
        Lpips("resnet")


def test_without_torchvision_the_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(MissingExtraError, match="torchvision and the 'alex' weights"):
        Lpips()


def test_lpips_gives_a_value_an_image_and_takes_grey(monkeypatch):
    import torchmetrics.image.lpip as module

    class Metric:
        def __init__(self, net_type):
            self.net = self.distance

        def distance(self, x, y, normalize):
            assert normalize
            assert x.shape[1] == 3
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(module, "LearnedPerceptualImagePatchSimilarity", Metric)
    images = draw(3, 1, 4, 4)
    found = Lpips("vgg")(images, images + torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1, 1))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.1, 0.2]))
