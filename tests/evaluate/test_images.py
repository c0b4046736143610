"""Sets of images: what is written is what is read, by us, by numpy and by pillow; what is no set is refused."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from halfbyte.errors import CheckpointError, EvaluationError
from halfbyte.evaluate.images import open_images, read_statistics, to_pixels, write_npz, write_png
from halfbyte.metrics import FeatureStatistics, frechet_distance


def pictures(count, channels=1, side=8, seed=0):
    return torch.randint(256, (count, channels, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def folder_of(images, folder):
    folder.mkdir()
    for index, image in enumerate(images):
        write_png(image, folder / f"{index:06d}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_and_npz_files_hold_the_same_images(tmp_path, channels):
    images = pictures(70, channels)
    folder = open_images(folder_of(images, tmp_path / "folder"))
    assert len(folder) == 70
    assert torch.equal(folder.read(0, 70), images)
    assert torch.equal(folder.read(60, 99), images[60:])
    write_npz(folder, tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz", allow_pickle=False) as data:
        assert data.files == ["arr_0"]
        np.testing.assert_array_equal(data["arr_0"], images.permute(0, 2, 3, 1).numpy())
    packed = open_images(tmp_path / "images.npz")
    assert len(packed) == 70
    for start, stop in ((0, 3), (40, 99), (3, 9)):  # forwards, over the end, and backwards
        assert torch.equal(packed.read(start, stop), images[start:stop])
    with Image.open(tmp_path / "folder" / "000003.png") as picture:
        assert picture.mode == ("L" if channels == 1 else "RGB")


def test_files_of_adm_are_read(tmp_path):
    """As its sampler writes them: images and labels, compressed or not."""
    images = pictures(5, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "samples.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(5))
        assert torch.equal(open_images(tmp_path / "samples.npz").read(1, 4), images[1:4])


def test_statistics_of_adm_are_read(tmp_path):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    mean, covariance = features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2])
    found, other = read_statistics(tmp_path / "reference.npz"), FeatureStatistics.of(features + 1)
    assert frechet_distance(found["pooled"], other) == pytest.approx(
        frechet_distance(FeatureStatistics.of(features), other), rel=1e-9
    )
    assert found["spatial"].num_features == 2
    np.savez(tmp_path / "samples.npz", pictures(2).permute(0, 2, 3, 1).numpy())
    assert read_statistics(tmp_path / "samples.npz") == {}


def test_photographs_are_cut_square_and_resized(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (30, 20)), ("b.jpg", (10, 40)), ("c.webp", (20, 20))):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "photos" / name)
    with pytest.raises(EvaluationError, match=r"different sizes, 20x20 and 20x30; resize them with --image-size"):
        open_images(tmp_path / "photos").read(0, 3)
    resized = open_images(tmp_path / "photos", side=8).read(0, 3)
    assert resized.shape == (3, 3, 8, 8)
    assert (resized.float() - torch.tensor([200.0, 100, 50]).view(1, 3, 1, 1)).abs().max() < 6
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255  # only the middle is kept
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "a.png")
    assert (open_images(tmp_path / "wide", side=4).read(0, 1) == 255).all()


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([[-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0, float("nan")]])
    assert to_pixels(values).tolist() == [[0, 0, 0, 1, 255, 255, 0]]


def broken(tmp_path):
    (tmp_path / "empty").mkdir()
    folder_of(pictures(1), tmp_path / "mixed")
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "z.png")
    (tmp_path / "deep").mkdir()
    Image.new("I;16", (8, 8)).save(tmp_path / "deep" / "a.png")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no image")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "names.npz", mu=np.zeros(3))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "flat.npz", np.zeros((2, 4), np.uint8))
    np.savez(tmp_path / "objects.npz", np.array([{}]))
    return {
        "nowhere": "is neither a folder of images nor an .npz file",
        "empty": "holds no images; files that end in .png",
        "mixed": "z.png has colours, the first image of its folder has none",
        "deep": "has more than 8 bits a channel",
        "text": "is not an image that pillow reads",
        "text.npz": "is not an .npz file",
        "nothing.npz": "is not an .npz file",
        "names.npz": "holds mu.npy; images are expected under arr_0",
        "floats.npz": r"holds float64 (2, 4, 4, 3); images are uint8 (N, H, W, C)",
        "flat.npz": "holds uint8 (2, 4)",
        "objects.npz": "holds object (1,)",
    }


def test_what_is_no_set_of_images_is_refused(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(EvaluationError, match=re.escape(words)):
            open_images(tmp_path / name).read(0, 9)


def test_a_truncated_file_is_noticed(tmp_path):
    write_npz(open_images(folder_of(pictures(3), tmp_path / "folder")), tmp_path / "whole.npz")
    file = io.BytesIO((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(file.getvalue()[:-30])
    with pytest.raises(EvaluationError, match=r"is not an \.npz file"):
        open_images(tmp_path / "cut.npz")


def test_a_failed_write_leaves_nothing(tmp_path):
    images = open_images(folder_of(pictures(2), tmp_path / "folder"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(CheckpointError, match="was not written"):
        write_npz(images, tmp_path / "taken")
    with pytest.raises(CheckpointError, match="was not written"):
        write_npz(images, tmp_path / "missing" / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]
