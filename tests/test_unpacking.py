"""Packed layers as float ones."""

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.recipe import LayerSpec, Recipe, WeightSpec
from halfbyte.unpacking import float_layer

LZS = LayerSpec(WeightSpec("lzs4", max_shift=4))
WEIGHTS_ONLY = Recipe("w4", LZS, edge=LZS)
KINDS = {
    "linear": (lambda: nn.Linear(40, 12), (3, 40)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (2, 8, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(8, 12, 3, groups=2), (2, 8, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(8, 12, 2), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_where_inputs_are_not_rounded_the_float_layer_gives_the_same(kind, smooth):
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    model, x = nn.Sequential(build()), torch.randn(shape)
    hb.quantize(model, WEIGHTS_ONLY)
    layer = model[0]
    if smooth:
        layer.input_scale = torch.rand(8 if kind != "linear" else 40) + 0.5
    with torch.no_grad():
        expected, made = layer(x), float_layer(layer, torch.float32)
        assert type(made) is type(build())
        assert torch.allclose(made(x), expected, atol=1e-5)
    assert not hasattr(made, "spec")
