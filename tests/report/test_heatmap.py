"""Heat maps: the order of rows, their colours, and which measurements belong to which results. Its page: test_budget.py."""

import math

import pytest

from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.report.heatmap import COLD, HOT, MOST, decibel, heat, heatmap_of, load_heatmap, write_heatmap


def test_the_most_sensitive_layers_come_first_and_the_rest_is_folded(study):
    found = study()
    given = {f"layers.{n}": "w8a8" if n == 39 else "w4a4" for n in range(40)}
    shown = heatmap_of(found, given)
    ladder = [(width, spec.describe()) for width, spec in found.ladder.items()]
    assert [(table.width, table.about) for table in shown.layers] == ladder
    for table in shown.layers:
        assert len(table.worst) == MOST
        assert [row.name for row in table.worst + table.others] == [f"layers.{n}" for n in reversed(range(40))]
        for row in table.worst + table.others:
            one = next(layer for layer in found.layers if layer.name == row.name)
            assert row.given == given[row.name]
            assert row.total == decibel(one.total(table.width))
            assert row.cells == [(decibel(damage), heat(damage)) for damage in one.damage[table.width]]
    assert {row.given for row in heatmap_of(found).layers[0].worst} == {None}
    assert [[row.name for row in table.worst] for table in shown.families] == [["inner"], ["inner"]]
    assert not any(table.others for table in shown.families)


COLOURS = {  # damage: dB, percent of colour
    0.0: (math.inf, 0),
    10 ** (-COLD / 10): (COLD, 0),
    10 ** (-(COLD + HOT) / 20): ((COLD + HOT) / 2, 42),
    10 ** (-HOT / 10): (HOT, 85),
    1e9: (-90, 85),
    math.inf: (-math.inf, 85),
    math.nan: (math.nan, 85),
}


@pytest.mark.parametrize("damage", COLOURS)
def test_colours_run_from_cold_to_hot_and_what_is_no_number_is_hot(damage):
    assert decibel(damage) == pytest.approx(COLOURS[damage][0], nan_ok=True)
    assert heat(damage) == COLOURS[damage][1]


def test_layers_whose_damage_is_no_number_are_the_most_sensitive(study, tmp_path):
    found = study()
    for place, value in ((20, math.nan), (7, math.inf)):
        found.layers[place].damage["w4a4"][0] = value
    shown = heatmap_of(found)
    assert [row.name for row in shown.layers[0].worst[:3]] == ["layers.20", "layers.7", "layers.39"]
    write_heatmap(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert '<td class="number" style="--heat: 85%">NaN</td>' in page
    assert "<strong>−∞</strong>" in page


def test_a_measurement_of_the_results_model_is_taken(results, study, LAYERS, tmp_path):
    path, found = tmp_path / "study.json", study(LAYERS)
    found.save(path)
    assert load_heatmap(path, results) == heatmap_of(found)
    for run in results["runs"]:
        run["layers"] = []  # a slim file: nothing is known of its layers
    study().save(path)
    assert load_heatmap(path, results) == heatmap_of(study())


def test_parts_of_split_layers_add_up(results, study, LAYERS, make_layer, tmp_path):
    path, parts = tmp_path / "study.json", [make_layer(f"conv_in.parts.{n}", 10.0) for n in range(2)]
    study(LAYERS).save(path)
    for layer, channels in zip(parts, (6, 10), strict=True):
        layer["shape"] = [32, channels, 3, 3]
    results["runs"][2]["layers"][:1] = parts  # a run of a recipe that splits
    assert len(load_heatmap(path, results).layers[0].worst) == len(LAYERS)
    parts[0]["shape"][1] += 1
    with pytest.raises(HalfbyteError, match="'conv_in' has 4,608 weights, not 4,896"):
        load_heatmap(path, results)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("conv_in", "conv_between")}, "'conv_between' is missing there"),
        ({"names": ("conv_in",), "weights": 4609}, "'conv_in' has 4,609 weights, not 4,608"),
    ],
)
def test_measurements_of_other_models_are_refused(results, study, tmp_path, changes, words):
    study(**changes).save(tmp_path / "study.json")
    with pytest.raises(HalfbyteError, match=rf"study\.json is of another model than the results: its layer {words}; give"):
        load_heatmap(tmp_path / "study.json", results)


def test_files_that_are_no_measurement_are_refused(results, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json cannot be read"):
        load_heatmap(tmp_path / "absent.json", results)
    (tmp_path / "bad.json").write_text('{"rows": []}')
    with pytest.raises(HalfbyteError, match=r"bad\.json is no result of 'halfbyte sensitivity'"):
        load_heatmap(tmp_path / "bad.json", results)
