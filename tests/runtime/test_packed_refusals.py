"""What packed layers are not: they hold no float weight, pass no gradients, and refuse what only simulation can do."""

import pytest
import torch
from torch import nn

from halfbyte.errors import HalfbyteError, PackedError
from halfbyte.layers import FAKE_QUANT
from halfbyte.presets import PRESETS
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime.layers import PACKED, Packed
from halfbyte.runtime.weights import pack_layer

pytestmark = pytest.mark.usefixtures("each_backend")

LAYERS = {
    "linear": lambda: nn.Linear(20, 6),
    "linear without bias": lambda: nn.Linear(20, 6, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding=1),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def pack(layer, spec=INT8):
    return pack_layer(FAKE_QUANT[type(layer)].from_float(layer, spec))


@every_layer
def test_a_packed_layer_is_its_kind_and_says_what_it_holds(make):
    layer = make().eval()
    packed = pack(layer)
    assert isinstance(packed, Packed)
    assert isinstance(packed, type(layer))
    assert packed.training is False
    assert packed.bias is layer.bias
    assert INT8.describe() in repr(packed)
    sizes = {key: value for key, value in vars(layer).items() if key[0] != "_" and key != "training"}
    assert sizes.items() <= vars(packed).items()


@every_layer
def test_the_stand_in_has_the_looks_of_the_weight(make):
    layer = make()
    weight = pack(layer).weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (layer.weight.shape, layer.weight.dtype, layer.weight.device)
    assert weight.numel() == layer.weight.numel()
    assert weight.size(0) == layer.weight.size(0)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert weight.untyped_storage().nbytes() == weight.element_size(), "zero memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stand_in_follows_the_dtype_of_the_model(dtype):
    assert pack(nn.Linear(4, 4)).to(dtype).weight.dtype == dtype
    assert pack(nn.Linear(4, 4).to(dtype)).weight.dtype == dtype


WRITES = {
    "data +=": lambda layer: layer.weight.data.add_(1),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.ones(6, 20)),
    "data.clone": lambda layer: layer.weight.data.clone(),
    "data[:]": lambda layer: layer.weight.data.__setitem__(slice(None), 1.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_through_data_is_refused_with_a_sentence(write):
    with pytest.raises(PackedError, match="merge the adapter into the float model and quantize that"):
        write(pack(nn.Linear(20, 6)))


OTHER_WRITES = {
    "add_": lambda layer: layer.weight.add_(1),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(6, 20)),
    "data =": lambda layer: setattr(layer.weight, "data", torch.ones(6, 20)),
    "weight =": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(6, 20))),
    "init": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("write", OTHER_WRITES.values(), ids=OTHER_WRITES)
def test_no_other_write_is_lost_in_silence(write):
    layer = pack(nn.Linear(20, 6))
    codes = layer.weight_codes.clone()
    with pytest.raises((HalfbyteError, RuntimeError, AttributeError, KeyError)):
        write(layer)
    assert torch.equal(layer.weight_codes, codes)


@every_layer
def test_gradients_are_refused_when_asked_for(make):
    layer = make()
    packed = pack(layer)
    x = torch.randn(2, 20) if isinstance(layer, nn.Linear) else torch.randn(2, 4, *[5] * (layer.weight.ndim - 2))
    with torch.no_grad():
        expected = packed(x)
    assert torch.equal(packed(x), expected), "a forward outside no_grad is no fault"
    assert not packed(x).requires_grad, "not even for the bias"
    y = packed(x.requires_grad_())
    assert torch.equal(y, expected)
    with pytest.raises(PackedError, match=r"pass no gradients; quantize with simulate=True to train"):
        y.sum().backward()
    assert x.grad is None


def test_packed_layers_in_a_row_run_outside_no_grad():
    model = nn.Sequential(pack(nn.Linear(20, 6)), nn.LayerNorm(6), nn.SiLU(), pack(nn.Linear(6, 3)))
    assert model(torch.randn(2, 20)).shape == (2, 3)


SIMULATED = {
    "weight groups": (LayerSpec(WeightSpec("int4", group=16)), "weight scales for groups of 16 change along K"),
    "activation groups": (
        LayerSpec(WeightSpec("int4"), ActivationSpec("int4", group=8)),
        "activation scales for groups of 8 channels change along K",
    ),
    "the authors' preset": (PRESETS["quartz-authors-w4a4"].inner, "int4 g64 x lzs4<<4/32 g64 cannot be packed"),
}


@pytest.mark.parametrize(("spec", "reason"), SIMULATED.values(), ids=SIMULATED)
def test_what_only_simulation_can_do_is_not_packed(spec, reason):
    layer = nn.Linear(64, 4)
    fake = FAKE_QUANT[nn.Linear].from_float(layer, spec)
    assert fake(torch.randn(2, 64)).shape == (2, 4)
    for refuse in (lambda: pack_layer(fake), lambda: PACKED[nn.Linear].empty(layer, spec)):
        with pytest.raises(PackedError, match="simulate=True") as caught:
            refuse()
        assert reason in str(caught.value)


def test_what_no_preset_calls_simulated_packs():
    for recipe in PRESETS.values():
        if not recipe.simulated_only():
            assert isinstance(pack(nn.Linear(64, 4), recipe.inner), Packed)
