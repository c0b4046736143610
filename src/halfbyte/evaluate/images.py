"""Sets of images on disk, never held in memory whole: folders as torch-fidelity reads them, and .npz files as ADM's evaluator does.

images = open_images("samples")          a folder of .png, .jpg, .jpeg or .webp files, in the order of their names
images = open_images("samples.npz")      its arr_0, uint8 (N, H, W, C)
images.read(0, 32)                       uint8 (32, C, H, W)
write_npz(images, "samples.npz")
"""

import io
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halfbyte.checkpoint import write_file
from halfbyte.errors import CheckpointError, EvaluationError, MissingExtraError
from halfbyte.metrics import FeatureStatistics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLES = "arr_0"  # ADM's name for images in an .npz file
CHUNK = 64  # images written at a time


class ImageSet(Protocol):
    """Images of one size, by number."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop - 1: uint8 (n, C, H, W), C 1 or 3."""


def open_images(path: str | os.PathLike[str], side: int | None = None) -> "FolderImages | NpzImages":
    """The images of a folder or an .npz file.

    Args:
        side: cut a folder's images to the square in their middle and resize it to so many pixels, as the papers do with
            photographs; None: take them as they are.
    Raises:
        EvaluationError: when there are none, or they are of different sizes.
    """
    place = Path(path)
    if place.suffix == ".npz":
        if side is not None:
            raise EvaluationError(f"{place} holds images of one size already; only a folder's images are resized")
        return NpzImages(place)
    return FolderImages(place, side)


class FolderImages:
    """The images of a folder, in the order of their names; folders within it are not looked into."""

    def __init__(self, path: Path, side: int | None = None) -> None:
        self.path, self.side = path, side
        if not path.is_dir():
            raise EvaluationError(f"{path} is neither a folder of images nor an .npz file")
        self.files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
        if not self.files:
            raise EvaluationError(f"{path} holds no images; files that end in {', '.join(SUFFIXES)} are taken")
        self.grey = _opened(self.files[0]).mode in ("1", "L")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Tensor:
        images = [self._pixels(file) for file in self.files[start:stop]]
        sizes = {"x".join(map(str, image.shape[1:])) for image in images}
        if len(sizes) > 1:
            some = " and ".join(sorted(sizes)[:2])
            raise EvaluationError(f"the images of {self.path} are of different sizes, {some}; resize them with --image-size")
        return torch.stack(images)

    def _pixels(self, file: Path) -> Tensor:
        picture = _opened(file)
        if self.grey and picture.mode not in ("1", "L"):
            raise EvaluationError(f"{file} has colours, the first image of its folder has none; put them into different folders")
        picture = picture.convert("L" if self.grey else "RGB")
        if self.side is not None:
            picture = _squared(picture, self.side)
        pixels = torch.from_numpy(np.array(picture))
        return pixels[None] if self.grey else pixels.permute(2, 0, 1)


def _opened(file: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pictures need pillow: pip install 'halfbyte[eval]'") from error
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, UnidentifiedImageError) as error:
        raise EvaluationError(f"{file} is not an image that pillow reads: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise EvaluationError(f"{file} has more than 8 bits a channel; convert it to 8")
    return picture


def _squared(picture: Any, side: int) -> Any:
    """The square in the middle, resized."""
    from PIL import Image

    width, height = picture.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)


class NpzImages:
    """The images of an .npz file. Reading forwards is quick; reading backwards starts anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
            names = self.archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{path} is not an .npz file: {error}") from error
        if f"{SAMPLES}.npy" not in names:
            raise EvaluationError(f"{path} holds {', '.join(names) or 'nothing'}; images are expected under {SAMPLES}")
        self.member = self.archive.open(f"{SAMPLES}.npy")
        self.shape, fortran, dtype = _npy_header(self.member)
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or dtype != np.uint8 or fortran or not self.shape[0]:
            raise EvaluationError(f"{path} holds {dtype} {self.shape}; images are uint8 (N, H, W, C) with C 1 or 3")
        self.start = self.member.tell()

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self, start: int, stop: int) -> Tensor:
        size, stop = int(np.prod(self.shape[1:])), min(stop, len(self))
        self.member.seek(self.start + start * size)
        data = self.member.read((stop - start) * size)
        if len(data) != (stop - start) * size:
            raise EvaluationError(f"{self.path} is truncated; copy it again")
        pixels = np.frombuffer(bytearray(data), np.uint8).reshape(stop - start, *self.shape[1:])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, Fortran order and dtype of an .npy member, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise EvaluationError(f"{file.name} is damaged: {error}") from error


def read_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """The statistics of an ADM reference file: "pooled" from mu and sigma, "spatial" from mu_s and sigma_s, where they are there.

    The file does not say how many images they are of; nothing here depends on it.
    """
    found = {}
    try:
        with np.load(path, allow_pickle=False) as data:
            for name, ending in (("pooled", ""), ("spatial", "_s")):
                if f"mu{ending}" in data and f"sigma{ending}" in data:
                    mean, covariance = (torch.from_numpy(data[f"{key}{ending}"]) for key in ("mu", "sigma"))
                    found[name] = FeatureStatistics.from_moments(mean, covariance, 50_000)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} is not an .npz file of arrays: {error}") from error
    return found


def to_pixels(images: Tensor) -> Tensor:
    """Float images in [0, 1] as files hold them: uint8, rounded; what lies outside is clamped, NaN is black."""
    return (images.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def write_png(pixels: Tensor, path: Path) -> None:
    """One image, uint8 (C, H, W), whole or not at all."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy()).save(file, format="PNG")
    write_file(path, file.getvalue())


def write_npz(images: ImageSet, path: str | os.PathLike[str]) -> None:
    """A set of images as ADM's evaluator reads it, whole or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    channels, height, width = images.read(0, 1).shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, channels)}
    try:
        with zipfile.ZipFile(partial, "w") as archive, archive.open(f"{SAMPLES}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for start in range(0, len(images), CHUNK):
                member.write(images.read(start, start + CHUNK).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        partial.replace(final)
    except OSError as error:
        raise CheckpointError(f"{final} was not written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
