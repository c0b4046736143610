"""Sampling into folders: the same bits however often it is stopped, and by however many processes."""

import pytest
import torch

from halfbyte.errors import EvaluationError, SamplerError
from halfbyte.evaluate import sample_batch, sample_images
from halfbyte.evaluate.images import FolderImages, to_pixels
from halfbyte.evaluate.sampling import Sampling, Share, sample_folder, seconds_per_image

SAMPLING = Sampling(images=5, steps=2, seed=3, batch=2)


def all_images(folder):
    return FolderImages(folder).read(0, 99)


@pytest.fixture
def whole(pipe, tmp_path):
    sample_folder(pipe, tmp_path / "whole", SAMPLING)
    return tmp_path / "whole"


def test_the_folder_holds_what_the_pipeline_makes(pipe, whole):
    assert torch.equal(all_images(whole), to_pixels(sample_images(pipe, 5, 2, seed=3, batch=2)))
    assert seconds_per_image(whole) > 0
    assert sorted(file.name for file in whole.glob("*.png")) == [f"{index:06d}.png" for index in range(5)]


class StopError(Exception):
    pass


@pytest.mark.parametrize("calls", range(6))
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(pipe, whole, tmp_path, calls):
    left, done, broken = calls, [], tmp_path / "broken"

    def check():
        nonlocal left
        if not left:
            raise StopError
        left -= 1

    with pytest.raises(StopError):
        sample_folder(pipe, broken, SAMPLING, check=check)
    there = len(list(broken.glob("*.png")))
    assert there == min(4, calls // 2 * 2)  # two calls a batch: whole batches or nothing
    sample_folder(pipe, broken, SAMPLING, progress=lambda *at: done.append(at))
    assert torch.equal(all_images(broken), all_images(whole))
    assert done[0][0] > there * 2  # what was there counts as done
    assert done[-1] == (10, 10)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_a_batch_that_lacks_an_image_is_made_again(pipe, whole):
    """A float image's last bits depend on its batch: it is not made alone."""
    before = all_images(whole)
    (whole / "000002.png").unlink()
    calls = []
    sample_folder(pipe, whole, SAMPLING, progress=lambda *at: calls.append(at))
    assert torch.equal(all_images(whole), before)
    assert calls == [(8, 10), (10, 10), (10, 10)]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_batches(pipe, whole, tmp_path, processes):
    for rank in reversed(range(processes)):
        sample_folder(pipe, tmp_path / "shared", SAMPLING, Share(rank, processes))
    assert torch.equal(all_images(tmp_path / "shared"), all_images(whole))


def test_arguments_reach_the_pipeline(pipe):
    noisy = sample_batch(pipe, range(2), 2, 2, arguments={"eta": 1.0})
    assert not torch.equal(noisy, sample_batch(pipe, range(2), 2, 2))
    with pytest.raises(SamplerError, match=r"DDIMPipeline takes no argument 'guidance'; it takes 'batch_size', 'eta'"):
        sample_batch(pipe, range(2), 2, 2, arguments={"guidance": 1.0})
    with pytest.raises(SamplerError, match=r"DDIMPipeline does not sample with these arguments: .*list of generators"):
        sample_batch(pipe, range(2), 2, 2, arguments={"batch_size": 3})


def test_settings_that_make_no_sense():
    for name, least in (("images", 2), ("steps", 1), ("batch", 1)):
        with pytest.raises(EvaluationError, match=f"{name} must be at least {least}, got 0"):
            Sampling(**{"images": 2, "steps": 1, name: 0})


def test_identities_differ_where_settings_do():
    settings = [{}, {"seed": 1}, {"batch": 3}, {"prompts": ("a",)}, {"prompts": ("a", "b")}, {"arguments": {"eta": 1.0}}]
    identities = [repr(Sampling(4, 2, **one).identity()) for one in settings]
    assert len(set(identities)) == len(settings)


def test_times_that_are_missing_are_said(tmp_path):
    with pytest.raises(EvaluationError, match="does not say how long its images took"):
        seconds_per_image(tmp_path)
