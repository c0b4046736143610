"""Layers cut at the borders of a concatenation: the same function in float, found by tracing, saved and loaded like any other."""

import copy

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte import api
from halfbyte.calibration import Call
from halfbyte.checkpoint import read_json
from halfbyte.conversion import packed_layers, quantizable_layers
from halfbyte.errors import CorruptError, ModelError, NonFiniteError
from halfbyte.evaluate import layer_sqnr
from halfbyte.heal.student import load_student
from halfbyte.layers import FakeQuant
from halfbyte.presets import get_recipe
from halfbyte.recipe import ActivationSpec, LayerOverride, LayerSpec, Recipe, WeightSpec
from halfbyte.runtime.layers import PackedConv2d
from halfbyte.splitting import Split, join_layers, owner_of, split_layers, splits_of
from halfbyte.tracing import JoinTrace

LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (3, 10)),
    "tokens": (lambda: nn.Linear(10, 6, bias=False), (2, 5, 10)),
    "conv": (lambda: nn.Conv2d(10, 6, 3, padding=1, stride=2), (2, 10, 9, 9)),
    "circular": (lambda: nn.Conv2d(10, 6, 3, padding=1, padding_mode="circular"), (2, 10, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(10, 6, 3, dilation=2), (2, 10, 12)),
    "one image": (lambda: nn.Conv2d(10, 6, 1), (10, 4, 4)),
}
PLAIN = LayerSpec(WeightSpec("int4"), ActivationSpec("int8"))
SPLIT = Recipe("split", PLAIN, edge=None, split=True)


@pytest.mark.parametrize("sizes", [(4, 6), (1, 2, 7)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_split_layer_is_the_same_function_and_can_be_joined_again(name, sizes):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    exact, weight = model(x), model[0].weight.detach().clone()
    split_layers(model, {"0": sizes})
    assert isinstance(model[0], Split)
    assert [part.weight.shape[1] for part in model[0].parts] == list(sizes)
    assert [part.bias is None for part in model[0].parts] == [name == "tokens", *(True for _ in sizes[1:])]
    torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    assert splits_of(model) == {"0": list(sizes)}
    join_layers(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), exact)
    assert splits_of(model) == {}


def test_images_with_channels_last_stay_so():
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    split_layers(model, {"0": [4, 4]})
    seen = []
    for part in model[0].parts:
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    model(x)
    assert seen == [True, True]


class Shortcut(nn.Module):
    """A convolution of its own for the sum of a loud and a quiet input, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.merge, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3)
        self.alias = self.merge

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud = self.enter(x) * 40
        return self.after(self.alias(torch.cat([loud, loud.sin()], dim=1)).relu())


def test_shared_layers_are_split_wherever_they_are_and_hooks_see_the_whole_input():
    model, shapes = Shortcut(), []
    model.merge.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1]))
    split_layers(model, {"merge": [4, 4]})
    assert model.alias is model.merge
    assert isinstance(model.merge, Split)
    model(torch.randn(1, 3, 5, 5))
    assert shapes == [8]


X = torch.zeros(2, 4, 6, 6)
TRACED = {
    "cat": (lambda: torch.cat([X, X[:, :1]], 1), (4, 1)),
    "cat, negative axis by keyword": (lambda: torch.cat((X, X), dim=-3), (4, 4)),
    "concat of a concat": (lambda: torch.concat([torch.cat([X, X], 1), X], 1), (4, 4, 4)),
    "a concat of another axis inside": (lambda: torch.cat([torch.cat([X, X], 2), torch.cat([X, X], 2)], 1), (4, 4)),
    "views that keep channels": (lambda: torch.cat([X, X], 1).float().contiguous().clone().to(torch.float64), (4, 4)),
    "resampled": (lambda: nn.functional.interpolate(torch.cat([X, X], 1), scale_factor=2), (4, 4)),
    "another axis": (lambda: torch.cat([X, X], 0), (4,)),
    "computed with": (lambda: torch.cat([X, X], 1) * 2, (8,)),
    "reshaped": (lambda: torch.cat([X, X], 1).reshape(2, 8, 3, 12), (8,)),
    "permuted": (lambda: torch.cat([X, X], 1).transpose(0, 1), (2,)),
    "none": (lambda: X, (4,)),
}


@pytest.mark.parametrize(("make", "sizes"), TRACED.values(), ids=TRACED)
def test_concatenations_are_followed_while_channels_stay_in_place(make, sizes):
    with JoinTrace() as trace:
        assert trace.parts(make(), -3) == sizes


def test_the_shortcuts_of_a_unet_are_found_and_nothing_else(build, call):
    model = build("UNet2DModel")
    widths = {name: list(layer.weight.shape[1:2]) for name, layer in quantizable_layers(model).items()}
    api.quantize(model, SPLIT, [call("UNet2DModel")], simulate=True)
    found = splits_of(model)
    assert set(found) == {f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in (0, 1) for j in (0, 1)}
    assert all(sum(sizes) == widths[name][0] for name, sizes in found.items())


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SanaTransformer2DModel"])
def test_transformers_have_no_convolution_to_split(name, build, call):
    model = build(name)
    api.quantize(model, SPLIT, [call(name)], simulate=True)
    assert splits_of(model) == {}


def test_parts_are_treated_as_the_layer_they_belong_to():
    keep = SPLIT.replace(keep=("^merge$",), edge=PLAIN)
    own = SPLIT.replace(overrides=(LayerOverride("^merge$", get_recipe("int8-w8a8").inner),))
    calls = [(torch.randn(2, 3, 8, 8),)]
    kept = Shortcut()
    api.quantize(kept, keep, calls)
    assert splits_of(kept) == {}
    model = Shortcut()
    table = {layer.name: layer for layer in api.quantize(model, own, calls).layers}
    assert table["merge.parts.1"].spec.weight.grid == "int8"
    assert "reads part 2 of the concatenation that merge reads" in table["merge.parts.1"].reason
    assert isinstance(model.merge.parts[0], PackedConv2d)
    assert owner_of(model, "merge.parts.0") == "merge"
    assert owner_of(model, "after") == "after"


def test_two_scales_keep_the_quiet_part():
    torch.manual_seed(0)
    model, x = Shortcut(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.merge.weight[:, :4] /= 40  # both parts matter as much
        exact = model(x)
    errors = []
    for split in (False, True):
        copied = copy.deepcopy(model)
        spec = LayerSpec(WeightSpec("int8"), ActivationSpec("int4"))
        api.quantize(copied, Recipe("one layer", spec, edge=None, keep=("enter", "after"), split=split), [(x,)])
        with torch.no_grad():
            errors.append(float((copied(x) - exact).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_failure_leaves_the_model_as_it_was():
    model = Shortcut()
    with torch.no_grad():
        model.after.weight[0, 0, 0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="after"):
        api.quantize(model, SPLIT, [(torch.randn(2, 3, 8, 8),)])
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) or name == "after.weight" for name, tensor in model.state_dict().items())


def test_a_split_pipeline_is_saved_loaded_and_healed(pipe, tmp_path):
    teacher = copy.deepcopy(pipe)
    result = api.quantize(pipe, SPLIT.replace(inner=PLAIN.replace(activation=ActivationSpec("int8", scale="static"))), 2, steps=2)
    x = torch.randn(1, 1, 8, 8), 10
    with torch.no_grad():
        expected = pipe.unet(*x).sample
    halfbyte.save(pipe, tmp_path / "out")
    config = read_json(tmp_path / "out" / "unet" / "config.json")["quantization_config"]
    assert config["splits"] == splits_of(result.model)
    loaded = halfbyte.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.unet(*x).sample, expected)
    damage = layer_sqnr(teacher.unet, loaded.unet, [Call(x, {})])
    assert damage["up_blocks.0.resnets.0.conv_shortcut"] > 10
    assert not any(".parts." in name for name in damage)
    student = load_student(tmp_path / "out", teacher)[1]
    assert isinstance(student.up_blocks[0].resnets[0].conv_shortcut.parts[1], FakeQuant)
    with torch.no_grad():
        torch.testing.assert_close(student(*x).sample, expected, rtol=1e-3, atol=1e-3)


def test_bad_splits_are_refused(tmp_path):
    model = Shortcut()
    for name, sizes, why in (
        ("merge", [4, 5], r"its 8 channels are not the sum of \[4, 5\]"),
        ("merge", [8], "not the sum"),
        ("merge", [8, 0], "not the sum"),
        ("nothing", [4, 4], "it is a NoneType, not a Linear"),
    ):
        with pytest.raises(ModelError, match=why):
            split_layers(model, {name: sizes})
    with pytest.raises(ModelError, match="convolution with groups"):
        split_layers(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2)), {"0": [4, 4]})
    assert splits_of(model) == {}
    api.quantize(model, SPLIT, [(torch.randn(2, 3, 8, 8),)])
    assert len(packed_layers(model)) == 2  # the edges stay in float
    halfbyte.save(model, tmp_path / "out")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(halfbyte.load(tmp_path / "out", into=Shortcut())(x), model(x))
    other = Shortcut()
    other.merge = other.alias = nn.Conv2d(6, 4, 1)
    with pytest.raises(CorruptError, match="does not fit this Shortcut: layer 'merge' cannot be split"):
        halfbyte.load(tmp_path / "out", into=other)
