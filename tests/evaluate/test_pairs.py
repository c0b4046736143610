"""Float against quantized: same seeds, same images; identical models are told apart from different ones."""

import copy
import math

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call
from halfbyte.conversion import packed_layers
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import States, float_states, layer_sqnr, predict, prediction_sqnr, sample_images
from halfbyte.metrics import SignalToNoise, sqnr


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


@pytest.mark.parametrize("recipe", ["quartz-w4a4", "int8-w8a8"])
def test_quantized_images_are_the_same_bits_in_every_batch(pipe, recipe):
    """Float images differ by 1e-6, for torch's matrix products round by batch; sums of integers are exact in any order."""
    hb.quantize(pipe, recipe)
    images = sample_images(pipe, 4, 2, seed=1, batch=4)
    assert all(torch.equal(sample_images(pipe, 4, 2, seed=1, batch=batch), images) for batch in (1, 3, 4))


class Conditional(nn.Module):
    """The timestep is the third argument here, behind the prompt's embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        return (self.inner(hidden_states) + encoder_hidden_states,)


class Positional:
    """A pipeline that passes all arguments by position."""

    def __init__(self):
        self.transformer = Conditional()

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, batch_size, num_inference_steps, generator):
        x = torch.stack([torch.randn(4, generator=one) for one in generator])
        for step in range(num_inference_steps):
            x = self.transformer(x, torch.full((4,), 70.0), 1000 - step)[0]


def test_timesteps_are_found_wherever_they_are_passed():
    pipe = Positional()
    states = float_states(pipe, trajectories=2, steps=3, seed=0)
    assert states.timesteps == [1000.0, 999.0, 998.0]
    assert [output.shape for output in states.outputs] == [(2, 4)] * 3
    assert not pipe.transformer._forward_pre_hooks


def test_layers_are_judged_alone_on_the_float_models_inputs():
    torch.manual_seed(0)
    reference, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(5, 16)
    student = copy.deepcopy(reference)
    hb.quantize(student, "int4-w4a4")
    calls = [Call((part,), {}) for part in x.split(2)]
    found = layer_sqnr(reference, student, calls)
    with torch.no_grad():
        hidden = reference[1](reference[0](x))
        expected = sqnr(reference[2](hidden), packed_layers(student)["2"](hidden))
    assert found["2"] == pytest.approx(expected, abs=1e-4)
    assert not any(module._forward_hooks for module in reference.modules())


def test_ratios_sum_energies_over_tensors_and_know_their_edges():
    one, zero, bad = torch.ones(3), torch.zeros(3), torch.tensor([1.0, math.nan, 1.0])
    cases = [((one, one), math.inf), ((zero, zero), math.inf), ((zero, one), -math.inf), ((one, one * math.inf), -math.inf)]
    for (reference, other), expected in cases:
        ratio = SignalToNoise()
        ratio.add(reference, other)
        assert ratio.decibel == expected
    ratio.add(one, bad)
    assert math.isnan(ratio.decibel)
    assert SignalToNoise().decibel == math.inf
    parts, references, others = SignalToNoise(), torch.randn(4, 50), torch.randn(4, 50)
    for reference, other in zip(references, others, strict=True):
        parts.add(reference, other)
    assert parts.decibel == pytest.approx(sqnr(references, others))
    with pytest.raises(HalfbyteError, match="differ; both must come from the same noise"):
        parts.add(torch.ones(2, 3), torch.ones(3))


def test_a_prediction_is_found_in_tuples_tensors_and_outputs(build, call):
    model, arguments = build("UNet2DModel"), call("UNet2DModel")
    plain = predict(model, Call((), {**arguments, "return_dict": False}))
    assert torch.equal(plain, predict(model, Call((), arguments)))
    assert predict(nn.Sequential(nn.Linear(3, 2)), Call((torch.ones(1, 3),), {})).shape == (1, 2)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        prediction_sqnr(model, States([Call((), arguments)], [], []))
