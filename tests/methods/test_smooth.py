"""Smoothing changes nothing in float, and lowers the error of quantized layers whose inputs have outlier channels."""

import copy

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, ModelError, NonFiniteError, RecipeError
from halfbyte.layers import FakeQuantLinear, weight_to_matrix
from halfbyte.methods.smooth import fold_into_norm, scale_inputs, smooth_factors, weight_absmax
from halfbyte.presets import PRESETS
from halfbyte.quantizers import quantize_activation, quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec

LAYERS = {
    "linear": lambda: nn.Linear(12, 5),
    "linear, no bias": lambda: nn.Linear(12, 5, bias=False),
    "conv1d": lambda: nn.Conv1d(12, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 6, 3, padding=1, stride=2),
    "conv2d, groups": lambda: nn.Conv2d(12, 8, (1, 3), groups=4),
    "depthwise": lambda: nn.Conv2d(12, 24, 3, groups=12),
    "transposed 1d": lambda: nn.ConvTranspose1d(12, 6, 4, stride=2),
    "transposed 2d, groups": lambda: nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def factors_of(channels: int) -> Tensor:
    """Positive factors far from 1."""
    return torch.exp(torch.randn(channels))


def input_of(layer: nn.Module) -> Tensor:
    spatial = len(getattr(layer, "kernel_size", ()))
    return torch.randn(2, 12, *(6,) * spatial)


def on_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """A vector of channels in the shape that multiplies the layer's input."""
    return values.view(-1, *(1,) * len(getattr(layer, "kernel_size", ())))


def with_outliers(tokens: int, channels: int) -> Tensor:
    x = torch.randn(tokens, channels)
    x[:, :: channels // 4] *= 30
    return x


def test_factors_follow_the_formula():
    inputs, weights = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([0.5, 0.25, 1.0])
    expected = inputs**0.7 / weights**0.3
    expected /= expected.prod() ** (1 / 3)
    torch.testing.assert_close(smooth_factors(inputs, weights, 0.7), expected)


@pytest.mark.parametrize("strength", [0, 0.25, 0.5, 1.0])
def test_geometric_mean_is_one(strength):
    factors = smooth_factors(torch.rand(300) + 1e-3, torch.rand(300) + 1e-3, strength)
    assert factors.dtype == torch.float32
    assert factors.double().log().mean().abs() < 1e-6


def test_full_strength_levels_the_inputs_and_none_the_weights():
    inputs, weights = torch.rand(50) + 0.01, torch.rand(50) + 0.01
    levelled = inputs / smooth_factors(inputs, weights, 1.0)
    torch.testing.assert_close(levelled, levelled[:1].expand(50))
    levelled = weights * smooth_factors(inputs, weights, 0.0)
    torch.testing.assert_close(levelled, levelled[:1].expand(50))


def test_dead_channels_keep_one():
    inputs = torch.tensor([0.0, 1.0, 8.0, 2.0, 1e-30])
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    factors = smooth_factors(inputs, weights, 0.5)
    assert factors[[0, 1, 4]].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(factors[2] * factors[3], torch.tensor(1.0))
    assert factors[2] / factors[3] == pytest.approx((8 / 1) ** 0.5 / (2 / 0.5) ** 0.5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_factors_of_extreme_channels_stay_finite(strength):
    extreme = torch.tensor([3e38, 1e-38, 1.0, 0.0])
    factors = smooth_factors(extreme, extreme.flip(0), strength)
    assert factors.isfinite().all()
    assert (factors > 0).all()
    assert smooth_factors(torch.zeros(4), torch.zeros(4), strength).tolist() == [1.0] * 4
    assert smooth_factors(torch.empty(0), torch.empty(0), strength).shape == (0,)


def test_wrong_maxima_are_refused():
    good = torch.ones(4)
    with pytest.raises(RecipeError, match=r"0 to 1, got 1\.5"):
        smooth_factors(good, good, 1.5)
    with pytest.raises(CalibrationError, match=r"got \(4,\) and \(3,\); were the statistics taken at another layer"):
        smooth_factors(good, torch.ones(3), 0.5)
    with pytest.raises(NonFiniteError, match="the weight maxima for smoothing hold 2 NaN or infinite values"):
        smooth_factors(good, torch.tensor([1.0, torch.nan, torch.inf, 1.0]), 0.5)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_weight_maxima_of_every_kind(make):
    layer = make()
    groups = getattr(layer, "groups", 1)
    rows = weight_to_matrix(layer, layer.weight.detach()).unflatten(0, (groups, -1))  # (g, O/g, taps * C/g), channels last
    expected = rows.unflatten(2, (-1, 12 // groups)).abs().amax((1, 2)).flatten()
    assert torch.equal(weight_absmax([layer]), expected)


def test_weight_maxima_of_layers_that_share_an_input():
    layers = [nn.Linear(8, 3), nn.Linear(8, 7), nn.Linear(8, 5)]
    expected = torch.cat([layer.weight.detach() for layer in layers]).abs().amax(0)
    assert torch.equal(weight_absmax(layers), expected)
    with pytest.raises(ModelError, match=r"equally many channels, got \[8, 9\]"):
        weight_absmax([nn.Linear(8, 3), nn.Linear(9, 3)])
    with pytest.raises(ModelError, match="no layers"):
        weight_absmax([])


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_scaled_inputs_leave_the_output_as_it_was(make):
    layer = make()
    x, factors = input_of(layer), factors_of(12)
    expected = layer(x)
    input_scale = scale_inputs(layer, factors)
    torch.testing.assert_close(layer(x * on_channels(layer, input_scale)), expected)
    assert not torch.allclose(layer(x), expected)


def test_channels_last_weights_are_scaled_too():
    layer = nn.Conv2d(12, 6, 3).to(memory_format=torch.channels_last)
    plain, factors = copy.deepcopy(layer.weight.detach()), factors_of(12)
    scale_inputs(layer, factors)
    torch.testing.assert_close(layer.weight.detach(), plain * factors[:, None, None])


class RmsNorm2d(nn.GroupNorm):
    """A norm by another name, with a subclass in between."""


NORMS = {
    "LayerNorm, linears": (lambda: nn.LayerNorm(12), lambda: [nn.Linear(12, 5), nn.Linear(12, 7)], (4, 9, 12)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(12, bias=False), lambda: [nn.Linear(12, 5)], (4, 12)),
    "RMSNorm": (lambda: nn.RMSNorm(12), lambda: [nn.Linear(12, 5)], (4, 9, 12)),
    "GroupNorm, convolution": (lambda: nn.GroupNorm(3, 12), lambda: [nn.Conv2d(12, 5, 3, padding=1)], (2, 12, 6, 6)),
    "subclass": (lambda: RmsNorm2d(3, 12), lambda: [nn.Conv2d(12, 8, 3, groups=2)], (2, 12, 6, 6)),
}


def shaken(norm: nn.Module) -> nn.Module:
    """The norm with a gain and a bias that are not 1 and 0."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize(("make_norm", "make_layers", "shape"), NORMS.values(), ids=NORMS)
def test_folding_leaves_the_output_as_it_was(make_norm, make_layers, shape):
    norm, layers, x, factors = shaken(make_norm()), make_layers(), torch.randn(shape), factors_of(12)
    before, expected = norm(x), [layer(norm(x)) for layer in layers]
    fold_into_norm(norm, layers, factors)
    shape_of_channels = (-1, 1, 1) if norm(x).ndim == 4 else (-1,)
    torch.testing.assert_close(norm(x) * factors.view(shape_of_channels), before)
    for layer, output in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(norm(x)), output)


def test_a_weight_used_twice_is_scaled_once():
    norm, first, second = nn.LayerNorm(12), nn.Linear(12, 5), nn.Linear(12, 5)
    second.weight = first.weight
    x = torch.randn(3, 12)
    expected = first(norm(x))
    fold_into_norm(norm, [first, second, first], factors_of(12))
    torch.testing.assert_close(first(norm(x)), expected)


def test_folding_across_silu_would_be_wrong():
    """Why residual blocks of a UNet (GroupNorm, SiLU, convolution) are left to input_scale."""
    norm, conv, x = nn.GroupNorm(3, 12), nn.Conv2d(12, 5, 3), torch.randn(2, 12, 6, 6)
    expected = conv(nn.functional.silu(norm(x)))
    fold_into_norm(norm, [conv], factors_of(12))
    assert not torch.allclose(conv(nn.functional.silu(norm(x))), expected, atol=1e-2)


SPEC = LayerSpec(WeightSpec("int4"), ActivationSpec("int8"))
WRONG_FOLDS = {
    "no gain": (lambda: nn.LayerNorm(12, elementwise_affine=False), lambda: nn.Linear(12, 5), "no gain and bias.*use input_scale"),
    "not a norm": (lambda: nn.Linear(12, 12), lambda: nn.Linear(12, 5), "Linear has no gain"),
    "batch statistics": (lambda: nn.BatchNorm2d(12), lambda: nn.Conv2d(12, 5, 3), "BatchNorm2d has no gain"),
    "another size": (lambda: nn.LayerNorm(10), lambda: nn.Linear(12, 5), r"gain of \(10,\), but there are \(12,\) factors"),
    "two axes": (lambda: nn.LayerNorm((3, 12)), lambda: nn.Linear(12, 5), r"gain of \(3, 12\)"),
    "other channels": (lambda: nn.LayerNorm(12), lambda: nn.Linear(10, 5), r"Linear reads 10 channels, but there are \(12,\)"),
    "quantized": (
        lambda: nn.LayerNorm(12),
        lambda: FakeQuantLinear.from_float(nn.Linear(12, 5), SPEC),
        "FakeQuantLinear has its weight scales already",
    ),
}


@pytest.mark.parametrize(("make_norm", "make_layer", "sentence"), WRONG_FOLDS.values(), ids=WRONG_FOLDS)
def test_folds_that_cannot_be_are_refused_and_change_nothing(make_norm, make_layer, sentence):
    norm, good, layer = make_norm(), nn.Linear(12, 5), make_layer()
    before = [tensor.clone() for module in (norm, good, layer) for tensor in module.state_dict().values()]
    with pytest.raises(ModelError, match=sentence):
        fold_into_norm(norm, [good, layer], factors_of(12))
    after = [tensor for module in (norm, good, layer) for tensor in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["int8-w8a8", "quartz-w4a4", "quartz-w4a8", "int4-w4a4", "quartz-paper-w4a4"])
def test_outlier_channels_cost_less_when_smoothed(name):
    layer, x = nn.Linear(128, 64), with_outliers(100, 128)
    expected = layer(x).detach()
    spec = PRESETS[name].inner

    def error(inputs: Tensor) -> float:
        matrix = layer.weight.detach()
        weight = quantize_weight(matrix, weight_scale(matrix, spec.weight), spec.weight).dequantize()
        integers, scale = quantize_activation(inputs[:, None], spec.activation)
        return float(((integers * scale)[:, 0] @ weight.T + layer.bias.detach() - expected).square().mean())

    plain = error(x)
    input_scale = scale_inputs(layer, smooth_factors(x.abs().amax(0), weight_absmax([layer]), 0.5))
    assert error(x * input_scale) < 0.9 * plain
