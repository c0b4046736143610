"""Batches that mix timesteps: every row has the scale of its own, bit for bit as in a call of its own."""

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import CalibrationError
from halfbyte.layers import FakeQuant, follow_timesteps
from halfbyte.quantizers import FixedScale
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

TIMESTEPS = torch.tensor([5, 990, 300, 300, 610, 5])
CALIBRATED = [100.0, 400.0, 700.0, 999.0]
SCALES, ZEROS = torch.tensor([0.05, 0.1, 0.2, 0.4]), torch.tensor([3, 5, 6, 7])
LAYERS = {  # layer, shape of its input
    "linear": (nn.Linear(10, 4), (6, 10)),
    "linear of tokens": (nn.Linear(10, 4), (6, 3, 10)),
    "linear of folded tokens": (nn.Linear(10, 4), (12, 3, 10)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (6, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (6, 4, 5, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 2, stride=2), (6, 4, 5, 5)),
}
SPECS = {
    "int4": ActivationSpec("int4", scale="timestep"),
    "unsigned": ActivationSpec("ue1m3", zero_point=True, scale="timestep"),
    "fp4": ActivationSpec("e2m1", scale="timestep"),
}


class Denoiser(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


def model_of(name, spec):
    layer, shape = LAYERS[name]
    model = Denoiser(copy.deepcopy(layer))
    dynamic = LayerSpec(WeightSpec("int4"), spec.replace(scale="dynamic"))
    hb.quantize(model, Recipe("timed", dynamic, edge=dynamic), simulate=True)
    model.layer.spec = LayerSpec(WeightSpec("int4"), spec)
    model.layer.fix_scale(FixedScale(SCALES.clone(), ZEROS.clone()))
    follow_timesteps(model, CALIBRATED)
    return model.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_a_mixed_batch_are_rounded_as_in_calls_of_their_own(name, spec):
    model, x = model_of(name, spec)
    layer, repeats = model.layer, len(x) // len(TIMESTEPS)
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.rounded_input(args[0])))
    with torch.no_grad():
        mixed = model(x, TIMESTEPS)
        parts = [model(part, time) for part, time in zip(x.split(repeats), TIMESTEPS, strict=True)]
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert torch.allclose(mixed, torch.cat(parts), atol=1e-6)
    assert len({tuple(part.flatten().tolist()) for part in seen[1:]}) == 6
    with torch.no_grad():
        assert not torch.allclose(mixed, model(x, int(TIMESTEPS.max())), atol=1e-3), "the scales make no difference"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_layers_do_the_same(each_backend, name, spec):
    model, x = model_of(name, spec)
    repeats = len(x) // len(TIMESTEPS)
    packed = hb.pack(copy.deepcopy(model))
    with torch.no_grad():
        mixed = packed(x, TIMESTEPS)
        parts = [packed(part, time) for part, time in zip(x.split(repeats), TIMESTEPS, strict=True)]
        assert torch.allclose(mixed, torch.cat(parts), atol=1e-6)
        assert torch.allclose(mixed, model(x, TIMESTEPS), atol=1e-5)


def test_gradients_of_a_mixed_batch_pass():
    model, x = model_of("conv2d", SPECS["int4"])
    model(x.requires_grad_(), TIMESTEPS).square().sum().backward()
    assert x.grad.abs().sum() > 0


BATCHES = {"rows": (5, 10), "tokens without a batch axis": (10,)}


@pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
def test_rows_that_belong_to_no_timestep_are_refused(shape):
    model, _ = model_of("linear", SPECS["int4"])
    with pytest.raises(CalibrationError, match="in a call with 6 timesteps; whose they are is unknown"):
        model(torch.zeros(shape), TIMESTEPS)


def test_an_image_without_a_batch_axis_is_one_row():
    model, _ = model_of("conv2d", SPECS["int4"])
    with pytest.raises(CalibrationError, match="got 1 rows in a call with 2 timesteps"):
        model(torch.zeros(4, 5, 5), torch.tensor([5, 990]))
    assert model(torch.zeros(4, 5, 5), 5).shape == (6, 5, 5)


def layer_with(**changes):
    model, x = model_of("linear", SPECS["int4"])
    for name, value in changes.items():
        setattr(model.layer, name, value)
    return model, x


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_scale": None}, "has timestep input scales that were never calibrated"),
        ({"activation_scale": SCALES[:3]}, "a table of 3 entries for 4 calibrated timesteps"),
        ({"timestep": None}, "tables over 4 timesteps but follows no denoiser"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_table_is_an_error(changes, words, packed):
    model, x = layer_with()
    if packed:
        hb.pack(model)
    for name, value in changes.items():
        setattr(model.layer, name, value)
    with pytest.raises(CalibrationError, match=words), torch.no_grad():
        model(x, TIMESTEPS)
    assert isinstance(model.layer, FakeQuant) != packed
