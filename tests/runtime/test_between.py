"""Modules between packed layers: which the engine takes over, when it runs them, and that they are given back."""

import copy
import pickle

import pytest
import torch
from diffusers.models import activations, resnet, upsampling
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

import halfbyte as hb
from halfbyte.api import pack_model, quantize
from halfbyte.metrics import sqnr
from halfbyte.runtime import between
from halfbyte.runtime.between import STAND_INS, hand_back, take_over
from halfbyte.unpacking import unpack_layers

KINDS = (nn.GroupNorm, nn.GELU)


def kinds_of(model):
    return [type(module) for module in model.modules() if type(module) in (*STAND_INS, *STAND_INS.values())]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.act = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.act(self.conv(self.norm(x)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval().to(memory_format=torch.channels_last)


@pytest.fixture
def x():
    return torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)


@pytest.fixture
def runs(monkeypatch):
    """How often the engine ran, by name."""
    found = {"gelu": 0, "group_norm": 0}
    for name in found:
        ours = getattr(between, name)

        def run(*args, name=name, ours=ours):
            found[name] += 1
            return ours(*args)

        monkeypatch.setattr(between, name, run)
    return found


@torch.no_grad()
def test_only_the_16_bit_types(block, x, runs):
    exact = block(x)
    take_over(block)
    assert torch.equal(block(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert runs == {"gelu": 0, "group_norm": 0}
    for calls, dtype in enumerate((torch.bfloat16, torch.float16), 1):
        found = copy.deepcopy(block).to(dtype)(x.to(dtype))
        assert runs == {"gelu": calls, "group_norm": calls}
        assert sqnr(exact, found.float()) > 40


def test_gradients_go_torchs_way(block, x, runs):
    take_over(block.bfloat16())
    block(x.bfloat16().requires_grad_()).sum().backward()
    assert runs == {"gelu": 0, "group_norm": 0}
    assert block.norm.weight.grad is not None


def test_exact_gelu_is_torchs(x, runs):
    exact = nn.GELU()
    take_over(exact)
    assert torch.equal(exact(x.bfloat16()), nn.functional.gelu(x.bfloat16()))
    assert runs["gelu"] == 0


def test_packing_takes_over_and_unpacking_gives_back(block):
    before = kinds_of(block)
    pack_model(quantize(block, "quartz-w4a8", simulate=True).model)
    assert kinds_of(block) == [STAND_INS[kind] for kind in before]
    names = list(block.state_dict())
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert kinds_of(copied) == kinds_of(block)
        assert list(copied.state_dict()) == names
    unpack_layers(block, torch.float32)
    assert kinds_of(block) == before


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "FluxTransformer2DModel"])
@torch.no_grad()
def test_models_of_diffusers(name, build, call, tmp_path):
    model = build(name)
    hb.quantize(model, "quartz-w4a8")
    taken = [kind for kind in kinds_of(model) if kind in STAND_INS.values()]
    assert taken
    assert kinds_of(model) == taken
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert kinds_of(loaded) == taken
    arguments = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in call(name).items()
    }
    exact = model(**call(name), return_dict=False)[0]
    ours = loaded(**arguments, return_dict=False)[0]
    hand_back(loaded)
    assert not [kind for kind in kinds_of(loaded) if kind in STAND_INS.values()]
    theirs = loaded(**arguments, return_dict=False)[0]
    assert sqnr(exact, ours.float()) > min(sqnr(exact, theirs.float()) - 1, 30)


def residual_block(**options):
    made = resnet.ResnetBlock2D(**{"in_channels": 32, "temb_channels": 24, "groups": 4, **options})
    return made.eval().to(memory_format=torch.channels_last)


BLOCKS = {
    "plain": {},
    "shortcut": {"out_channels": 64},
    "scaled": {"output_scale_factor": 2**0.5, "skip_time_act": True},
    "no timestep": {"temb_channels": None},
    "not SiLU": {"non_linearity": "mish"},
    "smaller": {"down": True},
    "modulated": {"time_embedding_norm": "scale_shift"},
}


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_residual_blocks(kind, runs):
    torch.manual_seed(0)
    exact = residual_block(**BLOCKS[kind])
    x, temb = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last), torch.randn(2, 24)
    theirs, kept = copy.deepcopy(exact).bfloat16(), x.bfloat16()
    ours, given = copy.deepcopy(theirs), kept.clone()
    take_over(ours)
    found = ours(given, None if kind == "no timestep" else temb.bfloat16())
    expected = theirs(kept, None if kind == "no timestep" else temb.bfloat16())
    truth = exact(kept.float(), None if kind == "no timestep" else temb.bfloat16().float())
    assert runs["group_norm"] == 2
    assert torch.equal(given, kept)
    assert found.stride() == expected.stride()
    assert sqnr(truth, found.float()) > max(sqnr(truth, expected.float()) - 0.5, 40)


@torch.no_grad()
def test_hooks_keep_what_they_were_given():
    torch.manual_seed(0)
    block, x = residual_block().bfloat16(), torch.randn(2, 32, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    take_over(block)
    held = []
    for conv in (block.conv1, block.conv2):
        conv.register_forward_hook(lambda module, args, output: held.append((output, output.clone())))
    block(x, torch.randn(2, 24).bfloat16())
    assert len(held) == 2
    for output, copied in held:
        assert torch.equal(output, copied)


@pytest.mark.parametrize("options", [{}, {"use_conv": True}, {"interpolate": False}, {"use_conv_transpose": True}], ids=str)
@pytest.mark.parametrize("size", [None, (11, 9)])
@torch.no_grad()
def test_upsampling_of_many_images(options, size):
    torch.manual_seed(0)
    theirs = upsampling.Upsample2D(8, **options).bfloat16().to(memory_format=torch.channels_last)
    ours, x = copy.deepcopy(theirs), torch.randn(64, 8, 4, 5).bfloat16().to(memory_format=torch.channels_last)
    take_over(ours)
    found, expected = ours(x, size), theirs(x, size)
    if options in ({}, {"use_conv": True}):
        assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, atol=0.02 if options else 0, rtol=0)


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_transformers_keep_channels_innermost(linear):
    torch.manual_seed(0)
    options = {"in_channels": 16, "norm_num_groups": 4, "attention_head_dim": 8, "num_attention_heads": 2}
    theirs = Transformer2DModel(**options, use_linear_projection=linear).eval()
    x = torch.randn(2, 16, 4, 5).bfloat16().to(memory_format=torch.channels_last)
    ours, kept = nn.Sequential(copy.deepcopy(theirs)).bfloat16().to(memory_format=torch.channels_last), x.clone()
    take_over(ours)
    found, truth = ours[0](x, return_dict=False)[0], theirs(x.float(), return_dict=False)[0]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, kept)
    assert sqnr(truth, found.float()) > min(sqnr(truth, theirs.bfloat16()(x, return_dict=False)[0].float()) - 1, 40)


def test_models_that_save_themselves_keep_their_class():
    model = Transformer2DModel(in_channels=16, norm_num_groups=4, attention_head_dim=8, num_attention_heads=2)
    take_over(model)
    assert type(model) is Transformer2DModel


@torch.no_grad()
def test_gated_gelu():
    torch.manual_seed(0)
    exact, x = activations.GEGLU(32, 64), torch.randn(2, 9, 32).bfloat16()
    theirs = copy.deepcopy(exact).bfloat16()
    ours = copy.deepcopy(theirs)
    take_over(ours)
    truth = exact(x.float())
    assert sqnr(truth, ours(x).float()) > sqnr(truth, theirs(x).float())


@torch.no_grad()
def test_compiles_whole(block, x):
    pack_model(quantize(block, "quartz-w4a8", simulate=True).model)
    block, x = block.bfloat16(), x.bfloat16()
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
