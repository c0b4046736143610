"""Differences over time: equal to the paper's recursion with both memories, better than whole inputs, never carried over."""

import copy

import pytest
import torch
from torch import nn

from halfbyte import api, pack
from halfbyte.errors import CalibrationError, PackedError, RecipeError
from halfbyte.evaluate import float_states, prediction_sqnr
from halfbyte.layers import FakeQuant
from halfbyte.methods.modiff import forget, remembered_bytes
from halfbyte.presets import get_recipe
from halfbyte.quantizers import round_activation
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

DYNAMIC = Recipe("dynamic", LayerSpec(WeightSpec("int4"), ActivationSpec("int4")), edge=None, temporal=True)


class Net(nn.Module):
    """Three layers with a non-linearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.leave = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.leave(self.conv(self.enter(x).relu()).relu())


def trajectory(steps: int = 6):
    """Inputs that change a little from one timestep to the next."""
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(2, 3, 8, 8, generator=generator) for _ in "ab")
    return [(start + (end - start) * step / 40, 900.0 - 100 * step) for step in range(steps)]


def float_and_simulated(recipe):
    torch.manual_seed(0)
    exact = Net().eval()
    model = copy.deepcopy(exact)
    calls = [(x, t) for x, t in trajectory()]
    result = api.quantize(model, recipe, calls if recipe.needs_calibration else None, simulate=True)
    return exact, model, result


class PaperLayer:
    """Eq. (5) to (7) of the paper as they stand, on one layer: both memories, outputs added up."""

    def __init__(self, layer: FakeQuant) -> None:
        self.layer, self.a_hat, self.o_hat = layer, None, None

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        spec, first = self.layer.spec.activation, self.a_hat is None
        difference = a if first else a - self.a_hat
        rows = difference.flatten(2).transpose(1, 2)
        rounded = round_activation(rows, spec, self.layer.fixed_scale() if first else None).transpose(1, 2).view(a.shape)
        weight = self.layer.rounded_weight(self.layer.weight).detach()
        product = nn.functional.conv2d(rounded, weight, padding=self.layer.padding)
        self.a_hat = rounded if first else rounded + self.a_hat
        self.o_hat = product if first else product + self.o_hat
        return self.o_hat if self.layer.bias is None else self.o_hat + self.layer.bias.detach()[:, None, None]


@pytest.mark.parametrize("scale", ["dynamic", "static"])
def test_equals_the_paper_s_recursion(scale):
    activation = ActivationSpec("ue1m3", zero_point=True, scale=scale)
    _, model, _ = float_and_simulated(DYNAMIC.replace(inner=LayerSpec(WeightSpec("int4"), activation), keep=("enter", "leave")))
    layer = PaperLayer(model.conv)
    for x, t in trajectory():
        with torch.no_grad():
            expected = model.leave(layer(model.enter(x).relu()).relu())
            torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)


def test_errors_shrink_after_the_first_step_and_do_not_add_up():
    exact, model, _ = float_and_simulated(DYNAMIC.replace(inner=LayerSpec(WeightSpec("int8"), ActivationSpec("int4")), edge=None))
    plain = float_and_simulated(DYNAMIC.replace(inner=LayerSpec(WeightSpec("int8"), ActivationSpec("int4")), temporal=False))[1]
    with torch.no_grad():
        errors = [[float((one(x, t) - exact(x, t)).square().mean()) for one in (model, plain)] for x, t in trajectory(30)]
    assert errors[0][0] == errors[0][1]
    assert all(ours < 0.1 * theirs for ours, theirs in errors[3:])
    assert errors[-1][0] < 2 * errors[5][0]


def test_a_new_trajectory_or_batch_starts_anew():
    _, model, _ = float_and_simulated(DYNAMIC)
    with torch.no_grad():
        first = [model(x, t) for x, t in trajectory()]
        again = [model(x, t) for x, t in trajectory()]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        other = model(trajectory()[2][0][:1], 700.0)
        assert other.shape[0] == 1
        model(*trajectory()[0])
        x, t = trajectory()[-1]
        with_history = model(x, t)
        forget(model)
        assert not torch.equal(model(x, t), with_history)


def test_it_says_what_it_did_and_what_it_holds():
    _, model, result = float_and_simulated(DYNAMIC)
    assert remembered_bytes(model) == 0
    model(*trajectory()[0])
    assert remembered_bytes(model) == 4 * 2 * 64 * 8  # the input of the one layer that is not an edge
    assert "what they changed by since the last timestep is quantized (MoDiff)" in result.table()
    with pytest.raises(PackedError, match="differences over time exist in simulation only"):
        pack(model)


@pytest.mark.parametrize("name", ["quartz-w4a4", "msfp-w4a4", "quest-w4a4", "int4-g64-w4a4"])
def test_it_is_an_option_of_any_recipe(name, pipe):
    states = float_states(pipe, 2, 4, 0)
    found = {}
    for temporal in (False, True):
        student = copy.deepcopy(pipe)
        recipe = get_recipe(name).replace(temporal=temporal)
        api.quantize(student, recipe, 2 if recipe.needs_calibration else None, simulate=True, steps=4)
        found[temporal] = prediction_sqnr(student.unet, states)[0]
    dynamic = get_recipe(name).inner.activation.scale == "dynamic"
    assert found[True] > (found[False] if dynamic else 5)  # a net of random weights changes by more than a trained one


def test_bad_input_is_refused():
    with pytest.raises(RecipeError, match="differences over time are of quantized inputs"):
        get_recipe("nf4-w4a16").replace(temporal=True)
    with pytest.raises(CalibrationError, match="has no argument named"):
        api.quantize(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), DYNAMIC, simulate=True)
