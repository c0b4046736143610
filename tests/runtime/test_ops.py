"""The reference backend computes whole numbers exactly: bit for bit what int64 loops give, however torch is set up."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.formats import GRIDS
from halfbyte.layers import FAKE_QUANT, input_to_rows, matrix_shape
from halfbyte.quantizers import quantize_activation
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime import ops
from halfbyte.runtime.ops import FLOAT32_EXACT, integer_product
from halfbyte.runtime.weights import pack_layer

pytestmark = pytest.mark.usefixtures("reference_backend")

LAYERS = {  # kind, arguments, options, shape of the input
    "linear": (nn.Linear, (37, 5), {}, (3, 37)),
    "linear 3d": (nn.Linear, (8, 3), {}, (2, 3, 8)),
    "conv1d": (nn.Conv1d, (6, 4, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 6, 9)),
    "conv1d replicate": (nn.Conv1d, (2, 4, 3), {"padding": 2, "padding_mode": "replicate"}, (2, 2, 6)),
    "conv2d": (nn.Conv2d, (8, 6, 3), {"padding": 1}, (2, 8, 6, 5)),
    "conv2d many images": (nn.Conv2d, (8, 6, 3), {"padding": 1}, (16, 8, 12, 12)),  # from 16 on NNPACK would take it
    "conv2d 1x1": (nn.Conv2d, (9, 4, 1), {}, (2, 9, 3, 3)),
    "conv2d dilated": (nn.Conv2d, (3, 4, (2, 3)), {"dilation": (1, 2), "stride": (2, 1)}, (2, 3, 7, 8)),
    "conv2d depthwise": (nn.Conv2d, (6, 12, 3), {"groups": 6, "padding": (0, 2)}, (1, 6, 5, 4)),
    "conv2d same": (nn.Conv2d, (2, 3, (3, 5)), {"padding": "same", "dilation": (1, 2)}, (2, 2, 6, 9)),
    "conv2d circular": (nn.Conv2d, (2, 3, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 2, 5, 5)),
    "conv2d reflect": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 2, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "groups": 2, "output_padding": 1}, (2, 4, 5)),
    "transposed2d": (
        nn.ConvTranspose2d,
        (4, 6, (3, 2)),
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "dilation": (1, 2), "groups": 2},
        (2, 4, 3, 4),
    ),
}
NUMPY_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def make(name):
    kind, args, options, shape = LAYERS[name]
    torch.manual_seed(0)
    return kind(*args, **options), shape


def padding_of(layer):
    """(before, after) of every axis."""
    if layer.padding == "same":
        totals = [dilation * (taps - 1) for dilation, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(padding, padding) for padding in layer.padding]


def slow_product(layer, x, matrix):
    """The operation in int64, tap by tap; a row of `matrix` is (taps..., channels of the group)."""
    if isinstance(layer, nn.Linear):
        return x @ matrix.T
    groups, taps, steps = layer.groups, layer.kernel_size, layer.stride
    weight = matrix.reshape(groups, len(matrix) // groups, *taps, -1)
    if not layer.transposed:
        x = np.pad(x, [(0, 0), (0, 0), *padding_of(layer)], mode=NUMPY_MODES[layer.padding_mode])
    x = x.reshape(len(x), groups, -1, *x.shape[2:])
    spans = [dilation * (k - 1) for dilation, k in zip(layer.dilation, taps, strict=True)]
    if layer.transposed:
        size = [(n - 1) * step + span + 1 for n, step, span in zip(x.shape[3:], steps, spans, strict=True)]
        size = [n + more for n, more in zip(size, layer.output_padding, strict=True)]
        places = x.shape[3:]
    else:
        size = places = [(n - span - 1) // step + 1 for n, step, span in zip(x.shape[3:], steps, spans, strict=True)]
    y = np.zeros((len(x), groups, weight.shape[1], *size), dtype=np.int64)
    for tap in np.ndindex(*taps):
        starts = [t * dilation for t, dilation in zip(tap, layer.dilation, strict=True)]
        reach = tuple(slice(a, a + (n - 1) * step + 1, step) for a, n, step in zip(starts, places, steps, strict=True))
        kernel = weight[(slice(None), slice(None), *tap)]
        if layer.transposed:
            y[(..., *reach)] += np.einsum("ngi...,goi->ngo...", x, kernel)
        else:
            y += np.einsum("ngi...,goi->ngo...", x[(..., *reach)], kernel)
    y = y.reshape(len(y), -1, *size)
    if layer.transposed:
        y = y[(..., *(slice(p, n - p) for p, n in zip(layer.padding, size, strict=True)))]
    return y


@contextmanager
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def loose_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 products": loose_products,
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "two threads": two_threads,
    "deterministic": lambda: torch.backends.mkldnn.flags(enabled=True, deterministic=True),
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_integer_product_is_exact(name, setting):
    layer, shape = make(name)
    generator = np.random.default_rng(0)
    with SETTINGS[setting]():
        for largest in (7, 127, 255):
            x = generator.integers(-largest, largest + 1, shape)
            matrix = generator.integers(-128, 128, matrix_shape(layer))
            found = integer_product(layer, torch.tensor(x).float(), torch.tensor(matrix).float(), largest)
            assert np.array_equal(found.numpy(), slow_product(layer, x, matrix))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_sums_too_large_for_float32_are_taken_in_float64(kind):
    """33 million and odd: float32 has only even numbers there."""
    channels = {"linear": 2049, "conv2d": 228, "transposed2d": 228}[kind]
    layer = {
        "linear": lambda: nn.Linear(channels, 2),
        "conv2d": lambda: nn.Conv2d(channels, 2, 3),
        "transposed2d": lambda: nn.ConvTranspose2d(channels, 2, 3),
    }[kind]()
    x = np.full((2, channels, *(() if kind == "linear" else (3, 3))), 127)
    x[0, 0] -= 2
    matrix = np.full(matrix_shape(layer), 127)
    matrix[0, 0] -= 3
    found = integer_product(layer, torch.tensor(x).float(), torch.tensor(matrix).float(), 127)
    expected = slow_product(layer, x, matrix)
    assert found.dtype == torch.float64
    assert expected.max() > FLOAT32_EXACT
    assert not np.array_equal(expected.astype(np.float32), expected), "float32 could not hold it"
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("largest", "dtype"), [(8191, torch.float32), (8192, torch.float64)])
def test_float32_is_used_up_to_its_limit(largest, dtype):
    layer, matrix = nn.Linear(16, 1), torch.full((1, 16), 128.0)
    assert (128 * 16 * largest < FLOAT32_EXACT) == (dtype == torch.float32)
    found = integer_product(layer, torch.full((1, 16), float(largest)), matrix, largest)
    assert (found.dtype, found.item()) == (dtype, 128 * 16 * largest)


def activation_specs():
    for name, grid in ((name, grid) for name, grid in GRIDS.items() if not grid.simulated_only):
        plain = ActivationSpec(name, zero_point=not grid.signed)
        yield from (plain, plain.replace(peak=8), plain.replace(peak=11), plain.replace(peak=127))
        if grid.largest_shift:
            shifted = plain.replace(max_shift=grid.largest_shift)
            yield from (shifted, shifted.replace(peak=105), shifted.replace(peak=127), shifted.replace(subgroup=1, peak=61))


@pytest.mark.parametrize("spec", [*activation_specs()], ids=lambda spec: f"{spec.describe()}_{spec.peak}")
def test_the_bound_on_inputs_holds(spec, monkeypatch):
    """Rounding may go above the peak (105 to 112), to -8 of int4, or to -zero: the bound that picks float32 covers it."""
    seen = []
    monkeypatch.setattr(ops, "integer_product", lambda *given: seen.append(given) or integer_product(*given))
    layer = pack_layer(FAKE_QUANT[nn.Linear].from_float(nn.Linear(64, 2), LayerSpec(WeightSpec("int8"), spec)))
    ramp = torch.linspace(-1, 1, 64)
    rows = [ramp, ramp.abs(), -ramp.abs(), ramp * 0, torch.cat([torch.ones(1), -torch.ones(63)]), ramp + 0.6, -torch.ones(64)]
    layer(torch.stack(rows))
    ((_, integers, _, largest),) = seen
    assert integers.abs().max() <= largest <= 255


@pytest.mark.parametrize("name", LAYERS)
def test_the_whole_layer_in_float64(name):
    """scale_x * scale_w * sum + bias, from the int64 sum: nothing else happens to a value."""
    layer, shape = make(name)
    x = torch.randn(shape)
    for spec in (INT8, LayerSpec(WeightSpec("e2m1", max_shift=3), ActivationSpec("ue1m3", max_shift=4, zero_point=True))):
        packed = pack_layer(FAKE_QUANT[type(layer)].from_float(layer, spec))
        integers, scale = quantize_activation(input_to_rows(layer, x), spec.activation)
        whole = integers.view(shape) if isinstance(layer, nn.Linear) else integers.transpose(1, 2).reshape(shape)
        total = slow_product(layer, whole.long().numpy(), packed.levels().long().numpy())
        axes = total.ndim - 2
        columns, rows = (-1,) if isinstance(layer, nn.Linear) else (1, -1, *[1] * axes), (-1, *[1] * (axes + 1))
        rows = (*shape[:-1], 1) if isinstance(layer, nn.Linear) else rows
        scales = scale.double().reshape(rows).numpy() * packed.weight_scale.double().reshape(columns).numpy()
        expected = total * scales + layer.bias.detach().double().reshape(columns).numpy()
        with torch.no_grad():
            found = packed(x).double().numpy()
        assert np.abs(found - expected).max() <= 4e-7 * (np.abs(total * scales).max() + np.abs(expected).max())
