"""Float against quantized: same seeds, same images; identical models are told apart from different ones."""

import copy
import math

import pytest
import torch

import halfbyte as hb
from halfbyte.evaluate import float_states, layer_sqnr, prediction_sqnr, sample_images


def test_an_image_depends_on_its_seed_and_index_alone(pipe):
    done = []
    images = sample_images(pipe, 5, 2, seed=3, batch=5, progress=lambda *count: done.append(count))
    assert images.shape == (5, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert done == [(5, 10), (10, 10)]
    for batch in (1, 2):
        torch.testing.assert_close(sample_images(pipe, 5, 2, seed=3, batch=batch), images, rtol=0, atol=1e-5)
    assert not torch.equal(sample_images(pipe, 5, 2, seed=4), images)


def test_predictions_of_the_same_and_of_a_quantized_model(pipe):
    states = float_states(pipe, trajectories=2, steps=4, seed=0)
    assert states.timesteps == sorted(states.timesteps, reverse=True)
    total, by_timestep = prediction_sqnr(pipe.unet, states)
    assert total == math.inf
    assert [timestep for timestep, _ in by_timestep] == states.timesteps
    student = copy.deepcopy(pipe.unet)
    result = hb.quantize(student, "quartz-w4a4")
    total, by_timestep = prediction_sqnr(student, states)
    assert 3 < total < 40
    assert min(value for _, value in by_timestep) <= total <= max(value for _, value in by_timestep)
    damage = layer_sqnr(pipe.unet, student, states.calls[:1])
    assert set(damage) == {layer.name for layer in result.layers}
    assert all(5 < value < 60 for value in damage.values())
    assert damage["conv_in"] > damage["mid_block.resnets.0.conv1"] + 10  # 8 bits against 4


def test_a_damaged_student_is_seen_not_skipped(pipe):
    states = float_states(pipe, trajectories=1, steps=2, seed=0)
    student = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        student.conv_out.bias.fill_(float("nan"))
    total, _ = prediction_sqnr(student, states)
    assert total != total or total == -math.inf


@pytest.mark.parametrize("keep", [1, 3])
def test_states_are_bounded(pipe, keep):
    assert len(float_states(pipe, trajectories=1, steps=4, seed=0, keep=keep).calls) == keep
