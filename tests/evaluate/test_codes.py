"""Counts of codes against plain numpy: entropies, histograms, shifts, and what packed and simulated layers say of themselves."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import find_denoiser
from halfbyte.evaluate import codes as room
from halfbyte.evaluate import float_states, layer_sqnr
from halfbyte.evaluate.codes import BINS, VALUES, InputCodes, entropy, watched_inputs, weight_codes
from halfbyte.formats import get_grid
from halfbyte.layers import FakeQuantLinear
from halfbyte.presets import get_recipe
from halfbyte.quantizers import FixedScale, quantize_activation, quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec, largest_multiplier

SPECS = {
    "int4": ActivationSpec("int4"),
    "e2m1": ActivationSpec("e2m1"),
    "shifted": ActivationSpec("lzs4", max_shift=4),
    "cut": ActivationSpec("lzs4", max_shift=4, rounding="truncate"),
    "shifted, with a peak": ActivationSpec("lzs4", max_shift=4, subgroup=8, peak=127),
    "shifted floats": ActivationSpec("e2m1", max_shift=2),
    "unsigned": ActivationSpec("ue2m2", zero_point=True),
    "unsigned, shifted": ActivationSpec("ue1m3", max_shift=4, zero_point=True),
    "multiples": ActivationSpec("e2m1", max_multiple=10),
    "unsigned multiples": ActivationSpec("ue1m3", max_multiple=16, zero_point=True, subgroup=8),
    "groups": ActivationSpec("int4", group=16),
    "unsigned groups": ActivationSpec("ue1m3", zero_point=True, group=10),
    "calibrated": ActivationSpec("int4", scale="static"),
    "calibrated, unsigned": ActivationSpec("ue1m3", zero_point=True, scale="static"),
}


def numpy_entropy(symbols):
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    return -(share * np.log2(share)).sum()


def heavy(*shape, seed=0):
    """Values with a few large ones, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def fixed_for(spec):
    if spec.scale == "dynamic":
        return None
    return FixedScale(torch.tensor(0.37), torch.tensor(5 if spec.zero_point else 0))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [(7, 1, 40), (2, 9, 24)], ids=["tokens", "images"])
def test_counts_are_those_of_numpy(spec, shape):
    x, fixed, found = heavy(*shape), fixed_for(spec), InputCodes(spec)
    found.add(x, fixed)
    made = found.to_dict()
    integers, scale = quantize_activation(x, spec, fixed)
    units = (x / scale).numpy()
    if not spec.zero_point:  # else the zero points are not the caller's to know
        expected = np.histogram(units.clip(found.low, found.high), BINS, (found.low, found.high))[0]
        assert np.abs(np.array(made["counts"]) - expected).sum() <= 4  # values on a border, by rounding
        assert made["outside"] == pytest.approx(((units < found.ends[0]) | (units > found.ends[1])).mean(), abs=2 / x.numel())
    assert sum(made["counts"]) == x.numel()
    assert sum(made["shifts"]) == pytest.approx(1, abs=1e-5)
    if not spec.two_stage and spec.scale == "dynamic" and not spec.zero_point:
        assert made["entropy"] == pytest.approx(numpy_entropy(integers.numpy()), abs=1e-9)  # a level has one code
    assert made["step"] > 0
    plain = (x.abs().amax((1, 2), keepdim=True) / 7).numpy()
    assert made["plain"] == pytest.approx(numpy_entropy(np.round(x.numpy() / plain)), abs=0.02)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_codes_and_shifts_give_the_levels_back(spec, monkeypatch):
    """What is counted decodes to what the layer multiplies with, whatever the shift."""
    x, fixed = heavy(5, 3, 40, seed=1), fixed_for(spec)
    seen, found = [], InputCodes(spec)
    monkeypatch.setattr(room, "levels_to_codes", lambda levels, grid: seen.append((levels, grid)) or torch.zeros(1))
    zero = found._zero(x, fixed)
    integers, _ = quantize_activation(x, spec, fixed)
    found._counted(integers + zero, x * quantize_activation(x, spec, fixed)[1].reciprocal() + zero)
    levels, grid = seen[0]
    assert set(levels.unique().tolist()) <= {float(level) for level in grid.levels}
    shifted = (integers + zero).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(levels.numpy() != 0, shifted / levels.numpy(), 1)
    assert set(np.unique(factor)) <= {*range(1, spec.max_multiple + 1)} | {2.0**shift for shift in range(spec.max_shift + 1)}
    assert ((levels.numpy() == 0) == (shifted == 0)).all()
    assert shifted.min() >= (0 if spec.zero_point else -largest_multiplier(spec) * grid.top - 1)


def test_entropy():
    for counts, bits in (([4], 0), ([], 0), ([0, 0], 0), ([1, 1], 1), ([5] * 16, 4), ([1, 0, 3], 0.811278124459)):
        assert entropy(torch.tensor(counts, dtype=torch.int64)) == pytest.approx(bits, abs=1e-9)


def test_values_beyond_a_calibrated_grid_are_counted_and_shown_at_its_ends():
    found = InputCodes(ActivationSpec("int4", scale="static"))
    x = torch.tensor([0.0, 0.0, 1.0, 70.0, -90.0, 7.4]).view(1, 1, 6)
    found.add(x, FixedScale(torch.tensor(1.0), torch.tensor(0)))
    made = found.to_dict()
    assert made["outside"] == pytest.approx(2 / 6)
    assert (made["counts"][0], made["counts"][-1]) == (1, 1)
    assert (made["low"], made["high"]) == (-8.5 - 15 / 4, 7.5 + 15 / 4)


def test_large_inputs_are_looked_at_in_part_and_broken_ones_not():
    found = InputCodes(ActivationSpec("int4"))
    found.add(heavy(1000, 1, 1024), None)
    assert 0.5 * VALUES < sum(found.bins.tolist()) <= VALUES
    broken = InputCodes(ActivationSpec("int4"))
    broken.add(torch.tensor([[[1.0, math.nan]]]), None)
    broken.add(torch.empty(0, 1, 4), None)
    assert broken.to_dict() is None


def test_rows_at_different_timesteps_keep_their_own_scale():
    found, x = InputCodes(ActivationSpec("int4", scale="timestep")), torch.ones(2000, 1, 256)
    found.add(x, FixedScale(torch.arange(1, 2001).float(), torch.zeros(2000)))
    every = -(-x.numel() // VALUES)
    assert found.steps[0][0] == 1
    assert found.codes[1] == 256  # the first row alone is one step high
    assert found.codes.sum() == 256 * len(range(0, 2000, every))


RECIPES = ["quartz-w4a4", "int4-w4a4", "nvfp4-w4a4", "nf4-w4a16", "int8-w8a8", "quartz-unsigned-w4a4"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_watched_while_its_layers_are_compared(pipe, recipe):
    chosen, student = get_recipe(recipe), copy.deepcopy(pipe.unet)
    simulated = chosen.simulated_only() is not None
    result = hb.quantize(student, recipe, simulate=simulated)
    states = float_states(pipe, trajectories=2, steps=2, seed=0)
    plain = layer_sqnr(pipe.unet, student, states.calls)
    with watched_inputs(student) as seen:
        assert layer_sqnr(pipe.unet, student, states.calls) == plain
    assert not any(layer._forward_pre_hooks for layer in student.modules())
    inputs, weights = {name: codes.to_dict() for name, codes in seen.items()}, weight_codes(find_denoiser(pipe), student)
    for layer in result.layers:
        activation = layer.spec.activation if layer.spec else None
        small = activation is not None and get_grid(activation.grid).bits == 4
        assert (inputs.get(layer.name) is not None) == small
        assert (layer.name in weights) == (layer.spec is not None and get_grid(layer.spec.weight.grid).bits == 4)
        if layer.name in weights:
            matrix = dict(pipe.unet.named_modules())[layer.name].weight.detach().movedim(1, -1).flatten(1).float()
            codes = quantize_weight(matrix, weight_scale(matrix, layer.spec.weight), layer.spec.weight).codes()
            assert weights[layer.name]["entropy"] == pytest.approx(numpy_entropy(codes.numpy()), abs=1e-9)
            scale = matrix.abs().amax(1, keepdim=True) / 7
            assert weights[layer.name]["plain"] == pytest.approx(numpy_entropy(np.round((matrix / scale).numpy())), abs=0.05)
    if recipe == "int4-w4a4":
        assert all(one["entropy"] == pytest.approx(one["plain"], abs=0.05) for one in (*inputs.values(), *weights.values()))


def test_shifts_use_more_of_the_codes_where_few_values_are_large():
    """QuaRTZ's figure 4."""
    found = InputCodes(get_recipe("quartz-w4a4").inner.activation)
    found.add(heavy(64, 1, 256), None)
    made = found.to_dict()
    assert made["entropy"] > made["plain"] + 0.5
    assert sum(share > 0.01 for share in made["shifts"]) >= 4


def test_healed_weights_count_with_all_their_sets(pipe):
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    student = copy.deepcopy(float_model)
    hb.quantize(student, Recipe("plain", LayerSpec(WeightSpec("int4"))), simulate=True)
    layer = student[1]  # the first and the last have 8 bits
    assert isinstance(layer, FakeQuantLinear)
    layer.set_weights(torch.stack([layer.weight.detach(), 0.1 * layer.weight.detach()]), torch.tensor([0]))
    codes = torch.cat([layer.quantized_weight(chosen).codes() for chosen in (0, 1)])
    assert weight_codes(float_model, student)["1"]["entropy"] == pytest.approx(numpy_entropy(codes.numpy()), abs=1e-9)
