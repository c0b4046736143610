"""Recipes applied to modules: what compensation and smoothing buy, and what is said of layers they cannot help."""

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call, collect
from halfbyte.conversion import edges_of, pack, packed_layers, sampled_layers, simulate, stored_bytes
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.methods.smooth import scale_inputs
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

INT4 = LayerSpec(WeightSpec("int4"), ActivationSpec("int8"))
PLAIN = Recipe("plain", INT4, edge=INT4)


def correlated(*shape):
    """Inputs whose channels follow each other, as real activations do."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x + 2 * x.roll(1, dims=1) + x.mean(1, keepdim=True) * 4


LAYERS = {
    "linear": (lambda: nn.Linear(48, 32), (256, 48)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (8, 16, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=2), (8, 16, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, padding=1), (16, 16, 20)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 3), (8, 16, 9, 9)),
}


def quantized(make, recipe, x):
    """(output error of the simulated layer, report of it), calibrated on x."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    with torch.no_grad():
        exact = model(x)
        statistics = None
        if recipe.needs_calibration:
            hessians = ["0"] if not isinstance(model[0], nn.ConvTranspose2d) and recipe.edge.weight.rounding != "nearest" else []
            statistics = collect(model, [Call((x,), {})], ["0"], hessians)
        result = simulate(model, recipe, statistics)
        simulated = model(x)
        packed = pack(model)(x)
        torch.testing.assert_close(packed, simulated, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    return (packed - exact).norm().item(), result.layers[0]


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
@pytest.mark.parametrize("name", LAYERS)
def test_gptq_and_adaround_lower_the_output_error_where_they_can_and_say_where_not(name, rounding):
    make, shape = LAYERS[name]
    nearest, _ = quantized(make, PLAIN, correlated(*shape))
    better, report = quantized(
        make, PLAIN.replace(edge=INT4.replace(weight=WeightSpec("int4", rounding=rounding))), correlated(*shape)
    )
    if name == "transposed":
        assert better == nearest
        assert "rounded to nearest, as there is no Hessian" in report.reason
    else:
        assert better < 0.85 * nearest
        assert ("AdaRound" in report.reason) == (rounding == "adaround")


SEARCHED = PRESETS["msfp-w4a4"]
JUDGED = {
    "smoothed": (PLAIN.replace(smooth="search"), "not smoothed, as the output"),
    "searched": (SEARCHED.replace(search=SEARCHED.search.replace(objective="output")), "chosen by the error of its input"),
}


@pytest.mark.parametrize(("recipe", "note"), JUDGED.values(), ids=JUDGED)
def test_choices_by_the_output_need_rows_and_say_which_layers_have_none(recipe, note):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 4, 1))
    calls = [Call((torch.randn(2, 4, 6, 6),), {})]
    assert sampled_layers(model, recipe) == ["0", "1", "3"]
    with pytest.raises(CalibrationError, match="by the error of its output; its statistics need `rows`"):
        simulate(copy.deepcopy(model), recipe, collect(model, calls, "0123"))
    result = simulate(model, recipe, collect(model, calls, "0123", rows=sampled_layers(model, recipe)))
    assert [note in layer.reason for layer in result.layers] == [False, False, True, False]


@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "transposed"])
def test_smoothing_helps_inputs_with_an_outlier_channel(name):
    """Real outlier channels meet small weights: it is the other channels that a coarse scale loses."""
    plain, shape = LAYERS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 50
    factors = torch.ones(shape[1])
    factors[3] = 1 / 50

    def make():
        layer = plain()
        scale_inputs(layer, factors)
        return layer

    coarse = LayerSpec(WeightSpec("int8", scale="absmax"), ActivationSpec("int4"))
    recipe = Recipe("coarse", coarse, edge=coarse)
    rough, _ = quantized(make, recipe, x)
    smooth, _ = quantized(make, recipe.smoothed(0.5), x)
    assert smooth < 0.6 * rough


def test_edges_come_from_the_table_or_from_the_order(build):
    target, source = edges_of(build("UNet2DModel"))
    assert target.is_edge("conv_in")
    assert "table of architectures" in source
    target, source = edges_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)))
    assert [target.is_edge(name) for name in "0123"] == [True, False, False, True]
    assert "order of definition" in source


def test_layers_after_silu_take_their_own_activation_and_kept_ones_stay(build):
    recipe = PRESETS["quartz-unsigned-w4a4"].replace(keep=(r"mid_block\.attentions",))
    layers = {layer.name: layer for layer in simulate(build("UNet2DModel"), recipe).layers}
    assert layers["mid_block.resnets.0.conv1"].spec.activation.zero_point
    assert not layers["up_blocks.0.attentions.0.to_q"].spec.activation.zero_point
    assert layers["mid_block.attentions.0.to_q"].spec is None
    assert "the recipe keeps" in layers["mid_block.attentions.0.to_q"].reason


def test_statistics_are_asked_for_by_layer():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="'0'"):
        simulate(model, PLAIN.smoothed(0.5))
    assert type(model[0]) is nn.Linear


def test_already_quantized_models_are_refused_and_bytes_are_counted():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    simulate(model, PLAIN)
    with pytest.raises(ModelError, match="quantized already"):
        simulate(model, PLAIN)
    stored, plain = stored_bytes(pack(model))
    assert (stored, plain) == (32 * 32 + 32 * 4 + 8 * 16 + 8 * 4, 2 * (64 * 32 + 32 * 8))
    assert list(packed_layers(model)) == ["0", "1"]


@pytest.mark.usefixtures("cpu_backend")
def test_the_table_says_what_the_engine_does_not_run():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 4, 1))
    result = hb.quantize(model, "quartz-w4a4")
    notes = ["runs in the reference backend: the C++ engine has no transposed" in layer.reason for layer in result.layers]
    assert notes == [False, True, False]
    assert "reference backend" in result.table()
