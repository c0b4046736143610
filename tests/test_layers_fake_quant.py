"""Trainable layers of every kind: weights as matrices, inputs as rows, values as the packed layers round, and gradients."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.layers import (
    FAKE_QUANT,
    KINDS,
    FakeQuant,
    apply_layer,
    input_to_rows,
    matrix_shape,
    matrix_to_weight,
    rows_to_input,
    weight_to_matrix,
)
from halfbyte.quantizers import quantize_activation
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec

LAYERS = {  # kind, arguments, shapes of its inputs
    "linear": (nn.Linear, (20, 6), {}, [(3, 20), (2, 3, 20), (20,)]),
    "linear 1x1": (nn.Linear, (1, 1), {"bias": False}, [(2, 1)]),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"padding": 1}, [(2, 4, 7), (4, 7)]),
    "conv1d grouped": (nn.Conv1d, (4, 6, 2), {"groups": 2, "stride": 2, "dilation": 2}, [(2, 4, 9)]),
    "conv2d": (nn.Conv2d, (3, 5, 3), {"padding": 1}, [(2, 3, 5, 4), (3, 5, 4)]),
    "conv2d oblong": (nn.Conv2d, (4, 6, (3, 2)), {"groups": 2, "stride": (2, 1), "padding": (1, 0), "bias": False}, [(2, 4, 6, 5)]),
    "conv2d dilated": (nn.Conv2d, (2, 4, (2, 3)), {"dilation": (2, 1), "padding": 1}, [(1, 2, 5, 5)]),
    "conv2d depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4}, [(2, 4, 4, 4)]),
    "conv2d 1x1": (nn.Conv2d, (5, 3, 1), {}, [(2, 5, 3, 3)]),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1, "groups": 2}, [(2, 4, 5), (4, 5)]),
    "transposed2d": (nn.ConvTranspose2d, (4, 3, 2), {"stride": 2}, [(2, 4, 3, 3), (4, 3, 3)]),
    "transposed2d oblong": (
        nn.ConvTranspose2d,
        (4, 6, (3, 2)),
        {"groups": 2, "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "dilation": (1, 2)},
        [(2, 4, 3, 4)],
    ),
}
SPEC = LayerSpec(WeightSpec("e2m1", max_shift=3), ActivationSpec("lzs4", max_shift=4))
SPECS = [SPEC, LayerSpec(WeightSpec("int4", group=16)), LayerSpec(WeightSpec("int8"), ActivationSpec("uint8", zero_point=True))]

every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, seed=0):
    kind, args, options, shapes = LAYERS[name]
    torch.manual_seed(seed)
    return kind(*args, **options), [torch.randn(shape) for shape in shapes]


def fake(layer, spec=SPEC, scale=None):
    return FAKE_QUANT[type(layer)].from_float(layer, spec, scale)


def slow_layer(layer, x, matrix, shape):
    """A zero-padded layer by its definition: loops over positions and taps, W[o] a row of (taps..., channels of the group)."""
    if isinstance(layer, nn.Linear):
        return np.einsum("...k,ok->...o", x, matrix)
    taps, groups = layer.kernel_size, layer.groups
    weight = matrix.reshape(groups, len(matrix) // groups, *taps, -1)
    inputs, y = x.reshape(len(x), groups, -1, *x.shape[2:]), np.zeros((len(x), groups, shape[1] // groups, *shape[2:]))
    small = shape[2:] if not layer.transposed else x.shape[2:]  # positions that the taps are spread from
    for place, tap in itertools.product(np.ndindex(*small), np.ndindex(*taps)):
        steps = zip(place, tap, layer.stride, layer.dilation, layer.padding, strict=True)
        far = tuple(p * stride + t * dilation - padding for p, t, stride, dilation, padding in steps)
        source, target = (place, far) if layer.transposed else (far, place)
        limits = y.shape[3:] if layer.transposed else x.shape[2:]
        if all(0 <= f < limit for f, limit in zip(far, limits, strict=True)):
            values, kernel = inputs[(..., *source)], weight[(slice(None), slice(None), *tap)]
            y[(..., *target)] += np.einsum("ngi,goi->ngo", values, kernel)
    return y.reshape(shape)


@every_layer
def test_a_weight_and_its_matrix(name):
    layer, _ = make(name)
    matrix = weight_to_matrix(layer, layer.weight.detach())
    assert matrix.shape == matrix_shape(layer)
    assert matrix.numel() == layer.weight.numel()
    assert torch.equal(matrix_to_weight(layer, matrix), layer.weight)
    other = torch.randn(matrix.shape)
    assert torch.equal(weight_to_matrix(layer, matrix_to_weight(layer, other)), other)


@every_layer
def test_matrix_rows_are_output_channels_and_columns_taps_then_channels(name):
    layer, (x, *_) = make(name)
    expected = apply_layer(layer, x.double(), layer.weight.double(), None).detach().numpy()
    matrix = weight_to_matrix(layer, layer.weight.detach()).double().numpy()
    found = slow_layer(layer, x.double().numpy(), matrix, expected.shape)
    assert np.allclose(found, expected, atol=1e-12)


@every_layer
def test_an_input_and_its_rows(name):
    layer, inputs = make(name)
    for x in inputs:
        rows = input_to_rows(layer, x)
        batched = x if isinstance(layer, nn.Linear) or x.ndim == layer.weight.ndim else x[None]
        channels_last = batched if isinstance(layer, nn.Linear) else batched.movedim(1, -1)
        expected = channels_last.reshape(-1, 1, x.shape[-1]) if isinstance(layer, nn.Linear) else channels_last.flatten(1, -2)
        assert torch.equal(rows, expected)
        assert torch.equal(rows_to_input(layer, rows, x.shape), x)
        assert torch.equal(rows_to_input(layer, rows.clone(memory_format=torch.contiguous_format), x.shape), x)


def rounded_input(layer, x, spec):
    """What the layer sees: every token, or every image, rounded on its own."""
    if spec is None:
        return x
    if isinstance(layer, nn.Linear):
        rows = [quantize_activation(token[None, None], spec) for token in x.reshape(-1, x.shape[-1])]
        return torch.stack([(integers * scale)[0, 0] for integers, scale in rows]).view(x.shape)
    images = x if x.ndim == layer.weight.ndim else x[None]
    rows = [quantize_activation(image.flatten(1).t()[None], spec) for image in images]
    return torch.stack([(integers * scale)[0].t().reshape(images.shape[1:]) for integers, scale in rows]).view(x.shape)


@every_layer
@pytest.mark.parametrize("spec", SPECS, ids=LayerSpec.describe)
def test_values_and_gradients(name, spec):
    """Forward is the float layer on rounded weight and input; backward treats the roundings as absent."""
    layer, inputs = make(name)
    quantized, plain = fake(layer, spec), copy.deepcopy(layer)
    plain.weight.data = matrix_to_weight(layer, quantized.quantized_weight().dequantize())
    for x in inputs:
        x = x.requires_grad_()
        seen = rounded_input(layer, x.detach(), spec.activation).requires_grad_()
        y, expected = quantized(x), plain(seen)
        assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
        direction = torch.randn(y.shape)
        for module in (quantized, plain):
            module.zero_grad()
        y.backward(direction)
        expected.backward(direction)
        pairs = [(x.grad, seen.grad), (quantized.weight.grad, plain.weight.grad)]
        if layer.bias is not None:
            pairs.append((quantized.bias.grad, plain.bias.grad))
        assert all(torch.allclose(found, wanted, rtol=1e-5, atol=1e-5) for found, wanted in pairs)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "transposed2d"])
def test_one_token_or_image_does_not_touch_another(name):
    layer, (x, *_) = make(name)
    quantized = fake(layer).eval()
    with torch.no_grad():
        before = quantized(x)
        louder = x.clone()
        louder[0] *= 1000
        assert torch.equal(quantized(louder)[1:], before[1:])
        louder[0] = torch.nan
        assert quantized(louder)[0].isnan().all()
        assert torch.equal(quantized(louder)[1:], before[1:])


@every_layer
def test_a_trainable_layer_is_still_its_kind_and_shares_its_parameters(name):
    layer, (x, *_) = make(name)
    layer.eval()
    quantized = fake(layer)
    assert isinstance(quantized, (FakeQuant, type(layer)))
    assert isinstance(quantized, type(layer))
    assert quantized.training is False
    assert quantized.weight is layer.weight
    assert quantized.bias is layer.bias
    assert {name for name, _ in quantized.named_parameters()} == {name for name, _ in layer.named_parameters()}
    assert set(quantized.state_dict()) == {*layer.state_dict(), "weight_scale"}
    assert SPEC.describe() in repr(quantized)
    assert quantized(x).shape == layer(x).shape
    assert "weight_scale" not in layer.state_dict()


def test_every_kind_has_a_trainable_layer():
    assert tuple(FAKE_QUANT) == KINDS
    assert {row[0] for row in LAYERS.values()} == set(KINDS)


def test_scales_are_kept_while_weights_train():
    torch.manual_seed(0)
    quantized = fake(nn.Linear(16, 4))
    scale, before = quantized.weight_scale.clone(), quantized.quantized_weight().levels
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.5)
    quantized(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    assert torch.equal(quantized.weight_scale, scale)
    assert not torch.equal(quantized.quantized_weight().levels, before)


def test_a_given_scale_is_used_as_it_is():
    layer = nn.Linear(16, 4)
    scale = torch.full((4, 1), 0.125)
    quantized = fake(layer, LayerSpec(WeightSpec("int8")), scale)
    assert torch.equal(quantized.weight_scale, scale)
    assert torch.equal(quantized.quantized_weight().dequantize(), (layer.weight.detach() * 8).round() / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_the_scales_in_float32(dtype):
    """A scale rounded to bfloat16 would be another number, and the codes other codes."""
    layer, (x, *_) = make("linear")
    layer = layer.to(dtype)
    expected = fake(copy.deepcopy(layer))
    quantized = fake(layer.float()).to(dtype)
    assert quantized.weight_scale.dtype == torch.float32
    assert torch.equal(quantized.weight_scale, expected.weight_scale)
    assert torch.equal(quantized.quantized_weight().levels, expected.quantized_weight().levels)
    assert quantized(x.to(dtype)).dtype == dtype
    assert torch.equal(quantized(x.to(dtype)), expected(x.to(dtype)))
    assert quantized.double().weight_scale.dtype == torch.float32


@every_layer
def test_an_input_scale_is_multiplied_onto_channels_before_rounding(name):
    layer, inputs = make(name)
    quantized, plain = fake(layer), fake(layer)
    for x in inputs:
        axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
        quantized.input_scale = torch.linspace(0.5, 2, x.shape[axis])
        scaled = torch.stack([part * factor for part, factor in zip(x.unbind(axis), quantized.input_scale, strict=True)], axis)
        assert torch.equal(quantized(x), plain(scaled))
    assert quantized.half().input_scale.dtype == torch.float32


def test_a_deepcopy_and_a_state_dict_hold_everything():
    layer, (x, *_) = make("conv2d")
    quantized = fake(layer)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(x), quantized(x))
    assert twin.weight is not quantized.weight
    other = fake(make("conv2d", seed=1)[0])
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))


def test_empty_batches_pass_through():
    for name in ("linear", "conv1d", "conv2d", "transposed2d"):
        layer, (x, *_) = make(name)
        assert fake(layer)(x[:0]).shape == layer(x[:0]).shape
