"""Grids of images: every pixel in its place, and what is refused."""

import base64
import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.report.pictures import GUTTER, data_uri, grid_png, picture_size


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_every_pixel_in_its_place(channels):
    images = torch.rand(5, channels, 6, 4, generator=torch.Generator().manual_seed(0))
    grid = read(grid_png(images, 3)).reshape(2 * 6 + GUTTER, 3 * 4 + 2 * GUTTER, channels)
    seen = np.zeros(grid.shape[:2], bool)
    for index, image in enumerate(images):
        rows = slice(index // 3 * (6 + GUTTER), index // 3 * (6 + GUTTER) + 6)
        columns = slice(index % 3 * (4 + GUTTER), index % 3 * (4 + GUTTER) + 4)
        np.testing.assert_array_equal(grid[rows, columns], (image * 255).round().byte().permute(1, 2, 0).numpy())
        seen[rows, columns] = True
    assert (grid[~seen] == 128).all()  # gutters and the missing sixth image


def test_grid_of_few_images_is_no_wider_than_they_are():
    assert read(grid_png(torch.zeros(2, 1, 4, 4), 8)).shape == (4, 8 + GUTTER)


def test_grid_clamps_what_lies_outside():
    image = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 2.0, math.nan]]).view(1, 1, 2, 3)
    assert read(grid_png(image, 1)).tolist() == [[0, 0, 128], [255, 255, 0]]
    assert read(grid_png(image.bfloat16(), 1)).tolist() == [[0, 0, 128], [255, 255, 0]]


def test_grid_refuses_what_is_no_image():
    for images in (torch.zeros(1, 2, 4, 4), torch.zeros(4, 4), torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 4, 4).byte()):
        with pytest.raises(HalfbyteError, match=r"a grid needs float \(N, C, H, W\)"):
            grid_png(images, 1)
    with pytest.raises(HalfbyteError, match="at least 1 column, got 0"):
        grid_png(torch.zeros(1, 1, 4, 4), 0)


def test_data_uri():
    png = grid_png(torch.zeros(1, 3, 5, 7), 1)
    uri = data_uri(png)
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == png
    assert picture_size(uri) == (7, 5)


def test_without_pillow_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'halfbyte\[eval\]'"):
        grid_png(torch.zeros(1, 1, 4, 4), 1)
