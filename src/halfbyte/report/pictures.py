"""Images as one PNG: a grid of them, and its data URI."""

import base64
import io
import struct

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError

GUTTER = 2  # pixels between two images
GUTTER_GREY = 0.5  # told apart from black and from white images, on light and on dark pages


def grid_png(images: Tensor, columns: int) -> bytes:
    """Images side by side in reading order, as the bytes of a PNG file.

    Args:
        images: float (N, C, H, W) in [0, 1], N at least 1, C 1 (grey) or 3 (RGB). What lies outside is clamped, NaN is black.
        columns: images in a row; a single row is no longer than it has images.
    Raises:
        HalfbyteError: for other shapes, or columns below 1.
        MissingExtraError: without pillow.
    """
    if images.ndim != 4 or not images.numel() or images.shape[1] not in (1, 3) or not images.is_floating_point():
        given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise HalfbyteError(f"images are {given}; a grid needs float (N, C, H, W) with N at least 1 and C 1 or 3")
    if columns < 1:
        raise HalfbyteError(f"a grid needs at least 1 column, got {columns}")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pictures need pillow: pip install 'halfbyte[eval]'") from error
    grid = _tile(images.detach().cpu().float(), min(columns, len(images)))
    pixels = (grid.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    Image.fromarray(array.numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_uri(png: bytes) -> str:
    """The bytes of a PNG file as the address of an <img> that loads nothing."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def picture_size(uri: str) -> tuple[int, int]:
    """Width and height in pixels of a `data_uri`, from the PNG's header."""
    header = base64.b64decode(uri.partition(",")[2][:32])
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def _tile(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) -> (C, rows * H + gutters, columns * W + gutters); missing images of the last row are gutter."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    size = (rows * (height + GUTTER) - GUTTER, columns * (width + GUTTER) - GUTTER)
    grid = torch.full((channels, *size), GUTTER_GREY)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GUTTER), index % columns * (width + GUTTER)
        grid[:, top : top + height, left : left + width] = image
    return grid
