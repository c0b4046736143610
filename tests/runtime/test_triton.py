"""The GPU's kernels compute what the reference backend computes, bit for bit: on a GPU where there is one, else interpreted."""

import importlib.util
import os

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import HalfbyteError, PackedError
from halfbyte.formats import GRIDS
from halfbyte.layers import FAKE_QUANT
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime import backends, gpu
from halfbyte.runtime.ops import quantized_forward
from halfbyte.runtime.weights import pack_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (extra 'triton')")

PACKABLE = {name: grid for name, grid in GRIDS.items() if not grid.simulated_only}
WEIGHTS = [
    WeightSpec(name, max_shift=shift, scale="absmax")
    for name, grid in PACKABLE.items()
    if grid.signed
    for shift in sorted({0, grid.largest_shift})
]
WEIGHTS += [WeightSpec("lzs4", max_shift=4, subgroup=32, scale="absmax")]
WEIGHTS += [WeightSpec(name, scale="absmax", max_multiple=most) for name, most in (("int4", 16), ("lzs4", 16), ("e2m1", 10))]
ACTIVATIONS = [
    ActivationSpec(name, max_shift=shift, zero_point=not grid.signed)
    for name, grid in PACKABLE.items()
    for shift in sorted({0, grid.largest_shift})
]
ACTIVATIONS += [
    ActivationSpec("lzs4", max_shift=4, subgroup=32),
    ActivationSpec("ue1m3", max_shift=3, subgroup=4, zero_point=True),
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
    ActivationSpec("e2m1", max_multiple=10, subgroup=4),
    ActivationSpec("e2m1", max_multiple=7, subgroup=8),
    ActivationSpec("ue1m3", max_multiple=16, subgroup=32, zero_point=True),
    ActivationSpec("ue1m3", max_multiple=2, peak=255, zero_point=True),
    ActivationSpec("ue2m2", max_multiple=5, subgroup=64, zero_point=True),
]
ACTIVATIONS += MULTIPLES
SPECS = [LayerSpec(WEIGHTS[i % len(WEIGHTS)], activation) for i, activation in enumerate(ACTIVATIONS)]
SPECS += [LayerSpec(weight, ACTIVATIONS[-1 - i % len(ACTIVATIONS)]) for i, weight in enumerate(WEIGHTS)]
QUARTZ = PRESETS["quartz-w4a4"].inner
UNSIGNED = LayerSpec(WeightSpec("e2m1", scale="absmax"), ActivationSpec("ue3m1", zero_point=True))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

LAYERS = {  # layer, shapes of its inputs
    "linear": (lambda: nn.Linear(131, 70), [(1, 131), (2, 5, 131), (131,), (0, 131), (66, 131)]),
    "linear even": (lambda: nn.Linear(264, 40), [(5, 264), (66, 264)]),  # K a multiple of 8: four codes decoded at once
    "linear narrow": (lambda: nn.Linear(300, 1, bias=False), [(1, 300), (17, 300)]),
    "linear wide": (lambda: nn.Linear(4096, 2), [(4, 4096)]),
    "linear one": (lambda: nn.Linear(1, 1), [(1, 1), (65, 1)]),
    "conv 3x3": (lambda: nn.Conv2d(20, 33, 3, padding=1), [(2, 20, 4, 5), (20, 3, 3), (0, 20, 3, 3), (1, 20, 1, 1)]),
    "conv stride": (lambda: nn.Conv2d(16, 24, (3, 2), stride=2, padding=(1, 0), bias=False), [(2, 16, 5, 7)]),
    "conv 1x1": (lambda: nn.Conv2d(19, 20, 1), [(2, 19, 3, 3)]),
    "conv dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=(1, 2), padding="same"), [(1, 6, 4, 6)]),
    "conv reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), [(1, 6, 4, 4)]),
    "conv1d": (lambda: nn.Conv1d(10, 12, 5, stride=3, padding=2), [(2, 10, 11), (10, 6)]),
}


@pytest.fixture(scope="module", autouse=True)
def triton_backend():
    """Asked for by name; without a GPU the kernels are interpreted (conftest.py)."""
    before = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = "triton"
    backends.backend.cache_clear()
    yield
    os.environ.pop(backends.VARIABLE)
    os.environ.update({} if before is None else {backends.VARIABLE: before})
    backends.backend.cache_clear()


def make(name, spec=QUARTZ):
    torch.manual_seed(0)
    build, shapes = LAYERS[name]
    layer = build().requires_grad_(False)
    packed = pack_layer(FAKE_QUANT[type(layer)].from_float(layer, spec)).to(DEVICE)
    assert isinstance(packed.gpu_plan, gpu.Plan), packed.gpu_plan
    return packed, [(torch.randn(shape) * 3 + 0.5).to(DEVICE) for shape in shapes]


def reference(packed, x):
    levels, fixed = packed.levels(packed.chosen_set()), packed.fixed_scale()
    return quantized_forward(packed, x, levels, packed.weight_scale, packed.bias, packed.spec.activation, fixed)


def check(packed, x):
    found, expected = packed(x), reference(packed, x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if DEVICE == "cpu":  # the interpreter cuts bfloat16 off where a GPU rounds it
        torch.testing.assert_close(found, expected, rtol=2**-7 if x.dtype == torch.bfloat16 else 0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_backend_is_chosen():
    assert backends.backend().name == "triton"
    packed, inputs = make("linear")
    assert backends.engine_plan(packed, inputs[0]) is packed.gpu_plan
    assert {spec.activation.grid for spec in SPECS} == set(PACKABLE)
    assert {spec.weight.grid for spec in SPECS} == {name for name, grid in PACKABLE.items() if grid.signed}


@pytest.mark.parametrize("spec", SPECS, ids=LayerSpec.describe)
def test_every_grid_on_a_linear_layer(spec):
    for name in ("linear", "linear even", "linear one"):
        packed, inputs = make(name, spec)
        for x in inputs[:2]:
            check(packed, x)


@pytest.mark.parametrize(("gelu", "approximate"), [(1, "none"), (2, "tanh")])
def test_a_gelu_after_the_product(gelu, approximate):
    packed, inputs = make("linear even")
    codes, multipliers = packed.neutral()
    for x in inputs:
        for dtype in FLOATS:
            if dtype == torch.bfloat16 and DEVICE == "cpu":
                continue  # cut off by the interpreter, twice
            y = packed(x.to(dtype))
            arguments = x.to(dtype), codes, multipliers, packed.weight_scale, packed.bias, packed.gpu_plan.grids
            found = torch.ops.halfbyte.triton_linear(*arguments, gelu=gelu)
            torch.testing.assert_close(found, nn.functional.gelu(y, approximate=approximate), rtol=1e-3, atol=1e-5)


def test_codes_in_any_order_of_bits():
    """Codes that rounding never makes (-0, and -8 with multipliers) decode as in the reference."""
    multiples = WeightSpec("lzs4", max_multiple=16), WeightSpec("e2m1", max_multiple=10)
    for weight in (WeightSpec("lzs4", max_shift=4), WeightSpec("int4"), WeightSpec("lzs4", max_shift=4, subgroup=32), *multiples):
        packed, inputs = make("linear even", LayerSpec(weight.replace(scale="absmax"), ActivationSpec("int8")))
        draw = torch.Generator().manual_seed(1)
        packed.weight_codes = torch.randint(256, packed.weight_codes.shape, generator=draw).to(torch.uint8).to(DEVICE)
        for x in inputs:
            check(packed, x)


@pytest.mark.parametrize("steps", [{"max_shift": 4}, {"max_multiple": 16}], ids=str)
def test_a_zero_point_past_the_end_of_a_row_is_not_counted(steps):
    """In the last subgroup, which is shorter: the choice of its shift or multiple must not see it."""
    activation = ActivationSpec("ue1m3", zero_point=True, **steps)
    for name, rows in (("linear", 130), ("conv1d", 20)):
        packed, inputs = make(name, LayerSpec(QUARTZ.weight, activation))
        torch.manual_seed(1)
        check(packed, torch.randn(rows, *inputs[0].shape[1:], device=DEVICE))


def test_every_multiple_of_every_whole_number():
    """Scale 1: every magnitude under every largest one, ties among them."""
    for activation in MULTIPLES:
        packed, _ = make("linear wide", LayerSpec(WEIGHTS[0], activation.replace(scale="static", peak=0)))
        packed.activation_scale = torch.tensor([1.0], device=DEVICE)
        if activation.zero_point:
            packed.activation_zero = torch.tensor([0], dtype=torch.uint8, device=DEVICE)
        draw = torch.Generator().manual_seed(2)
        largest = torch.arange(256)[:, None]
        x = torch.rand(256, 64, generator=draw).mul(largest + 1).floor()
        x[:, ::16] = largest
        x = x if activation.zero_point else x * torch.randint(2, x.shape, generator=draw).mul(2).sub(1)
        check(packed, x.view(4, 4096).to(DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", SPECS, ids=LayerSpec.describe)
def test_every_grid_on_every_layer(name, spec):
    packed, inputs = make(name, spec)
    for x in inputs:
        check(packed, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", [QUARTZ, UNSIGNED], ids=LayerSpec.describe)
def test_every_layer(name, spec):
    packed, inputs = make(name, spec)
    for x in inputs:
        check(packed, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["linear", "conv 3x3"])
def test_every_float_type_and_order(name, dtype):
    packed, inputs = make(name)
    x = inputs[1 if name == "linear" else 0].to(dtype)
    check(packed, x)
    check(packed, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    if name == "conv 3x3":
        last = x.contiguous(memory_format=torch.channels_last)
        check(packed, last)
        assert packed(last).is_contiguous(memory_format=torch.channels_last)
        assert packed(x).is_contiguous()


@pytest.mark.parametrize("name", ["linear", "conv 3x3"])
@pytest.mark.parametrize("scale", [0.01, 0.3, 40.0])
def test_calibrated_scales(name, scale):
    plain = ActivationSpec("e2m1"), ActivationSpec("ue2m2", zero_point=True), ActivationSpec("lzs4", max_shift=4)
    for activation in (*plain, ActivationSpec("ue1m3", max_multiple=16, zero_point=True), ActivationSpec("e2m1", max_multiple=10)):
        packed, inputs = make(name, LayerSpec(WEIGHTS[3], activation.replace(scale="static")))
        packed.activation_scale = torch.tensor([scale], device=DEVICE)
        if activation.zero_point:
            packed.activation_zero = torch.tensor([5], dtype=torch.uint8, device=DEVICE)
        check(packed, inputs[0])


AWKWARD = {
    "zeros": lambda x: x * 0,
    "tiny": lambda x: x * 1e-39,
    "huge": lambda x: x.sign() * 3e38,
    "a NaN": lambda x: x.index_fill(-1, torch.tensor([2], device=x.device), float("nan")),
    "an infinity": lambda x: x.index_fill(-1, torch.tensor([2], device=x.device), float("inf")),
    "one side": lambda x: x.abs(),
    "halves": lambda x: (x * 2).round() / 2,
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("change", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("spec", [QUARTZ, UNSIGNED, SPECS[5], LayerSpec(WEIGHTS[0], MULTIPLES[-3])], ids=LayerSpec.describe)
def test_awkward_values(change, spec):
    for name in ("linear", "conv 3x3"):
        packed, inputs = make(name, spec)
        check(packed, change(inputs[1 if name == "linear" else 0]))


def test_only_the_row_with_a_nan_is_nan():
    packed, inputs = make("linear")
    x = inputs[1].clone()
    x[1, 2, 7] = torch.nan
    bad = packed(x).isnan()
    assert bad[1, 2].all()
    assert bad.sum() == bad.shape[-1]


def test_several_sets_of_weights():
    from halfbyte.runtime.layers import PACKED

    spec = LayerSpec(WeightSpec("lzs4", max_shift=4, sets=2), ActivationSpec("int8"))
    packed = PACKED[nn.Linear].empty(nn.Linear(40, 12), spec, timesteps=1)
    draw = torch.Generator().manual_seed(0)
    for name, top in (("weight_codes", 256), ("weight_multiplier", 4)):
        getattr(packed, name).copy_(torch.randint(top, getattr(packed, name).shape, generator=draw).to(torch.uint8))
    packed.weight_scale.fill_(0.1)
    packed.to(DEVICE)
    x = torch.randn(3, 40, device=DEVICE)
    for chosen in (0, 1):
        expected = quantized_forward(packed, x, packed.levels(chosen), packed.weight_scale, packed.bias, spec.activation)
        torch.testing.assert_close(gpu.forward(packed, packed.gpu_plan, x, chosen), expected, rtol=1e-6, atol=1e-5)


def test_what_the_kernels_do_not_take_is_said():
    kinds = {
        "no grouped": (nn.Conv2d(4, 4, 3, groups=2), QUARTZ),
        "no transposed": (nn.ConvTranspose2d(4, 4, 2), QUARTZ),
        "stays in float": (nn.Linear(4, 4), LayerSpec(WeightSpec("int4"), None)),
        "subgroups of 2, 4, 8 to 1024, not 7": (
            nn.Linear(14, 4),
            LayerSpec(WeightSpec("e2m1", 2, subgroup=7), ActivationSpec("int8")),
        ),
    }
    for reason, (layer, spec) in kinds.items():
        packed = pack_layer(FAKE_QUANT[type(layer)].from_float(layer.requires_grad_(False), spec)).to(DEVICE)
        assert reason in packed.gpu_plan
        x = torch.randn(2, *([4, 3, 3] if packed.weight.ndim == 4 else [packed.weight.shape[1]]), device=DEVICE)
        assert backends.engine_plan(packed, x) is None
        packed(x)


def test_inputs_that_do_not_fit_are_refused():
    packed, _ = make("linear")
    with pytest.raises(PackedError, match=r"takes 131 channels; got an input of shape \(2, 130\)"):
        packed(torch.zeros(2, 130, device=DEVICE))
    packed, _ = make("conv stride")
    with pytest.raises(PackedError, match="a kernel of 3x2 does not fit into an image of 0x1"):
        packed(torch.zeros(1, 16, 0, 1, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU to capture a CUDA graph on")
@pytest.mark.parametrize("name", ["linear", "linear even", "conv 3x3"])
def test_a_cuda_graph_gives_the_same_bits(name):
    packed, inputs = make(name)
    x = inputs[0]
    with torch.no_grad():
        expected = packed(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = packed(x)
    for _ in range(2):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="tiles are measured on a GPU only; there is none")
def test_the_tiles_change_no_bit(monkeypatch):
    from halfbyte.runtime import launches, tuning

    packed, _ = make("linear even")
    for rows in (1, 40, 300):
        x = torch.randn(rows, 264, device=DEVICE)
        expected = reference(packed, x)
        fitting = [tiles for tiles in (*tuning.LARGE, *tuning.SMALL) if tiles.shared <= tuning.card(x.device).shared]
        every = fitting if rows > 64 else [None] * len(tuning.few_tiles(rows))
        for index, tiles in enumerate(every):
            monkeypatch.setattr(launches, "choose", lambda k, c, d, run, t=tiles, i=index: c[i] if t is None else t)
            assert torch.equal(packed(x), expected)


def test_a_whole_denoiser_in_one_compiled_graph():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    unet = UNet2DModel(4, 1, 1, layers_per_block=1, norm_num_groups=8, add_attention=False, **blocks).eval().to(DEVICE)
    hb.quantize(unet, "quartz-w4a4")
    x, t = torch.randn(1, 1, 4, 4, device=DEVICE), torch.tensor([500], device=DEVICE)
    with torch.no_grad():
        eager = unet(x, t).sample
        compiled = torch.compile(unet, fullgraph=True, backend="eager" if DEVICE == "cpu" else "inductor")(x, t).sample
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_asking_for_what_is_not_there(monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda: "there is no GPU")
    backends.backend.cache_clear()
    with pytest.raises(HalfbyteError, match="HALFBYTE_BACKEND asks for the GPU engine, which cannot run: there is no GPU"):
        backends.backend()
    monkeypatch.delenv(backends.VARIABLE)
    backends.backend.cache_clear()
    assert backends.backend("cuda") == backends.Backend(
        "reference", "plain torch, exact integers, slow; the GPU engine cannot run: there is no GPU"
    )
    backends.backend.cache_clear()
