"""MSFP: the search against brute force and a second implementation of the float grids; models through it, to disk and back."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call, InputStatistics, collect
from halfbyte.conversion import packed_layers
from halfbyte.errors import CalibrationError, ModelError, RecipeError
from halfbyte.evaluate import sample_images
from halfbyte.formats import GRIDS, round_to_grid
from halfbyte.methods.msfp import FINALISTS, fixed_scale, input_candidates, one_sided, search_input, search_layer
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, GridSearch, LayerSpec, Recipe, WeightSpec
from halfbyte.targets import TARGETS

MSFP = PRESETS["msfp-w4a4"]
SIGNED, UNSIGNED = MSFP.search.signed_grids, MSFP.search.unsigned_grids


def gaussian(count=20_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def statistics_of(values, source=None):
    found = InputStatistics(source=source)
    found.update(values.view(1, 1, -1), None, torch.Generator().manual_seed(0))
    return found


def paper_grid(values, exponent, mantissa, maxval, signed):
    """Quantization to a float with a real-valued bias, as the papers write it (specs: section 2.2)."""
    bias = 2**exponent - math.log2(maxval) + math.log2(2 - 2.0**-mantissa) - 1
    clamped = values.double().clamp(-maxval if signed else 0.0, maxval)
    power = (clamped.abs().log2() + bias).floor().clamp(min=1)
    step = 2 ** (power - mantissa - bias)
    return step * (clamped / step).round()


@pytest.mark.parametrize("name", [name for name in (*SIGNED, *UNSIGNED, "e2m3", "ue3m3") if name != "e3m0"])
def test_our_tables_are_the_papers_floats(name):
    exponent, mantissa = (int(part) for part in name.removeprefix("u").removeprefix("e").split("m"))
    grid, values = GRIDS[name], gaussian() * 2
    for maxval in (0.7, 1.0, 3.3):
        scale = maxval / grid.top
        ours = round_to_grid((values / scale).float(), grid) * scale
        theirs = paper_grid(values, exponent, mantissa, maxval, grid.signed)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def least_error(values, names):
    low, high = values.min().item(), values.max().item()
    return min(float(input_candidates(values, GRIDS[name], low, high, 111).best(1).error[0]) for name in names)


def test_unsigned_grids_win_on_silu_outputs_by_the_published_ratio():
    values = F.silu(gaussian())
    signed, unsigned = least_error(values, ["e2m1"]), least_error(values, ["ue2m2"])
    assert signed == pytest.approx(6.1e-3, rel=0.1)
    assert unsigned == pytest.approx(2.1e-3, rel=0.1)
    assert 2.6 < signed / unsigned < 3.4
    assert unsigned == least_error(values, [*SIGNED, *UNSIGNED])  # and no other grid does better


def test_unsigned_grids_gain_little_on_gaussian_data():
    values = gaussian()
    assert least_error(values, UNSIGNED) > 0.85 * least_error(values, SIGNED)
    assert not one_sided(statistics_of(values), MSFP.search.skew)


@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "ue3m1"])
def test_the_search_is_brute_force(name):
    values, grid = F.silu(gaussian(500)), GRIDS[name]
    low, high = values.min().item(), values.max().item()
    found, errors = input_candidates(values, grid, low, high, 12), {}
    widest = (max(-low, high) if grid.signed else high - low) / grid.top
    for factor in torch.linspace(0.1, 1.2, 12).tolist():
        scale = widest * factor
        lowest = min(-low / scale, grid.top)
        for zero in {0} if grid.signed else {round(lowest * part / 7) for part in range(8)}:
            rounded = (round_to_grid(values / scale + zero, grid) - zero) * scale
            errors[(round(scale, 6), zero)] = (rounded - values).square().mean().item()
    assert min(errors.values()) == pytest.approx(found.error.min().item(), rel=1e-4)
    best = found.best(3)
    assert best.error.tolist() == sorted(found.error.tolist())[:3]
    assert errors[(round(best.scale[0].item(), 6), int(best.zero[0]))] == pytest.approx(best.error[0].item(), rel=1e-3)
    assert (found.zero <= grid.top).all()
    assert (found.zero >= 0).all()


@pytest.mark.parametrize(
    "values", [torch.zeros(50), torch.full((50,), 2.0), torch.full((50,), -3.0), torch.tensor([1e-30, -1e-30])]
)
def test_degenerate_inputs_get_a_usable_scale(values):
    found = search_input(statistics_of(values), [*SIGNED, *UNSIGNED], 20)
    assert all(one.scale.isfinite().all() and (one.scale > 0).all() and one.error.isfinite().all() for one in found)


def test_what_makes_an_input_one_sided():
    skewed = gaussian().abs() - 0.1
    assert one_sided(statistics_of(gaussian(), "SiLU"), 0) == "its input is a SiLU output"
    assert one_sided(statistics_of(skewed), 0.5).startswith("its input is skewed, -0.0998 to ")
    assert not one_sided(statistics_of(skewed), 0)
    assert not one_sided(statistics_of(-skewed), 0.5)


def test_the_error_of_the_output_can_decide():
    """Two channels of a SiLU output, of which the weights read only the small one: fine steps matter, the range does not."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 16, bias=False), F.silu(torch.randn(400, 8))
    x[:, :4] *= 20
    with torch.no_grad():
        layer.weight[:, :4] *= 1e-3
    found = collect(nn.Sequential(layer), [Call((x,), {})], ["0"], rows=["0"])["0"]
    errors = {}
    for objective in ("input", "output"):
        spec, choice = search_layer(MSFP.inner, layer.weight.detach(), found, MSFP.search.replace(objective=objective))
        grid, scale, zero = GRIDS[spec.activation.grid], choice.input_scale, choice.input_zero
        rounded = (round_to_grid(x / scale + zero, grid) - zero) * scale
        errors[objective] = (layer(rounded) - layer(x)).square().mean().item()
        assert set(choice.weight_errors) == set(MSFP.search.weight_grids)
    assert errors["output"] < 0.9 * errors["input"]
    assert all(len(one.error) == FINALISTS for one in search_input(found, SIGNED, 20, layer.weight.detach()))


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
def test_every_layer_is_accounted_for_with_its_grids(build, call, name):
    result = hb.quantize(build(name), MSFP, calibration=[call(name)])
    for layer in result.layers:
        if TARGETS[name].is_edge(layer.name):
            assert layer.choice is None
            assert layer.spec == MSFP.edge
            continue
        choice, spec = layer.choice, layer.spec
        assert set(choice.weight_errors) == set(MSFP.search.weight_grids)
        assert set(choice.input_errors) == {*SIGNED, *(UNSIGNED if choice.one_sided else ())}
        assert spec.weight.grid == min(choice.weight_errors, key=choice.weight_errors.get)
        assert spec.activation.grid == min(choice.input_errors, key=choice.input_errors.get)
        assert TARGETS[name].is_after_silu(layer.name) == ("output" in choice.one_sided)
        assert spec.activation.zero_point == (spec.activation.grid in UNSIGNED)


def test_healed_or_not_a_saved_model_samples_the_same_images(pipe, tmp_path):
    result = hb.quantize(pipe, "msfp-w4a4", calibration=4, steps=4)
    assert any(layer.activation_zero is not None for layer in packed_layers(result.model).values())
    images = sample_images(pipe, 2, 3)
    loaded = hb.load(hb.save(pipe, tmp_path / "out"))
    assert torch.equal(sample_images(loaded, 2, 3), images)
    for name, layer in packed_layers(loaded.unet).items():
        kept = pipe.unet.get_submodule(name)
        for key, tensor in kept.state_dict().items():
            assert torch.equal(layer.state_dict()[key], tensor), (name, key)
    cast = packed_layers(hb.load(tmp_path / "out", dtype=torch.bfloat16).unet).values()
    assert {layer.activation_scale.dtype for layer in cast if layer.activation_scale is not None} == {torch.float32}


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_the_offset_is_exact_in_padded_convolutions(padding_mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode=padding_mode))
    x = torch.randn(4, 8, 6, 6) * 2
    hb.quantize(
        model, MSFP.replace(edge=MSFP.inner.replace(activation=ActivationSpec("ue2m2", zero_point=True, scale="static"))), [x]
    )
    layer = model[1]
    scale, zero, grid = layer.activation_scale[0], layer.activation_zero[0], GRIDS["ue2m2"]
    assert zero > 0
    rounded = (round_to_grid(F.silu(x) / scale + zero, grid) - zero) * scale
    plain = nn.Conv2d(8, 8, 3, padding=1, padding_mode=padding_mode)
    plain.weight.data = (layer.levels() * layer.weight_scale).view(8, 3, 3, 8).permute(0, 3, 1, 2)
    plain.bias = layer.bias
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(rounded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("simulate", [False, True])
def test_wider_floats_are_simulated_and_close(build, call, simulate):
    if not simulate:
        with pytest.raises(ModelError, match="has no packed form; pass simulate=True"):
            hb.quantize(build("UNet2DModel"), "msfp-w6a6", calibration=[call("UNet2DModel")])
        return
    errors = {}
    for name in ("msfp-w4a4", "msfp-w6a6"):
        torch.manual_seed(0)
        model, arguments = build("UNet2DModel"), call("UNet2DModel")
        with torch.no_grad():
            exact = model(**arguments).sample
            hb.quantize(model, name, calibration=[arguments], simulate=True)
            errors[name] = (model(**arguments).sample - exact).norm() / exact.norm()
    assert errors["msfp-w6a6"] < 0.4 * errors["msfp-w4a4"]


def test_compensation_works_on_the_grids_that_were_found():
    torch.manual_seed(0)
    mix = torch.randn(24, 24)
    x = torch.randn(600, 24) @ mix
    made = {}
    for recipe in (MSFP, MSFP.compensated()):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
        with torch.no_grad():
            seen = model[0](x)
            exact = model[1](seen)
        hb.quantize(model, recipe.replace(edge=None), calibration=[x])
        weight = model[1].levels() * model[1].weight_scale
        made[recipe.name] = (F.linear(seen, weight, model[1].bias) - exact).square().mean().item(), model[1].spec.weight.grid
    assert made["msfp-w4a4+gptq"][1] == made["msfp-w4a4"][1]
    assert made["msfp-w4a4+gptq"][0] < 0.8 * made["msfp-w4a4"][0]


REFUSED = [
    (lambda: MSFP.smoothed(0.5), "smoothing changes inputs"),
    (lambda: MSFP.replace(inner=LayerSpec(WeightSpec("e2m1"), ActivationSpec("e2m1"))), "a grid search needs"),
    (lambda: MSFP.replace(inner=LayerSpec(WeightSpec("e2m1"))), "a grid search needs"),
    (lambda: MSFP.replace(after_silu=ActivationSpec("ue2m2", zero_point=True)), "a grid search needs"),
    (lambda: GridSearch(weight_grids=("ue2m2",)), "weight_grids needs signed grids"),
    (lambda: GridSearch(signed_grids=()), "signed_grids needs signed grids, at least one, got none"),
    (lambda: GridSearch(unsigned_grids=("e2m1",)), "unsigned_grids cannot hold 'e2m1'"),
    (lambda: GridSearch(points=1), "points must be at least 2"),
    (lambda: GridSearch(unsigned_grids=("nf9",)), "unknown grid 'nf9'"),
    (lambda: ActivationSpec("int8", scale="static", group=8), "static scales come from calibration"),
    (lambda: ActivationSpec("int8", scale="sometimes"), "must be one of 'dynamic', 'static', 'timestep'"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_impossible_searches_are_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_a_search_without_data_is_an_error(build):
    with pytest.raises(ModelError, match="needs calibration; pass calibration=16"):
        hb.quantize(build("UNet2DModel"), "msfp-w4a4")
    assert Recipe.from_dict(MSFP.to_dict()) == MSFP


def test_static_scales_without_a_search_have_least_error_too():
    spec = ActivationSpec("int4", scale="static")
    found = fixed_scale(spec, statistics_of(gaussian(4000)))
    assert found.scale.shape == found.zero.shape == (1,)
    scales = torch.linspace(0.05, 1.0, 400)
    errors = [(round_to_grid(gaussian(4000) / s, GRIDS["int4"]) * s - gaussian(4000)).square().mean().item() for s in scales]
    mine = (round_to_grid(gaussian(4000) / found.scale, GRIDS["int4"]) * found.scale - gaussian(4000)).square().mean().item()
    assert mine < min(errors) * 1.02


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_scales_of_8_bit_grids_hold_values_that_a_sample_misses(name):
    values = torch.cat([gaussian(200_000), torch.tensor([-30.0, 40.0])])
    statistics = statistics_of(values)
    assert statistics.reservoir.abs().max() < 30
    spec = ActivationSpec(name, scale="static", zero_point=name == "uint8")
    found = fixed_scale(spec, statistics)
    levels = values / found.scale + found.zero
    grid = GRIDS[name]
    assert levels.min() >= grid.bottom - 0.5
    assert levels.max() <= grid.top + 0.5
    assert torch.equal(found.scale, fixed_scale(spec, statistics_of(values.flip(0))).scale)  # nothing of it is chance


def test_scales_over_time_need_a_timestep(build):
    over_time = Recipe("t", LayerSpec(WeightSpec("int4"), ActivationSpec("int4", scale="timestep")), edge=None)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="different timesteps, or at none"):
        hb.quantize(model, over_time, calibration=[torch.ones(2, 4)])
    assert type(model[1]) is nn.Linear
