"""The C++ engine computes what the reference backend computes, bit for bit, on every grid and on awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfbyte.errors import PackedError
from halfbyte.formats import GRIDS
from halfbyte.layers import FAKE_QUANT
from halfbyte.presets import PRESETS
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime import cpu, engine
from halfbyte.runtime.layers import PACKED
from halfbyte.runtime.ops import quantized_forward
from halfbyte.runtime.tiled import Tiled
from halfbyte.runtime.weights import pack_layer

pytestmark = [
    pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}"),
    pytest.mark.usefixtures("cpu_backend"),
]

PACKABLE = {name: grid for name, grid in GRIDS.items() if not grid.simulated_only}
WEIGHTS = [
    WeightSpec(name, max_shift=shift, scale="absmax")
    for name, grid in PACKABLE.items()
    if grid.signed
    for shift in sorted({0, grid.largest_shift})
]
WEIGHTS += [WeightSpec("lzs4", max_shift=4, subgroup=32), WeightSpec("e2m1", max_shift=2, subgroup=7)]
MULTIPLES = [("int4", 16, 16), ("lzs4", 16, 32), ("e1m2", 5, 24), ("e2m1", 10, 16), ("e2m1", 10, 7)]
WEIGHTS += [WeightSpec(name, subgroup=subgroup, scale="absmax", max_multiple=most) for name, most, subgroup in MULTIPLES]
ACTIVATIONS = [
    ActivationSpec(name, max_shift=shift, zero_point=not grid.signed)
    for name, grid in PACKABLE.items()
    for shift in sorted({0, grid.largest_shift})
]
ACTIVATIONS += [
    ActivationSpec("lzs4", max_shift=4, subgroup=32),
    ActivationSpec("ue1m3", max_shift=3, subgroup=5, zero_point=True),
    ActivationSpec("lzs4", max_shift=4, peak=127, rounding="truncate"),
    ActivationSpec("int8", peak=100),
]
LARGEST_MULTIPLES = {name: min(16, grid.reach // grid.top) for name, grid in PACKABLE.items() if grid.bits == 4}
MULTIPLES = [
    ActivationSpec(name, max_multiple=most, zero_point=not GRIDS[name].signed)
    for name, most in LARGEST_MULTIPLES.items()
    if most > 1
]
MULTIPLES += [
    ActivationSpec("lzs4", max_multiple=16, subgroup=8, peak=127),
    ActivationSpec("int4", max_multiple=3, subgroup=32, peak=127),
    ActivationSpec("e2m1", max_multiple=10, subgroup=5),
    ActivationSpec("e2m1", max_multiple=7, subgroup=8),
    ActivationSpec("ue1m3", max_multiple=16, subgroup=32, zero_point=True),
    ActivationSpec("ue1m3", max_multiple=2, peak=255, zero_point=True),
    ActivationSpec("ue2m2", max_multiple=5, subgroup=64, zero_point=True),
]
ACTIVATIONS += MULTIPLES
SPECS = [LayerSpec(WEIGHTS[i % len(WEIGHTS)], activation) for i, activation in enumerate(ACTIVATIONS)]
SPECS += [LayerSpec(weight, ACTIVATIONS[-1 - i % len(ACTIVATIONS)]) for i, weight in enumerate(WEIGHTS)]
QUARTZ = PRESETS["quartz-w4a4"].inner
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

LAYERS = {  # layer, shapes of its inputs: around the sizes of tiles, registers and cache lines
    "linear": (lambda: nn.Linear(130, 70), [(1, 130), (3, 130), (17, 130), (2, 5, 130), (130,), (0, 130)]),
    "linear narrow": (lambda: nn.Linear(300, 1), [(1, 300), (16, 300), (33, 300)]),
    "linear short": (lambda: nn.Linear(3, 65, bias=False), [(1, 3), (31, 3)]),
    "linear one": (lambda: nn.Linear(1, 1), [(1, 1), (5, 1)]),
    "linear round": (lambda: nn.Linear(128, 64), [(64, 128), (1, 128)]),
    "linear long": (lambda: nn.Linear(4100, 17), [(2, 4100), (33, 4100)]),
    "conv 3x3": (
        lambda: nn.Conv2d(20, 33, 3, padding=1),
        [(2, 20, 7, 5), (20, 4, 4), (1, 20, 1, 1), (0, 20, 3, 3), (1, 20, 17, 3)],
    ),
    "conv stride": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), [(1, 16, 8, 8), (2, 16, 9, 7)]),
    "conv 1x1": (lambda: nn.Conv2d(19, 20, 1), [(2, 19, 5, 3), (1, 19, 1, 1)]),
    "conv grouped": (lambda: nn.Conv2d(12, 18, (3, 2), groups=3, dilation=(1, 2), bias=False), [(2, 12, 6, 7)]),
    "conv depthwise": (lambda: nn.Conv2d(9, 9, 3, groups=9, padding=(0, 2)), [(2, 9, 5, 4)]),
    "conv even same": (lambda: nn.Conv2d(6, 8, (2, 4), padding="same"), [(2, 6, 5, 6)]),
    "conv valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), [(2, 6, 5, 6)]),
    "conv circular": (lambda: nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="circular"), [(2, 6, 5, 6), (6, 5, 6)]),
    "conv reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), [(2, 6, 5, 6)]),
    "conv replicate": (lambda: nn.Conv2d(6, 8, 4, padding="same", padding_mode="replicate"), [(2, 6, 5, 6)]),
    "conv1d": (lambda: nn.Conv1d(10, 12, 5, stride=3, padding=2, groups=2), [(2, 10, 11), (10, 6)]),
    "conv1d replicate": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), [(2, 4, 5)]),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def pack(layer, spec=QUARTZ):
    """A packed twin with random codes of its own, every one of them and every multiplier."""
    made = pack_layer(FAKE_QUANT[type(layer)].from_float(layer.requires_grad_(False), spec))
    assert isinstance(made.plan, cpu.Plan), made.plan
    return made


def make(name, spec=QUARTZ, seed=0):
    torch.manual_seed(seed)
    build, shapes = LAYERS[name]
    return pack(build(), spec), [torch.randn(shape) * 3 + 0.5 for shape in shapes]


def reference(packed, x):
    levels, fixed = packed.levels(packed.chosen_set()), packed.fixed_scale()
    return quantized_forward(packed, x, levels, packed.weight_scale, packed.bias, packed.spec.activation, fixed)


def test_the_engine_is_here():
    assert engine.describe().startswith("instructions ")


def test_the_specs_cover_every_grid():
    assert {spec.weight.grid for spec in SPECS} == {name for name, grid in PACKABLE.items() if grid.signed}
    assert {spec.activation.grid for spec in SPECS} == set(PACKABLE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of its own copy
@every_layer
@pytest.mark.parametrize("spec", SPECS, ids=LayerSpec.describe)
def test_bit_for_bit_the_reference(name, spec, monkeypatch):
    packed, inputs = make(name, spec)
    expected = {(i, dtype): reference(packed, x.to(dtype)) for i, x in enumerate(inputs) for dtype in FLOATS}
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        for (i, dtype), y in expected.items():
            found = packed(inputs[i].to(dtype))
            assert (found.dtype, found.shape) == (dtype, y.shape)
            assert torch.equal(found, y)


@every_layer
@pytest.mark.parametrize("scale", [0.01, 0.3, 40.0])
def test_calibrated_scales_equal_the_reference(name, scale):
    """Large and small against what comes: most values saturate, or most are zero."""
    for activation in ACTIVATIONS:
        packed, inputs = make(name, LayerSpec(WEIGHTS[3], activation.replace(scale="static", peak=0)))
        packed.activation_scale = torch.tensor([scale])
        if activation.zero_point:
            packed.activation_zero = torch.tensor([3], dtype=torch.uint8)
        x = inputs[0].clone()
        assert torch.equal(packed(x), reference(packed, x))
        x.view(-1)[-1] = torch.inf
        found, expected = packed(x), reference(packed, x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("activation", MULTIPLES, ids=ActivationSpec.describe)
def test_every_multiple_of_every_whole_number(activation, monkeypatch):
    """Scale 1: every magnitude under every largest one, ties among them."""
    packed, _ = make("linear round", LayerSpec(WEIGHTS[0], activation.replace(scale="static", peak=0)))
    packed.activation_scale = torch.tensor([1.0])
    if activation.zero_point:
        packed.activation_zero = torch.tensor([0], dtype=torch.uint8)
    largest = torch.arange(packed.spec.activation.top + 1)[:, None]
    x = torch.rand(len(largest), 128).mul(largest + 1).floor()
    x[:, ::16] = largest
    x = x if activation.zero_point else x * torch.randint(2, x.shape).mul(2).sub(1)
    expected = reference(packed, x)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv 3x3"])
def test_a_bias_of_any_dtype_wherever_it_lies(name, dtype):
    packed, (x, *_) = make(name)
    bias = torch.randn(2 * len(packed.bias)).to(dtype)
    for own in (bias[::2], bias[1 : len(packed.bias) + 1].clone()):
        packed.bias = nn.Parameter(own, requires_grad=False)
        assert torch.equal(packed(x), reference(packed, x))


@pytest.mark.parametrize("name", ["linear", "conv 3x3"])
def test_a_call_looks_no_tensor_up_as_an_attribute(name, monkeypatch):
    """Each would cost a microsecond, several of them as much as a small layer takes."""
    packed, (x, *_) = make(name)
    packed(x)
    looked_up, look = [], Tiled.__getattr__
    monkeypatch.setattr(Tiled, "__getattr__", lambda layer, asked: (looked_up.append(asked), look(layer, asked))[1])
    packed(x)
    assert looked_up == []
    assert packed.bias is not None
    assert looked_up == ["bias"]


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_a_calibrated_scale_that_is_none_is_refused(bad):
    packed, (x, *_) = make("linear", LayerSpec(WEIGHTS[0], ActivationSpec("int8", scale="static")))
    packed.activation_scale = torch.tensor([bad])
    with pytest.raises(PackedError, match="scale"):
        packed(x)


@pytest.mark.parametrize("count", [31, 130])
def test_sets_of_weights_equal_the_reference(count):
    layer = nn.Linear(count, 20).requires_grad_(False)
    plain = [pack(nn.Linear(count, 20)) for _ in range(3)]
    packed = PACKED[nn.Linear].empty(layer, QUARTZ.replace(weight=QUARTZ.weight.replace(sets=3)))
    packed.weight_codes = torch.stack([one.weight_codes for one in plain])
    packed.weight_multiplier = torch.stack([one.weight_multiplier for one in plain])
    packed.weight_scale = plain[0].weight_scale
    codes, x = packed.weight_codes.clone(), torch.randn(3, count)
    for chosen in (0, 2, 1, 1):
        packed.weight_choice = torch.tensor([chosen], dtype=torch.uint8)
        found = packed(x)
        assert packed._buffers["weight_codes"] is None
        assert torch.equal(found, reference(packed, x))
        assert torch.equal(packed.weight_codes, codes)


@st.composite
def problems(draw):
    spec = LayerSpec(draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from(ACTIVATIONS)))
    if draw(st.booleans()):
        inputs, outputs, rows = (draw(st.integers(1, most)) for most in (200, 100, 40))
        return nn.Linear(inputs, outputs), (rows, inputs), spec
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 24)) for _ in "io")
    kernel, stride, dilation, padding = (tuple(draw(st.integers(low, 3)) for _ in "hw") for low in (1, 1, 1, 0))
    sides = [draw(st.integers(d * (k - 1) + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups)
    return layer, (draw(st.integers(1, 3)), inputs, *sides), spec


@settings(deadline=None)  # a busy machine is no fault
@given(problem=problems(), seed=st.integers(0, 2**31), dtype=st.sampled_from(FLOATS), size=st.integers(-30, 30))
def test_any_shape_equals_the_reference(problem, seed, dtype, size):
    layer, shape, spec = problem
    generator = torch.Generator().manual_seed(seed)
    packed = pack(layer, spec)
    x = (torch.randn(shape, generator=generator) * 2.0 ** (size if dtype != torch.float16 else size / 3)).to(dtype)
    found, expected = packed(x), reference(packed, x)
    assert torch.equal(found, expected) or torch.equal(found.isfinite(), expected.isfinite())


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 3e38, torch.inf, -torch.inf, torch.nan]), min_size=5, max_size=5
        ),
        min_size=1,
        max_size=6,
    )
)
def test_special_values_come_out_as_in_the_reference(rows):
    torch.manual_seed(0)
    others = ActivationSpec("uint8", zero_point=True), ActivationSpec("e2m1", max_multiple=10, subgroup=8)
    for spec in (QUARTZ, INT8, *(LayerSpec(WeightSpec("int4"), one) for one in others)):
        packed, x = pack(nn.Linear(5, 3), spec), torch.tensor(rows)
        found, expected = packed(x), reference(packed, x)
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("weight", WEIGHTS, ids=WeightSpec.describe)
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 130])
def test_codes_come_back_bit_for_bit(weight, count):
    packed = pack(nn.Linear(count, 35), LayerSpec(weight, ActivationSpec("int8")))
    codes = torch.randint(0, 256, packed.weight_codes.shape, dtype=torch.uint8)
    if GRIDS[weight.grid].bits == 4 and count % 2:
        codes[:, -1] &= 15
    packed.weight_codes = codes.clone()
    if weight.has_multipliers:
        groups, most = -(-count // weight.subgroup), weight.max_multiple or weight.max_shift + 1
        nibbles = torch.randint(0, most, (35, 2 * packed.weight_multiplier.shape[1]), dtype=torch.uint8)
        nibbles[:, groups:] = 0
        packed.weight_multiplier = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        multiplier = packed.weight_multiplier.clone()
    x = torch.randn(2, count)
    found = packed(x)
    assert packed._buffers["weight_codes"] is None
    assert torch.equal(packed.weight_codes, codes)
    assert not weight.has_multipliers or torch.equal(packed.weight_multiplier, multiplier)
    assert torch.equal(found, reference(packed, x))


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (WeightSpec("lzs4", max_shift=3), "a shift of 10 is beyond the layer's largest, 3"),
        (WeightSpec("e2m1", max_multiple=10), "a multiple of 11 is beyond the layer's largest, 10"),
    ],
)
def test_a_multiplier_that_is_too_large_is_refused(weight, sentence):
    packed = pack(nn.Linear(32, 4), LayerSpec(weight, ActivationSpec("int8")))
    packed.weight_multiplier = torch.full_like(packed.weight_multiplier, 0xAA)
    with pytest.raises(PackedError, match=sentence):
        packed(torch.randn(1, 32))


@every_layer
def test_layouts_and_places_in_memory_change_nothing(name):
    packed, inputs = make(name)
    for x in inputs:
        expected = packed(x)
        crowd = torch.full((x.numel() + 3,), torch.nan)
        for offset in (1, 2, 3):
            crowd[offset : offset + x.numel()] = x.flatten()
            assert torch.equal(packed(crowd[offset : offset + x.numel()].view(x.shape)), expected)
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        assert torch.equal(packed(wide[..., ::2]), expected)
        if x.ndim > 1:
            turned = x.transpose(0, -1).contiguous().transpose(0, -1)
            assert torch.equal(packed(turned), expected)


def test_rows_may_lie_apart():
    packed, _ = make("linear")
    wide = torch.randn(6, 300)
    assert torch.equal(packed(wide[:, 40:170]), packed(wide[:, 40:170].contiguous()))
    assert torch.equal(packed(wide[:1, 40:170].expand(4, -1)), packed(wide[:1, 40:170].contiguous()).expand(4, -1))


def test_the_output_of_a_convolution_has_the_layout_of_its_input():
    packed, (x, *_) = make("conv 3x3")
    last = torch.channels_last
    assert packed(x).is_contiguous()
    assert packed(x.to(memory_format=last)).is_contiguous(memory_format=last)
    assert torch.equal(packed(x.to(memory_format=last)), packed(x))


def test_a_model_that_runs_channels_last_stays_so():
    """As in torch, what the weights were told decides where the input does not."""
    last = torch.channels_last
    layer = nn.Conv2d(4, 8, 3)
    x = torch.randn(1, 4, 6, 6)
    assert pack(nn.Conv2d(4, 8, 3).to(memory_format=last))(x).is_contiguous(memory_format=last)
    packed = pack(layer)
    for cast in (lambda m: m.to(memory_format=last), lambda m: m.bfloat16(), lambda m: m.to("cpu")):
        assert cast(packed)(x).is_contiguous(memory_format=last)
    assert packed.to(memory_format=torch.contiguous_format)(x).is_contiguous()


MISFITS = {
    "linear": (lambda: nn.Linear(8, 4), (2, 7), "takes 8 channels; got an input of shape (2, 7)"),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (1, 2, 5, 5), "takes 3 channels; got an input of shape (1, 2, 5, 5)"),
    "small image": (lambda: nn.Conv2d(3, 4, 3), (1, 3, 2, 5), "a kernel of 3x3 does not fit into an image of 2x5"),
    "scalar": (lambda: nn.Linear(8, 4), (), "takes 8 channels; got an input of shape ()"),
    "flat image": (lambda: nn.Conv2d(3, 4, 3), (5, 5), "got an input of shape (5, 5)"),
    "many axes": (lambda: nn.Conv2d(3, 4, 3), (1, 1, 3, 5, 5), "got an input of shape (1, 1, 3, 5, 5)"),
}


@pytest.mark.parametrize(("build", "shape", "words"), MISFITS.values(), ids=MISFITS)
def test_an_input_that_does_not_fit_is_refused(build, shape, words):
    with pytest.raises(PackedError) as caught:
        pack(build())(torch.randn(shape))
    assert words in str(caught.value)


LEFT_OUT = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 2), INT8, "the C++ engine has no transposed convolutions"),
    "float input": (lambda: nn.Linear(4, 4), LayerSpec(WeightSpec("int4")), "its input stays in float"),
    "very long": (lambda: nn.Linear(70000, 1), INT8, "its dot products are longer than 65536"),
}


@pytest.mark.parametrize(("build", "spec", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_the_engine_does_not_take_runs_in_the_reference_and_says_why(build, spec, reason):
    layer = build().requires_grad_(False)
    packed = pack_layer(FAKE_QUANT[type(layer)].from_float(layer, spec))
    assert packed.plan == reason
    x = torch.randn(1, 4, 3, 3) if isinstance(layer, nn.ConvTranspose2d) else torch.randn(2, layer.in_features)
    assert torch.equal(packed(x), reference(packed, x))
    assert packed._buffers["weight_tiles"] is None


def test_double_precision_runs_in_the_reference():
    packed, (x, *_) = make("linear")
    assert packed(x.double()).dtype == torch.float64
    assert torch.equal(packed(x.double()), reference(packed, x.double()))
