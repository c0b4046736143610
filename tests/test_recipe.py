"""Recipes as data: they survive every form, refuse what they do not know with a sentence, and check across fields."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError, RecipeError
from halfbyte.formats import GRIDS
from halfbyte.presets import PRESETS, get_recipe
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, Recipe, WeightSpec

FULL = Recipe(
    "all-set",
    LayerSpec(WeightSpec("e2m1", 3, 8, "absmax", 2.4, "gptq"), ActivationSpec("ue1m3", 4, 32, zero_point=True, peak=200)),
    edge=None,
    after_silu=ActivationSpec("uint8", zero_point=True, group=64),
    smooth=0.5,
    keep=(r"^time_embed", r"proj_out$"),
)
BARE = Recipe("bare", LayerSpec())
every_recipe = pytest.mark.parametrize("recipe", [*PRESETS.values(), FULL, BARE], ids=lambda recipe: recipe.name)


def plain():
    """A full recipe as a mapping that a test may change."""
    return copy.deepcopy(FULL.replace(edge=INT8).to_dict())


def place(data, path, value):
    """Set `value` at a dotted path of nested mappings."""
    *parents, last = path.split(".")
    for parent in parents:
        data = data[parent]
    data[last] = value


def refused(make, *parts):
    """The error of `make()`, whose message holds every part."""
    with pytest.raises(RecipeError) as caught:
        make()
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@every_recipe
def test_round_trip(recipe, tmp_path):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert get_recipe(recipe.to_dict()) == recipe
    assert get_recipe(recipe) is recipe
    for suffix, text in ((".json", recipe.to_json()), (".yaml", yaml.safe_dump(recipe.to_dict())), (".yml", recipe.to_json())):
        path = tmp_path / f"{recipe.name}{suffix}"
        path.write_text(text, encoding="utf-8")
        assert get_recipe(path) == recipe
        assert get_recipe(str(path)) == recipe


@every_recipe
def test_the_mapping_holds_every_field_and_only_plain_values(recipe):
    data = recipe.to_dict()
    assert list(data) == [item.name for item in dataclasses.fields(Recipe)]
    assert list(data["inner"]["weight"]) == [item.name for item in dataclasses.fields(WeightSpec)]
    assert json.loads(json.dumps(data)) == data
    assert json.loads(recipe.to_json()) == data


def test_missing_keys_take_their_defaults():
    assert Recipe.from_dict({"name": "bare", "inner": {}}) == BARE
    assert Recipe.from_dict({"name": "a", "inner": {"weight": {"grid": "e2m1"}}}).inner.weight == WeightSpec("e2m1")


@pytest.mark.parametrize("text", ["name: tëst ✓\ninner: {weight: {grid: lzs4, max_shift: 4}}\nkeep: [a, 'b.*']\nsmooth: 1\n"])
def test_yaml_as_a_person_writes_it(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    expected = Recipe("tëst ✓", LayerSpec(WeightSpec("lzs4", max_shift=4)), smooth=1.0, keep=("a", "b.*"))
    assert get_recipe(path) == expected


@every_recipe
def test_recipes_are_frozen_hashable_and_compared_by_value(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.inner.weight.grid = "other"
    twin = Recipe.from_dict(recipe.to_dict())
    assert {recipe: 1}[twin] == 1
    assert recipe.replace(name="other") != recipe
    assert recipe.replace() == recipe == copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe))


NESTED = ["", "inner", "inner.weight", "inner.activation", "edge", "edge.weight", "edge.activation", "after_silu"]
OWNER = {"": "Recipe", "inner": "LayerSpec", "edge": "LayerSpec", "weight": "WeightSpec"}


@pytest.mark.parametrize("level", NESTED)
def test_an_unknown_key_is_refused_at_every_level(level):
    data = plain()
    place(data, f"{level}.shfit".lstrip("."), 1)
    owner = OWNER.get(level.rpartition(".")[2], "ActivationSpec")
    known = {"Recipe": "'after_silu'", "LayerSpec": "'activation'"}.get(owner, "'subgroup'")
    refused(lambda: Recipe.from_dict(data), f"{owner} has no key 'shfit'", "its keys are", known)


def test_several_unknown_keys_are_all_named():
    refused(lambda: WeightSpec.from_dict({"grid": "int4", "b": 1, "a": 1, 3: 1}), "WeightSpec has no key '3', 'a', 'b'")


@pytest.mark.parametrize(("data", "names"), [({}, "'inner', 'name'"), ({"name": "x"}, "'inner'"), ({"inner": {}}, "'name'")])
def test_a_required_key_that_is_missing_is_named(data, names):
    refused(lambda: Recipe.from_dict(data), f"Recipe needs a value for {names}")


WRONG_TYPES = [
    ("name", 3, "Recipe.name must be a string, got int 3"),
    ("name", None, "Recipe.name must be a string, got NoneType None"),
    ("inner", None, "Recipe.inner must be a mapping of LayerSpec fields, got NoneType None"),
    ("inner", "int4", "Recipe.inner must be a mapping of LayerSpec fields, got str 'int4'"),
    ("inner.weight", [1], "LayerSpec.weight must be a mapping of WeightSpec fields, got tuple (1,)"),
    ("inner.activation", "int8", "LayerSpec.activation must be a mapping of ActivationSpec fields or null, got str 'int8'"),
    ("inner.weight.grid", 4, "WeightSpec.grid must be a string, got int 4"),
    ("inner.weight.max_shift", "3", "WeightSpec.max_shift must be an integer, got str '3'"),
    ("inner.weight.max_shift", 3.0, "WeightSpec.max_shift must be an integer, got float 3.0"),
    ("inner.weight.max_shift", True, "WeightSpec.max_shift must be an integer, got bool True"),
    ("inner.weight.norm", True, "WeightSpec.norm must be a number, got bool True"),
    ("inner.weight.norm", "2", "WeightSpec.norm must be a number, got str '2'"),
    ("inner.weight.scale", "mse", "WeightSpec.scale must be one of 'absmax', 'search', got str 'mse'"),
    ("inner.weight.rounding", None, "WeightSpec.rounding must be one of 'nearest', 'gptq', 'adaround', got NoneType None"),
    ("inner.activation.zero_point", 1, "ActivationSpec.zero_point must be true or false, got int 1"),
    ("inner.activation.rounding", "down", "ActivationSpec.rounding must be one of 'nearest', 'truncate', got str 'down'"),
    ("smooth", "0.5", "Recipe.smooth must be a number or one of 'search' or null, got str '0.5'"),
    ("keep", "proj_out", "Recipe.keep must be a tuple of strings (in a file: a list), got str 'proj_out'"),
    ("keep", ["a", 1], "Recipe.keep must be a tuple of strings (in a file: a list), got tuple ('a', 1)"),
    ("edge", False, "Recipe.edge must be a mapping of LayerSpec fields or null, got bool False"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG_TYPES, ids=lambda part: str(part)[:24])
def test_a_wrong_type_is_refused_with_what_came_and_what_is_allowed(path, value, sentence):
    data = plain()
    place(data, path, value)
    refused(lambda: Recipe.from_dict(data), sentence)


@pytest.mark.parametrize("data", [None, [], "quartz", 3, [("name", "x")]], ids=str)
def test_only_a_mapping_is_a_recipe(data):
    refused(lambda: Recipe.from_dict(data), f"Recipe needs a mapping of its fields, got {type(data).__name__}")


IMPOSSIBLE = [
    (WeightSpec, {"grid": "int3"}, ["unknown grid 'int3'", "'e2m1'", "'uint4'"]),
    (WeightSpec, {"grid": "lzs4", "max_shift": 5}, ["WeightSpec", "'lzs4'", "0 to 4", "max_shift 5"]),
    (WeightSpec, {"grid": "e2m1", "max_shift": 4}, ["'e2m1'", "0 to 3", "max_shift 4"]),
    (WeightSpec, {"grid": "e3m0", "max_shift": 1}, ["0 to 0", "max_shift 1"]),
    (WeightSpec, {"grid": "int8", "max_shift": 1}, ["0 to 0", "max_shift 1"]),
    (ActivationSpec, {"grid": "e2m1", "max_multiple": 11}, ["'e2m1' can be 2 to 10", "got 11"]),
    (ActivationSpec, {"grid": "lzs4", "max_multiple": 17}, ["2 to 16", "got 17"]),
    (ActivationSpec, {"grid": "int8", "max_multiple": 2}, ["'int8' can be none", "got 2"]),
    (ActivationSpec, {"grid": "e2m1", "max_multiple": 4, "max_shift": 1}, ["only where max_shift is 0", "with max_shift 1"]),
    (WeightSpec, {"max_shift": -1}, ["0 to 0", "max_shift -1"]),
    (WeightSpec, {"grid": "e2m1", "max_multiple": 11}, ["WeightSpec", "'e2m1'", "2 to 10", "got 11"]),
    (WeightSpec, {"grid": "e2m1", "max_multiple": 10, "max_shift": 3}, ["only where max_shift is 0", "with max_shift 3"]),
    (WeightSpec, {"grid": "e2m1", "max_multiple": 10, "group": 16}, ["group scales and multipliers exclude each other"]),
    (WeightSpec, {"grid": "int8", "max_multiple": 2}, ["can be none"]),
    (WeightSpec, {"subgroup": 0}, ["subgroup must be 1 to 1024", "got 0"]),
    (WeightSpec, {"subgroup": 1025}, ["subgroup must be 1 to 1024", "got 1025"]),
    (WeightSpec, {"grid": "ue1m3"}, ["weights need a signed grid", "'ue1m3'"]),
    (WeightSpec, {"grid": "uint8"}, ["weights need a signed grid", "'uint8'"]),
    (WeightSpec, {"grid": "lzs4", "max_shift": 4, "group": 64}, ["group scales and multipliers exclude each other"]),
    (WeightSpec, {"group": -1}, ["group must be >= 0", "got -1"]),
    (WeightSpec, {"norm": 0}, ["norm a finite number > 0", "and 0"]),
    (WeightSpec, {"norm": -2.0}, ["norm a finite number > 0", "and -2.0"]),
    (WeightSpec, {"norm": float("nan")}, ["norm a finite number > 0", "and nan"]),
    (WeightSpec, {"norm": float("inf")}, ["norm a finite number > 0", "and inf"]),
    (ActivationSpec, {"grid": "nf9"}, ["unknown grid 'nf9'", "'ue3m1'"]),
    (ActivationSpec, {"grid": "int8", "zero_point": True}, ["'int8' cannot have a zero point", "set zero_point to False"]),
    (ActivationSpec, {"grid": "ue2m2"}, ["'ue2m2' needs a zero point", "set zero_point to True"]),
    (ActivationSpec, {"grid": "lzs4", "max_shift": 5}, ["ActivationSpec", "0 to 4", "max_shift 5"]),
    (ActivationSpec, {"grid": "lzs4", "rounding": "truncate"}, ["truncation is a right shift", "max_shift > 0", "'lzs4'"]),
    (ActivationSpec, {"grid": "e2m1", "max_shift": 2, "rounding": "truncate"}, ["an integer grid"]),
    (ActivationSpec, {"peak": 128}, ["peak must be 0 to 127", "got 128"]),
    (ActivationSpec, {"grid": "uint8", "zero_point": True, "peak": 256}, ["peak must be 0 to 255", "got 256"]),
    (ActivationSpec, {"peak": -1}, ["peak must be 0 to 127", "got -1"]),
    (ActivationSpec, {"group": -4}, ["group >= 0", "-4"]),
    (Recipe, {"name": "x", "inner": LayerSpec(), "smooth": 1.01}, ["smooth must be 0 to 1, 'search' or null", "got 1.01"]),
    (Recipe, {"name": "x", "inner": LayerSpec(), "smooth": float("nan")}, ["smooth must be 0 to 1, 'search' or null", "got nan"]),
    (Recipe, {"name": "x", "inner": LayerSpec(), "keep": ("ok", "(")}, ["keep has '('", "no regular expression"]),
]


@pytest.mark.parametrize(("kind", "fields", "parts"), IMPOSSIBLE, ids=lambda part: str(part)[:50])
def test_an_impossible_combination_is_refused(kind, fields, parts):
    refused(lambda: kind(**fields), *parts)
    refused(lambda: kind.from_dict(fields), *parts)


@settings(max_examples=80, deadline=None)
@given(grid=st.sampled_from([*GRIDS]), max_shift=st.integers(0, 5), zero_point=st.booleans(), peak=st.integers(0, 260))
def test_every_accepted_activation_fits_its_byte(grid, max_shift, zero_point, peak):
    """What is refused is an error of ours; what is not has integers that an 8-bit kernel can hold."""
    try:
        spec = ActivationSpec(grid, max_shift, zero_point=zero_point, peak=peak)
    except RecipeError:
        return
    if GRIDS[grid].simulated_only:
        assert max_shift == 0
        return
    assert 0 < spec.top <= (127 if GRIDS[grid].signed else 255)
    assert GRIDS[grid].top << max_shift <= (127 if GRIDS[grid].signed else 255)
    assert spec.top == (peak or GRIDS[grid].top << max_shift)


def test_what_cannot_run_in_integers_says_why():
    assert LayerSpec(WeightSpec(), ActivationSpec()).simulated_only() is None
    assert "groups of 64 change along K" in LayerSpec(WeightSpec(group=64)).simulated_only()
    assert "groups of 32 channels" in LayerSpec(WeightSpec(), ActivationSpec(group=32)).simulated_only()
    assert "'e4m3' has no packed form" in LayerSpec(WeightSpec("e4m3")).simulated_only()
    simulated = {name for name, recipe in PRESETS.items() if recipe.simulated_only()}
    baselines = {"int4-g64-w4a4", "nvfp4-w4a4", "mxfp4-w4a4", "nf4-w4a16", "svdquant-w4a4"}
    assert simulated == {"quartz-authors-w4a4", "msfp-w6a6"} | baselines
    assert "branch of rank 4" in LayerSpec(low_rank=4).simulated_only()


def test_calibration_is_asked_for_by_smoothing_and_gptq_alone():
    gptq = LayerSpec(WeightSpec(rounding="gptq"))
    assert not any(recipe.needs_calibration for recipe in (BARE, BARE.replace(edge=None)))
    assert all(recipe.needs_calibration for recipe in (FULL, BARE.replace(smooth=0.0), BARE.replace(edge=gptq)))
    assert BARE.replace(inner=gptq, edge=None).needs_calibration


def test_short_descriptions():
    assert PRESETS["quartz-w4a4"].inner.describe() == "lzs4<<4/16 x lzs4<<4/16"
    assert LayerSpec(WeightSpec("int4", group=64)).describe() == "int4 g64 x float"
    unsigned = ActivationSpec("ue1m3", 4, zero_point=True, rounding="truncate")
    assert unsigned.describe() == "ue1m3<<4/16 +z cut"


def test_presets_are_filed_under_their_names():
    assert all(get_recipe(name) is recipe and recipe.name == name for name, recipe in PRESETS.items())


def test_an_unknown_preset_is_refused_with_the_names_of_all():
    refused(lambda: get_recipe("quartz"), "unknown recipe 'quartz'", *map(repr, PRESETS), ".json or .yaml")
    refused(lambda: get_recipe(Path("recipes/mine.toml")), "unknown recipe")


BROKEN = {
    "a.json": (b'{"name": ', "is not JSON"),
    "b.json": (b"", "is not JSON"),
    "c.json": (b"[1, 2]", "needs a mapping of its fields, got list"),
    "d.json": (b'{"name": "\xff"}', "cannot be read"),
    "e.yaml": (b"name: [unclosed", "is not YAML"),
    "f.yaml": (b"", "needs a mapping of its fields, got NoneType"),
    "g.yml": (b"just words", "needs a mapping of its fields, got str"),
    "h.yaml": (b"\xff\xfe\x00", "cannot be read"),
    "i.yaml": (b"name: 2001-99-99", "is not YAML"),
    "j.yaml": (b"name: !!python/object/apply:os.getcwd []", "is not YAML"),
    "k.yaml": (b"name: x\ninner: {weight: {bits: 4}}", "WeightSpec has no key 'bits'"),
    "l.json": (b'{"name": "x", "inner": {"weight": {"norm": NaN}}}', "norm a finite number"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), [(name, *rest) for name, rest in BROKEN.items()], ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    refused(lambda: get_recipe(path), sentence)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path, suffix):
    refused(lambda: get_recipe(tmp_path / f"none{suffix}"), f"none{suffix} cannot be read")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(lambda: get_recipe(str(tmp_path / f"folder{suffix}")), f"folder{suffix} cannot be read")
    refused(lambda: get_recipe(f"nul\0{suffix}"), "cannot be read")


def test_the_error_is_a_halfbyte_error_and_a_value_error():
    assert issubclass(RecipeError, HalfbyteError)
    assert issubclass(RecipeError, ValueError)
