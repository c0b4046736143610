"""Packed layers hold the codes of their trainable twins and give the same results; what they cannot do, they refuse."""

import copy

import pytest
import torch
from torch import nn

from halfbyte.errors import CorruptError
from halfbyte.formats import GRIDS
from halfbyte.layers import FAKE_QUANT, KINDS
from halfbyte.packing import pack_nibbles
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime.layers import PACKED, Packed, install, packed_shapes
from halfbyte.runtime.weights import pack_layer

pytestmark = pytest.mark.usefixtures("each_backend")

LAYERS = {  # kind, arguments, options, shapes of its inputs; odd sizes, so that nibbles and subgroups have tails
    "linear": (nn.Linear, (37, 5), {}, [(3, 37), (2, 3, 37), (2, 1, 2, 37), (37,), (0, 37), (2, 0, 37)]),
    "linear aligned": (nn.Linear, (64, 6), {"bias": False}, [(4, 64), (1, 64)]),
    "linear tiny": (nn.Linear, (1, 1), {}, [(2, 1), (1,)]),
    "linear wide": (nn.Linear, (2500, 3), {}, [(2, 2500)]),  # float64 is needed with 8-bit weights
    "conv1d": (nn.Conv1d, (6, 4, 3), {"stride": 2, "padding": 1, "groups": 2}, [(2, 6, 9), (6, 9), (0, 6, 9)]),
    "conv1d same": (nn.Conv1d, (3, 5, 3), {"padding": "same", "dilation": 2, "bias": False}, [(2, 3, 7)]),
    "conv2d": (nn.Conv2d, (5, 6, 3), {"padding": 1}, [(2, 5, 4, 6), (5, 4, 6), (0, 5, 4, 6), (1, 5, 1, 1)]),
    "conv2d strided": (nn.Conv2d, (3, 4, (3, 2)), {"stride": (2, 1), "dilation": (1, 2)}, [(2, 3, 7, 5)]),
    "conv2d 1x1": (nn.Conv2d, (1, 1, 1), {}, [(2, 1, 3, 3), (1, 2, 2)]),
    "conv2d depthwise": (nn.Conv2d, (6, 12, 3), {"groups": 6, "bias": False}, [(2, 6, 4, 4)]),
    "conv2d same": (nn.Conv2d, (2, 3, (3, 5)), {"padding": "same"}, [(2, 2, 6, 5), (2, 6, 5)]),
    "conv2d circular": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, [(2, 2, 5, 5)]),
    "conv2d reflect": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, [(2, 2, 5, 5), (2, 5, 5)]),
    "conv2d wide": (nn.Conv2d, (150, 2, 3), {}, [(1, 150, 4, 4)]),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "groups": 2, "output_padding": 1}, [(2, 4, 5), (4, 5)]),
    "transposed2d": (
        nn.ConvTranspose2d,
        (4, 6, (3, 2)),
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "dilation": (1, 2), "groups": 2},
        [(2, 4, 3, 4), (4, 3, 4), (0, 4, 3, 4)],
    ),
}
PACKABLE = {name: grid for name, grid in GRIDS.items() if not grid.simulated_only}
SIGNED = [name for name, grid in PACKABLE.items() if grid.signed]


def specs():
    """Every weight grid with and without multipliers, beside every activation grid with and without shifts."""
    weights = [WeightSpec(name, max_shift=shift, scale="absmax") for name in SIGNED for shift in {0, GRIDS[name].largest_shift}]
    weights += [WeightSpec("lzs4", max_shift=4, subgroup=7), WeightSpec("int8")]
    weights += [WeightSpec("e2m1", max_multiple=10), WeightSpec("lzs4", max_multiple=16, subgroup=7)]
    activations = [None]
    for name, grid in PACKABLE.items():
        activations.append(ActivationSpec(name, zero_point=not grid.signed))
        if grid.largest_shift:
            activations.append(activations[-1].replace(max_shift=grid.largest_shift, subgroup=16 if grid.signed else 7))
    activations.append(ActivationSpec("lzs4", max_shift=4, peak=127, rounding="truncate"))
    return [LayerSpec(weights[i % len(weights)], activation) for i, activation in enumerate(activations)]


SPEC = LayerSpec(WeightSpec("lzs4", max_shift=4), ActivationSpec("e2m1", max_shift=3))
every_layer = pytest.mark.parametrize("name", LAYERS)
every_spec = pytest.mark.parametrize("spec", specs(), ids=LayerSpec.describe)


def make(name, seed=0):
    kind, args, options, shapes = LAYERS[name]
    torch.manual_seed(seed)
    return kind(*args, **options).requires_grad_(False), [torch.randn(shape) for shape in shapes]


def twins(layer, spec=SPEC):
    fake = FAKE_QUANT[type(layer)].from_float(layer, spec)
    return fake, pack_layer(fake)


def agree(found, expected, tolerance=1e-5):
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_specs_cover_every_grid():
    assert {spec.weight.grid for spec in specs()} == set(SIGNED)
    assert {spec.activation.grid for spec in specs() if spec.activation} == set(PACKABLE)


@every_layer
@every_spec
def test_a_packed_layer_is_its_trainable_twin(name, spec):
    layer, inputs = make(name)
    fake, packed = twins(layer, spec)
    quantized = fake.quantized_weight()
    assert torch.equal(packed.levels(), quantized.levels)
    assert torch.equal(packed.weight_scale, quantized.scale)
    stored = {key: (tuple(value.shape), value.dtype) for key, value in packed.named_buffers()}
    assert stored == packed_shapes(layer, spec)
    for x in inputs:
        y, expected = packed(x), fake(x)
        assert y.shape == layer(x).shape
        assert y.numel() == 0 or agree(y, expected)


@every_layer
def test_an_input_scale_is_packed_with_its_layer(name):
    layer, inputs = make(name)
    fake, plain = twins(layer)
    channels = inputs[0].shape[-1] if isinstance(layer, nn.Linear) else layer.in_channels
    fake.input_scale = torch.linspace(0.5, 2, channels)
    packed = pack_layer(fake)
    stored = {key: (tuple(value.shape), value.dtype) for key, value in packed.named_buffers()}
    assert stored == packed_shapes(layer, SPEC, smoothed=True)
    for x in inputs:
        if x.numel():
            assert agree(packed(x), fake(x))
            assert channels == 1 or not torch.equal(packed(x), plain(x))


@every_layer
def test_half_precision_inputs_are_rounded_once_at_the_end(name):
    layer, inputs = make(name)
    for spec in (SPEC, INT8):
        packed = twins(layer, spec)[1]
        for x in inputs:
            for dtype in (torch.bfloat16, torch.float16):
                assert torch.equal(packed(x.to(dtype)), packed(x.to(dtype).float()).to(dtype))
    packed = twins(layer.bfloat16(), LayerSpec(WeightSpec("int8")))[1]
    for x in inputs:
        y, expected = packed(x.bfloat16()), layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert y.numel() == 0 or agree(y.float(), expected.float(), 0.05)


def layouts(x):
    """The same numbers in other places of memory."""
    wide = torch.zeros(*x.shape[:-1], 3 * x.shape[-1])
    wide[..., 1::3] = x
    yield wide[..., 1::3]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.cat([x * 9, x], dim=0)[len(x) :]
    if x.ndim == 4:
        yield x.to(memory_format=torch.channels_last)
    if x.ndim > 2:
        yield x.transpose(1, 2).contiguous().transpose(1, 2)


@every_layer
def test_the_layout_of_an_input_changes_nothing(name):
    layer, inputs = make(name)
    for spec in (SPEC, LayerSpec(WeightSpec("e2m1"), ActivationSpec("ue2m2", zero_point=True)), LayerSpec(WeightSpec("int4"))):
        packed = twins(layer, spec)[1]
        for x in inputs:
            if x.ndim > 1 and x.numel():
                expected = packed(x)
                close = 1e-6 if spec.activation is None else 0  # whole numbers are exact in any order
                assert all(agree(packed(view), expected, close) for view in layouts(x))


def test_an_expanded_input():
    packed = twins(make("linear")[0])[1]
    row = torch.randn(1, 37)
    assert torch.equal(packed(row.expand(4, 37)), packed(row).expand(4, 5))
    image_layer = twins(make("conv2d")[0])[1]
    image = torch.randn(1, 5, 4, 6)
    assert torch.equal(image_layer(image.expand(3, -1, -1, -1)), image_layer(image).expand(3, -1, -1, -1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", [SPEC, INT8, LayerSpec(WeightSpec("int4"), ActivationSpec("uint8", zero_point=True))], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d circular", "transposed1d", "transposed2d"])
def test_a_bad_value_spoils_its_own_row_or_image_alone(name, spec, bad):
    layer, (x, *_) = make(name)
    fake, packed = twins(layer, spec)
    expected = packed(x)
    x[1].view(-1)[2] = bad
    y = packed(x)
    assert y[1].isnan().all()
    kept = [i for i in range(len(x)) if i != 1]
    assert torch.equal(y[kept], expected[kept])
    spoilt = fake(x).isnan()  # a transposed convolution may leave outputs that no input reaches
    assert torch.equal(spoilt, y.isnan()) or ("transposed" in name and spoilt[1].any() and not spoilt[kept].any())


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed2d"])
def test_extreme_inputs_stay_finite(name):
    """Zeros, subnormals, and numbers near the ends of float32."""
    layer, (x, *_) = make(name)
    packed = twins(layer)[1]
    silence = packed(torch.zeros_like(x))
    assert torch.equal(packed(torch.full_like(x, 1e-42)), silence)
    assert agree(silence, layer(torch.zeros_like(x)))
    for factor in (1e-30, 1e30):
        loud = packed(x * factor)
        assert loud.isfinite().all()
    assert torch.equal(packed(-x * 0), silence)


MEMORY = [("lzs4", 4, 16), ("lzs4", 4, 32), ("e2m1", 3, 16), ("int4", 0, 16), ("e3m0", 0, 16)]


@pytest.mark.parametrize(("grid", "max_shift", "subgroup"), MEMORY)
@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 32), nn.Linear(1152, 8), nn.Conv2d(64, 8, 3), nn.ConvTranspose2d(16, 8, 2)], ids=str
)
def test_memory(layer, grid, max_shift, subgroup):
    packed = twins(layer, LayerSpec(WeightSpec(grid, max_shift, subgroup)))[1]
    stored = sum(buffer.nbytes for buffer in packed.buffers())
    assert stored <= 0.30 * 2 * layer.weight.numel()
    parameters = {name for name, _ in packed.named_parameters()}
    assert parameters == {"bias"}, "no float weight is kept"
    assert not any(isinstance(value, torch.Tensor) for value in vars(packed).values())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
@pytest.mark.parametrize("spec", [SPEC, INT8], ids=LayerSpec.describe)
def test_casts_leave_codes_and_scales_alone(spec, cast):
    layer, (x, *_) = make("linear")
    packed = twins(layer, spec)[1]
    packed.input_scale = torch.linspace(0.5, 2, 37)
    before = {name: buffer.clone() for name, buffer in packed.named_buffers()}
    expected = packed(x)
    getattr(packed, cast)(*{"to": [torch.float16]}.get(cast, []))
    after = dict(packed.named_buffers())
    assert set(after) == set(before) >= {"weight_codes", "weight_scale", "input_scale"}
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert packed.bias.dtype == packed.weight.dtype != torch.float32
    assert agree(packed(x), expected, 0.01)
    assert packed(x).dtype == x.dtype


@every_layer
def test_copies_and_state_dicts_hold_everything(name):
    layer, (x, *_) = make(name)
    packed = twins(layer)[1]
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), packed(x))
    assert twin.weight_codes is not packed.weight_codes
    state = packed.state_dict()
    assert set(state) == {"weight_codes", "weight_scale", "weight_multiplier", *(["bias"] if layer.bias is not None else [])}
    other = PACKED[type(layer)].empty(make(name, seed=1)[0], SPEC)
    other.load_state_dict(state)
    assert torch.equal(other(x), packed(x))


def test_state_of_another_shape_or_kind_is_refused():
    packed = twins(nn.Linear(16, 4))[1]
    with pytest.raises(RuntimeError, match="size mismatch for weight_codes"):
        packed.load_state_dict(twins(nn.Linear(32, 4))[1].state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict(nn.Linear(16, 4).state_dict())
    packed.weight_codes = packed.weight_codes[:, :-1]
    with pytest.raises(CorruptError, match="16 packed codes need uint8 rows of 8 bytes"):
        packed(torch.randn(2, 16))


def test_the_bytes_by_hand():
    """Two rows of int8-like scale 1: codes are two's complement nibbles, shifts one nibble a subgroup."""
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 7.0, -8.0, 3.0]])
    fake = FAKE_QUANT[nn.Linear].from_float(layer, LayerSpec(WeightSpec("int4")), torch.ones(1, 1))
    assert pack_layer(fake).weight_codes.tolist() == [[0xE1, 0x87, 0x03]]
    layer.weight.data = torch.tensor([[1.0, -2.0, 28.0, -16.0, 96.0]])
    spec = LayerSpec(WeightSpec("lzs4", max_shift=4, subgroup=2))
    packed = pack_layer(FAKE_QUANT[nn.Linear].from_float(layer, spec, torch.ones(1, 1)))
    assert packed.weight_codes.tolist() == [[0xA1, 0xC7, 0x06]]
    assert torch.equal(packed.weight_multiplier, pack_nibbles(torch.tensor([[0, 2, 4]], dtype=torch.uint8)))
    assert packed.levels().tolist() == layer.weight.data.tolist()


def test_every_kind_has_a_packed_layer():
    assert tuple(PACKED) == KINDS == tuple(dict.fromkeys(row[0] for row in LAYERS.values()))
    assert all(issubclass(packed, (Packed, kind)) and issubclass(packed, kind) for kind, packed in PACKED.items())


def test_empty_layers_are_installed_where_a_checkpoint_says():
    shared = nn.Linear(16, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4)), "c": nn.Conv2d(2, 2, 3)})
    install(model, {"a": SPEC, "c": INT8}, smoothed=["a"])
    assert model["a"] is model["b"][0]
    assert model["a"].input_scale.shape == (16,)
    assert (model["c"].spec, model["c"].input_scale) == (INT8, None)
    assert type(model["b"][1]) is nn.Linear
    for name in ("none", "b", "b.7", ""):
        with pytest.raises(CorruptError, match=f"quantized layer '{name}'; this ModuleDict has no such layer"):
            install(model, {name: SPEC})
