"""Calibrated recipes on whole modules: which layers get statistics, tied and shared weights, and what the table says."""

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call, collect
from halfbyte.conversion import decide_by, pack, packed_layers, simulate, specs_of, stored_bytes
from halfbyte.errors import CalibrationError, ModelError
from halfbyte.layers import FakeQuant
from halfbyte.presets import PRESETS
from halfbyte.recipe import INT8, LayerSpec, WeightSpec

INT4 = PRESETS["int4-w4a4"]
AUTHORS = PRESETS["quartz-authors-w4a4"].inner
GPTQ8 = LayerSpec(WeightSpec("int8", scale="absmax", rounding="gptq"), INT8.activation)
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)


class Chain(nn.Module):
    """Linear layers by name, run in the order given; the first and the last defined are the edges."""

    def __init__(self, *names, order=None, **shared):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            setattr(self, name, nn.Linear(8, 8))
        for name, source in shared.items():
            getattr(self, name).weight = getattr(self, source).weight
        self.order = order or names

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("recipe", [PRESETS["int8-w8a8"].smoothed(0.5), PRESETS["int8-w8a8"].replace(inner=GPTQ8, edge=GPTQ8)])
def test_tied_weights_are_not_changed_twice(recipe):
    """Two layers, and an embedding, share one weight: compensating or smoothing one must leave the others alone."""
    model = Chain("first", "one", "two", "last", two="one")
    model.embedding = nn.Embedding(8, 8)
    model.embedding.weight = model.one.weight
    before = model.embedding.weight.clone()
    with torch.no_grad():
        exact = model(X)
        hb.quantize(model, recipe, calibration=[X])
        assert relative(model(X), exact) < 0.03
    assert torch.equal(model.embedding.weight, before)


def test_layers_the_recipe_keeps_need_no_statistics():
    recipe = INT4.smoothed(0.5).replace(keep=("^idle$",))
    model = Chain("first", "idle", "inner", "last", order=("first", "inner", "last"))
    layers = {layer.name: layer for layer in hb.quantize(model, recipe, calibration=[X]).layers}
    assert layers["idle"].spec is None
    assert layers["idle"].reason == "the recipe keeps '^idle$'"
    with pytest.raises(CalibrationError, match="'idle' among them; give inputs that reach them"):
        hb.quantize(Chain("first", "idle", "last", order=("first", "last")), INT4.smoothed(0.5), calibration=[X])


@pytest.mark.parametrize(
    ("recipe", "compensated"),
    [
        (INT4.compensated(), ["inner"]),
        (INT4.replace(edge=GPTQ8), ["first", "last"]),
        (INT4.compensated().replace(edge=GPTQ8), ["first", "inner", "last"]),
        (INT4.compensated().replace(edge=None), ["inner"]),
        (INT4.smoothed(0.5), []),
    ],
)
def test_hessians_are_taken_where_a_layers_own_spec_asks(recipe, compensated):
    result = hb.quantize(Chain("first", "inner", "last"), recipe, calibration=[X])
    assert [name for name, found in result.statistics.items() if found.hessian is not None] == compensated
    assert set(result.statistics) == {layer.name for layer in result.layers if layer.spec is not None}


def test_the_weight_sqnr_of_a_compensated_layer_is_against_the_float_weight():
    plain, compensated = (hb.quantize(Chain("a", "b", "c"), r, calibration=[X]).layers for r in (INT4, INT4.compensated()))
    assert 5 < compensated[1].weight_sqnr <= plain[1].weight_sqnr + 0.5  # it trades the weight's error for the output's
    assert compensated[0].weight_sqnr == plain[0].weight_sqnr


def test_statistics_without_a_hessian_are_refused_before_anything_changes():
    model = Chain("first", "inner", "last")
    statistics = collect(model, [Call((X,), {})], ["first", "inner", "last"])
    with pytest.raises(CalibrationError, match="compensates 'inner', whose statistics hold no Hessian"):
        simulate(model, INT4.compensated(), statistics)
    with pytest.raises(CalibrationError, match="'first' and needs statistics"):
        simulate(model, INT4.smoothed(0.5), {})
    assert not any(isinstance(module, FakeQuant) for module in model.modules())


@pytest.mark.parametrize("changes", [{"inner": AUTHORS}, {"edge": AUTHORS}, {"after_silu": AUTHORS.activation}])
def test_recipes_with_a_part_that_cannot_be_packed_change_nothing(changes):
    model = Chain("first", "inner", "last")
    with pytest.raises(ModelError, match=r"cannot be packed: .* change along K; pass simulate=True"):
        hb.quantize(model, INT4.replace(**changes))
    assert type(model.first) is nn.Linear
    hb.quantize(model, INT4.replace(**changes), simulate=True)
    assert isinstance(model.inner, FakeQuant)


@pytest.mark.parametrize("calibration", [X, {"x": X}, Call((X,), {})])
def test_a_single_input_is_not_taken_for_a_list(calibration):
    with pytest.raises(ModelError, match="put the inputs of the module into a list"):
        hb.quantize(Chain("first", "last"), INT4.smoothed(0.5), calibration=calibration)


@pytest.mark.parametrize("entry", [X, (X,), [X], {"x": X}, Call((X,), {})])
def test_inputs_come_as_tensors_tuples_mappings_and_calls(entry):
    with torch.no_grad():
        model, reference = Chain("first", "last"), Chain("first", "last")
        hb.quantize(model, INT4.smoothed(0.5), calibration=iter([entry]))
        hb.quantize(reference, INT4.smoothed(0.5), calibration=[X])
        assert torch.equal(model(X), reference(X))


def test_smoothing_leaves_fine_grids_almost_exact_and_travels_with_the_checkpoint(tmp_path):
    model = Chain("first", "inner", "last")
    with torch.no_grad():
        exact = model(X)
        hb.quantize(model, PRESETS["int8-w8a8"].smoothed(0.5), calibration=[X])
        assert relative(model(X), exact) < 0.02
        assert all(layer.input_scale.shape == (8,) for layer in packed_layers(model).values())
        loaded = hb.load(hb.save(model, tmp_path / "out"), into=Chain("first", "inner", "last"))
        assert torch.equal(loaded(X), model(X))
    for name, layer in packed_layers(loaded).items():
        assert torch.equal(layer.input_scale, model.get_submodule(name).input_scale)


def test_a_layer_in_two_places_is_packed_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = model[2]
    layers = {layer.name: layer for layer in simulate(model, INT4).layers}
    assert "the same layer as 1" in layers["2"].reason
    pack(model)
    assert model[1] is model[2]
    assert stored_bytes(model)[1] == 3 * 2 * 64
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_the_decision_of_every_layer_has_its_reason():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ConvTranspose1d(8, 8, 2), nn.Linear(8, 8))
    decide = decide_by(model, INT4.compensated().replace(edge=None, keep=("1",)))
    found = {name: decide(name, layer) for name, layer in model.named_children()}
    assert found["0"][1] == "edge layer, kept by the recipe; known from first and last in the order of definition"
    assert found["1"] == (None, "the recipe keeps '1'")
    assert found["2"][0].weight.rounding == "nearest"
    assert "transposed" in found["2"][1]
    assert list(specs_of(model, INT4.replace(edge=None))) == ["1", "2"]


def test_the_table_has_a_line_for_every_layer_and_columns_that_line_up():
    result = simulate(Chain("first", "inner", "a_much_longer_name", "last"), INT4.replace(keep=("inner",)))
    head, *rows = result.table().splitlines()
    assert [row.split()[0] for row in rows] == ["first", "inner", "a_much_longer_name", "last"]
    assert all(row[head.index("shape") :].startswith("8x8 ") for row in rows)
    assert all(row[head.index("why") - 1] == " " for row in rows)
    assert "float" in rows[1]
    assert rows[1].endswith("the recipe keeps 'inner'")
