"""`halfbyte demo`: the embedded model through some recipes, and what its page must say of them."""

import json
import re

import pytest
from PIL import Image

from halfbyte.errors import RecipeError
from halfbyte.evidence.demo import run_demo
from halfbyte.report import check_results
from halfbyte.report.page import render


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder, stages = tmp_path_factory.mktemp("demo"), []
    results = run_demo(folder, 8, 4, 0, ("int4-w4a4", "quartz-w4a4", "msfp-w4a4"), lambda *stage: stages.append(stage))
    return folder, results, stages


def test_results_check_and_quartz_beats_int4(outcome):
    _, results, _ = outcome
    check_results(json.loads(json.dumps(results)))
    first, int4, quartz, msfp = results["runs"]
    assert (first["recipe"], results["settings"]["images"]) == ("float", 8)
    assert quartz["sqnr"] >= int4["sqnr"] + 3
    assert quartz["figures"]["psnr"]["value"] >= int4["figures"]["psnr"]["value"] + 3
    assert quartz["figures"]["perceptual"]["high"] < int4["figures"]["perceptual"]["low"]
    assert quartz["bytes"] <= 0.30 * quartz["bytes_bf16"]
    assert quartz["layers"][0]["name"] == "conv_in"
    assert all(layer["output_sqnr"] > 5 for layer in quartz["layers"])
    assert msfp["sqnr"] >= int4["sqnr"] + 3
    assert all((layer["choice"] is None) == (layer["weight"] == "int8") for layer in msfp["layers"])
    assert all(run["seconds_per_image"] > 0 for run in results["runs"])


def test_grids_that_were_searched_have_a_table_of_their_own(outcome):
    page = render(outcome[1])
    assert page.count("Grids found by search") == 1
    table = page[page.index("Grids found by search") :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + sum(layer["choice"] is not None for layer in outcome[1]["runs"][3]["layers"])
    assert re.search(r"<td>ue2m2</td>\s*<td>unsigned</td>\s*<td class=.number.>−0\.28 to", table)
    assert re.search(r"<span>ue2m2 \d\.\d+e-\d+</span> <span>ue1m3 ×1\.", table)


def test_pictures_and_progress_cover_every_run(outcome):
    folder, _, stages = outcome
    with Image.open(folder / "pictures.png") as strips:
        assert strips.size == (8 * 34 - 2, 4 * 34 - 2)
    names = ("float", "int4-w4a4", "quartz-w4a4", "msfp-w4a4")
    assert {f"{verb} {name}" for verb in ("sampling", "measuring") for name in names} <= {stage for stage, *_ in stages}
    for name in names:
        done = [count for stage, count, _ in stages if stage == f"sampling {name}"]
        assert done == [8, 16, 24, 32, 32]
    assert {file.name for file in folder.iterdir()} == {"pictures.png", "report.html", "results.json", "runs", "table.md"}


def test_what_is_done_is_not_done_again(outcome):
    folder, results, _ = outcome
    stages = []
    again = run_demo(folder, 8, 4, 0, ("quartz-w4a4",), lambda *stage: stages.append(stage))
    assert stages == []
    assert again["runs"] == [results["runs"][0], results["runs"][2]]


def test_a_recipe_that_is_not_there_is_named_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="unknown recipe 'nothing'"):
        run_demo(tmp_path / "out", 8, 4, 0, ("nothing",))
    assert not (tmp_path / "out").exists()
