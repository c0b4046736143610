"""Convolutions that norm their input on the way: against norm, SiLU and convolution one after another, bit for bit."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from halfbyte import diffusers_blocks
from halfbyte.api import quantize
from halfbyte.errors import PackedError
from halfbyte.layers import FAKE_QUANT
from halfbyte.metrics import sqnr
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, LayerSpec
from halfbyte.runtime import engine
from halfbyte.runtime.pointwise import normed
from halfbyte.runtime.weights import pack_layer

pytestmark = [
    pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}"),
    pytest.mark.usefixtures("cpu_backend"),
]

QUARTZ = PRESETS["quartz-w4a4"].inner
SPECS = {
    "lzs4": QUARTZ,
    "int8": PRESETS["quartz-w4a8"].inner,
    "multiples": PRESETS["halfbyte-w4a4"].inner,
    "zero point": LayerSpec(QUARTZ.weight, ActivationSpec("uint8", zero_point=True)),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((9, 5, 7), (2, 40, 30), (1, 3, 3))  # images, height, width: an image a task, images in parts, next to nothing
OPTIONS = ({"padding": 1}, {"stride": 2, "padding": (0, 2), "groups": 2, "bias": False}, {"padding": "same", "dilation": 2})


def conv(spec=QUARTZ, channels=16, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 24, 3, **{"padding": 1, **options}).requires_grad_(False)
    return pack_layer(FAKE_QUANT[nn.Conv2d].from_float(layer, spec))


def norm_of(channels=16, groups=4, dtype=torch.float32):
    norm = nn.GroupNorm(groups, channels, eps=1e-4).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1)
    return norm.to(dtype)


def images(size, channels=16, dtype=torch.bfloat16):
    torch.manual_seed(1)
    count, height, width = size
    return torch.randn(count, channels, height, width).to(dtype).to(memory_format=torch.channels_last) * 3 + 1


def apart(layer, norm, x, shift=None):
    return layer(normed(x, norm.num_groups, norm.weight, norm.bias, norm.eps, True, shift))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bit_for_bit(spec, size, options, monkeypatch):
    layer = conv(SPECS[spec], **options)
    for dtype in FLOATS:
        x, norm = images(size, dtype=dtype), norm_of(dtype=dtype)
        for shift in (None, torch.randn(size[0], 16).to(dtype)):
            expected = apart(layer, norm, x, shift)
            for isa in engine.instruction_sets():
                monkeypatch.setenv("HALFBYTE_ISA", isa)
                assert torch.equal(layer.after_norm(norm, x, shift), expected)
            monkeypatch.delenv("HALFBYTE_ISA")


def test_threads_and_layouts_change_nothing():
    layer, norm, x = conv(), norm_of(), images((6, 9, 8))
    expected, kept = layer.after_norm(norm, x), torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(layer.after_norm(norm, x), expected)
    torch.set_num_threads(kept)
    planar = layer.after_norm(norm, x.contiguous())
    assert torch.equal(planar, expected)
    assert planar.is_contiguous()
    assert torch.equal(layer.after_norm(norm, images((6, 9, 16))[..., ::2]), apart(layer, norm, images((6, 9, 16))[..., ::2]))


def test_the_input_stays_and_a_nan_stays_in_its_image():
    layer, norm, x = conv(), norm_of(), images((5, 6, 6))
    x[3, 2, 1, 1] = torch.inf
    kept = x.clone()
    found = layer.after_norm(norm, x, torch.randn(5, 16))
    assert torch.equal(x, kept)
    assert found[3].isnan().all()
    assert not found[[0, 1, 2, 4]].isnan().any()


def test_a_norm_without_gains():
    layer, norm, x = conv(), nn.GroupNorm(4, 16, affine=False), images((4, 6, 6))
    assert torch.equal(layer.after_norm(norm, x), apart(layer, norm, x))


@pytest.mark.parametrize("why", ["circular", "smoothed", "double", "single", "reference"])
def test_what_the_engine_does_not_run_so(why):
    layer = conv(padding_mode="circular") if why == "circular" else conv()
    x = images((4, 6, 6), dtype=torch.float64 if why == "double" else torch.bfloat16)
    if why == "smoothed":
        layer.input_scale = torch.ones(16)
    if why == "reference":
        layer.plan = "the engine cannot run it"
    assert layer.after_norm(norm_of(dtype=x.dtype), x[0] if why == "single" else x) is None


def test_refusals():
    layer, x = conv(), images((4, 6, 6))
    with pytest.raises(PackedError, match="16 channels takes as many gains"):
        layer.after_norm(norm_of(channels=32), x)
    with pytest.raises(PackedError, match=r"one of each image, \(4, 16\); got \(16,\)"):
        layer.after_norm(norm_of(), x, torch.ones(16))
    with pytest.raises(PackedError, match="share the channels evenly"):
        layer.after_norm(nn.GroupNorm(5, 20, affine=False), x)


def test_the_operator_is_registered_as_torch_wants():
    layer, x = conv(), images((2, 6, 6))
    weights = layer.tiles(), layer.weight_scale, layer.bias, layer.plan.format
    norm = 4, torch.ones(16), None, 1e-5, torch.ones(2, 16)
    torch.library.opcheck(engine.norm_conv2d, (x, *norm, layer.plan.sizes, True, *weights))


def residual_block(**options):
    torch.manual_seed(0)
    made = ResnetBlock2D(**{"in_channels": 32, "temb_channels": 24, "groups": 4, **options})
    return made.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.fixture
def steps(monkeypatch):
    """How many convolutions normed their input on the way."""
    found = []
    ours = diffusers_blocks.after_norm

    def run(*args):
        made = ours(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(diffusers_blocks, "after_norm", run)
    return found


GIVEN = torch.randn(2, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", [{}, {"out_channels": 64}, {"temb_channels": None}, {"skip_time_act": True}], ids=str)
@torch.no_grad()
def test_residual_blocks(options, steps, monkeypatch):
    temb = None if "temb_channels" in options else GIVEN
    block, x = residual_block(**options), images((2, 9, 8), 32, torch.float32)
    simulated = quantize(copy.deepcopy(block), "quartz-w4a8", simulate=True).model
    exact = simulated(x, temb)
    packed, x, temb = quantize(block, "quartz-w4a8").model.bfloat16(), x.bfloat16(), None if temb is None else temb.bfloat16()
    kept = x.clone()
    found = packed(x, temb)
    assert steps == [True, True]
    assert torch.equal(x, kept)
    assert found.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(diffusers_blocks, "after_norm", lambda *_: None)
    before = packed(x, temb)
    assert sqnr(exact, found.float()) > sqnr(exact, before.float()) - 0.5 > 25
    if temb is None:
        assert torch.equal(found, before)


def _hook(*_):
    return None


ONLOOKERS = {  # who wants to be called; how many convolutions may still norm on the way
    "norm1": (lambda block: block.norm1.register_forward_hook(_hook), 1),
    "conv2": (lambda block: block.conv2.register_forward_pre_hook(_hook), 1),
    "dropout": (lambda block: block.dropout.register_forward_hook(_hook), 1),
    "SiLU": (lambda block: block.nonlinearity.register_forward_hook(_hook), 0),
    "all modules": (lambda _: nn.modules.module.register_module_forward_hook(_hook), 0),
    "another forward": (lambda block: setattr(block.conv1, "forward", block.conv1.forward), 1),
}


@pytest.mark.parametrize("who", ONLOOKERS)
@torch.no_grad()
def test_who_looks_at_what_lies_between_sees_it(who, steps):
    block, x = quantize(residual_block(), "quartz-w4a8").model.bfloat16(), images((2, 9, 8), 32)
    expected = block(x, GIVEN.bfloat16())
    steps.clear()
    add, left = ONLOOKERS[who]
    handle = add(block)
    found = block(x, GIVEN.bfloat16())
    if handle is not None:
        handle.remove()
    assert sum(steps) == left
    assert sqnr(expected.float(), found.float()) > 30


@torch.no_grad()
def test_compiles_whole(steps):
    block, x = quantize(residual_block(), "quartz-w4a8").model.bfloat16(), images((2, 9, 8), 32)
    expected = block(x, GIVEN.bfloat16())
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x, GIVEN.bfloat16()), expected)
    assert all(steps)
