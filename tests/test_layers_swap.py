"""The walk that swaps layers in: every Linear and convolution is accounted for, and what must stay stays, with its reason."""

import copy

import pytest
import torch
from torch import nn

from halfbyte.errors import ModelError, NonFiniteError
from halfbyte.layers import (
    FAKE_QUANT,
    FakeQuant,
    FakeQuantConv1d,
    FakeQuantConv2d,
    FakeQuantConvTranspose1d,
    FakeQuantConvTranspose2d,
    FakeQuantLinear,
    LayerReport,
    check_finite,
    module_kind,
    swap,
)
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec

SPEC = LayerSpec(WeightSpec("int4"), ActivationSpec("int4"))


def all_of_them(name, layer):
    return SPEC, "recipe"


def convert(name, layer, spec):
    return FAKE_QUANT[module_kind(layer)].from_float(layer, spec)


class Doubled(nn.Linear):
    """A subclass that computes something of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what its parent does."""


class Everything(nn.Module):
    """A layer of every kind, in every kind of container, with activations and norms between."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv1d(2, 4, 3), nn.SiLU()), nn.Conv2d(2, 4, 3)])
        self.named = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 2, 2), "one": nn.ConvTranspose1d(4, 2, 2)})
        self.volume = nn.Conv3d(1, 1, 2)
        self.volume_up = nn.ConvTranspose3d(1, 1, 2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.doubled = Doubled(8, 8)
        self.renamed = Renamed(8, 4)
        self.embedding = nn.Embedding(3, 8)


BECAME = {  # name -> what stands there afterwards, kind in the table, part of the reason
    "linear": (FakeQuantLinear, "Linear", "recipe"),
    "blocks.0.0": (FakeQuantConv1d, "Conv1d", "recipe"),
    "blocks.1": (FakeQuantConv2d, "Conv2d", "recipe"),
    "named.up": (FakeQuantConvTranspose2d, "ConvTranspose2d", "recipe"),
    "named.one": (FakeQuantConvTranspose1d, "ConvTranspose1d", "recipe"),
    "volume": (nn.Conv3d, "Conv3d", "3-D convolutions are not supported"),
    "volume_up": (nn.ConvTranspose3d, "ConvTranspose3d", "3-D convolutions are not supported"),
    "attention.out_proj": (nn.Linear, "Linear", "nn.MultiheadAttention reads its weights directly"),
    "doubled": (Doubled, "Linear", "Doubled has a forward of its own"),
    "renamed": (FakeQuantLinear, "Linear", "recipe"),
}


def test_every_layer_is_accounted_for_in_order():
    model = Everything()
    before = dict(model.named_modules())
    reports = swap(model, all_of_them, convert)
    assert [report.name for report in reports] == list(BECAME)
    after = dict(model.named_modules())
    for report in reports:
        kind, float_kind, reason = BECAME[report.name]
        kept = not issubclass(kind, FakeQuant)
        assert isinstance(after[report.name], kind)
        assert (report.kind, report.reason) == (float_kind, reason)
        assert report.spec == (None if kept else SPEC)
        assert report.shape == tuple(before[report.name].weight.shape)
        assert (after[report.name] is before[report.name]) == kept
    untouched = set(before) - set(BECAME)
    assert all(after[name] is before[name] for name in untouched)
    assert list(after) == list(before), "names and their order stay"


def test_parameters_are_the_same_objects_under_the_same_names():
    model = Everything()
    before = dict(model.named_parameters())
    swap(model, all_of_them, convert)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(after[name] is before[name] for name in before)


def test_decisions_are_asked_by_name_and_respected():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    asked, converted = [], []
    answers = {"0": (None, "kept for the test"), "2": (INT8, "an edge"), "3.0": (SPEC, "inner")}

    def decide(name, layer):
        asked.append((name, layer))
        return answers[name]

    def convert_and_note(name, layer, spec):
        converted.append((name, spec))
        return convert(name, layer, spec)

    layers = [(name, model.get_submodule(name)) for name in answers]
    reports = swap(model, decide, convert_and_note)
    assert asked == layers
    assert converted == [("2", INT8), ("3.0", SPEC)]
    assert [(report.name, (report.spec, report.reason)) for report in reports] == list(answers.items())
    assert type(model[0]) is nn.Linear
    assert model[2].spec == INT8
    assert model[3][0].spec == SPEC


def test_a_shared_layer_is_converted_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    reports = swap(model, all_of_them, convert)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], FakeQuantLinear)
    assert model["c"] is not model["a"]
    reasons = [(report.name, report.reason) for report in reports]
    assert reasons == [("a", "recipe"), ("b.0", "recipe; the same layer as a"), ("c", "recipe")]


def test_a_shared_block_is_converted_once():
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(block, block)
    reports = swap(model, all_of_them, convert)
    assert model[0] is model[1]
    assert isinstance(block[0], FakeQuantLinear)
    assert [report.name for report in reports] == ["0.0", "1.0"]


def test_shared_weights_of_two_layers_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    swap(model, all_of_them, convert)
    assert model[1].weight is model[0].weight
    assert model[1] is not model[0]


def test_fused_transformer_layers_keep_their_weights_and_their_results():
    """In evaluation torch runs these in one fused call on the float weights, past the layers: swapping would only pretend."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        reports = swap(model, all_of_them, convert)
        assert torch.equal(model(x), expected)
    assert torch.allclose(model(x), expected, atol=1e-5), "with gradients, on the slow path"
    assert [report.spec for report in reports] == [None] * 3
    assert {report.reason for report in reports} == {
        "nn.MultiheadAttention reads its weights directly",
        "nn.TransformerEncoderLayer reads its weights directly",
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_computed_weight_is_kept(normalize):
    model = nn.Sequential(normalize(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = [name for name, _ in model.named_parameters()]
    first, second = swap(model, all_of_them, convert)
    assert first.spec is None
    assert "computed anew" in first.reason
    assert second.spec == SPEC
    assert [name for name, _ in model.named_parameters()] == before


def test_a_layer_whose_forward_was_replaced_is_kept():
    """A swapped layer would inherit the replacement, which still runs the float layer."""
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0].forward
    model[0].forward = lambda x: old(x)
    (report,) = swap(model, all_of_them, convert)
    assert (report.spec, type(model[0])) == (None, nn.Linear)
    assert "forward has been replaced" in report.reason


def test_layers_that_hold_no_float_weights_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model[1].weight = nn.Parameter(torch.zeros(0, 4))
    reports = swap(model, all_of_them, convert)
    assert [report.reason for report in reports] == ["its weight is torch.int8, not float", "its weight is empty", "recipe"]


def test_a_second_walk_changes_nothing():
    model = Everything()
    swap(model, all_of_them, convert)
    before = list(model.modules())
    reports = swap(model, all_of_them, convert)
    assert list(model.modules()) == before
    assert all(report.spec is None for report in reports)
    assert reports[0].reason == "FakeQuantLinear has a forward of its own"


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv3d(1, 1, 1), Doubled(2, 2)], ids=lambda layer: type(layer).__name__)
def test_a_bare_layer_cannot_be_replaced(layer):
    with pytest.raises(ModelError, match=f"bare {type(layer).__name__}; put it into an nn.Sequential"):
        swap(layer, all_of_them, convert)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.LayerNorm(3), nn.Embedding(2, 2))], ids=["empty", "norms"])
def test_a_model_without_layers_is_refused(model):
    with pytest.raises(ModelError, match="Sequential holds no Linear or convolution layer; there is nothing to quantize"):
        swap(model, all_of_them, convert)


def test_the_training_flag_stays_and_an_earlier_copy_is_untouched():
    model = Everything().eval()
    twin = copy.deepcopy(model)
    swap(model, all_of_them, convert)
    assert not any(module.training for module in model.modules())
    assert twin.linear.weight.shape == model.linear.weight.shape
    assert type(twin.linear) is nn.Linear


BITS = [
    (None, 16.0),
    (LayerSpec(WeightSpec("int4")), 4.0),
    (LayerSpec(WeightSpec("int4", group=64)), 4.25),
    (LayerSpec(WeightSpec("e2m1", group=16, group_scale="e4m3")), 4.5),
    (LayerSpec(WeightSpec("e2m1", max_shift=3)), 4.25),
    (LayerSpec(WeightSpec("lzs4", max_shift=4, subgroup=32)), 4.125),
    (LayerSpec(WeightSpec("e2m1", max_multiple=10)), 4.25),
    (INT8, 8.0),
]


@pytest.mark.parametrize(("spec", "bits"), BITS)
def test_bits_of_a_row_count_codes_and_shifts(spec, bits):
    assert LayerReport("a", "Linear", (4, 4), spec, "").bits == bits


def test_check_finite_names_the_tensor_and_counts():
    check_finite("fine.weight", torch.zeros(3, 3))
    check_finite("empty", torch.zeros(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensor = torch.zeros(2, 5)
        tensor[1, 2:4] = bad
        with pytest.raises(NonFiniteError, match=r"down\.0\.weight holds 2 NaN or infinite values of 10"):
            check_finite("down.0.weight", tensor)
    assert issubclass(NonFiniteError, ModelError)
