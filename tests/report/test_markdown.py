"""Tables in Markdown, merged results, and cards: they say what the results say, and leave other people's text alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import EvaluationError, HalfbyteError
from halfbyte.presets import get_recipe
from halfbyte.report import check_results
from halfbyte.report.card import add_evaluation, write_card
from halfbyte.report.markdown import between_markers, captioned_table, insert_table, markdown_table, marked
from halfbyte.report.merge import merge
from halfbyte.report.pictures import data_uri, grid_png


def figure(value, half=None):
    known = half is not None
    return {"value": value, "low": value - half if known else None, "high": value + half if known else None, "bias": None}


def make_run(recipe, sqnr=None, **figures):
    return {
        "recipe": recipe,
        "weights": "int4|x",
        "activations": "int8",
        "bits": 4.06,
        "bytes": 250,
        "bytes_bf16": 1000,
        "sqnr": sqnr,
        "sqnr_by_timestep": [],
        "figures": figures,
        "published": [],
        "seconds_per_image": None if recipe == "nvfp4-w4a4" else 0.5,
        "layers": [],
        "images": data_uri(grid_png(torch.zeros(1, 1, 8, 8), 1)),
    }


def make_results(*runs):
    settings = {"images": 64, "steps": 10, "seed": 0, "batch": 32, "sampler": "DDIMScheduler", "arguments": {}}
    settings |= {"features": "net.onnx", "digest": "00ff", "reference": None, "reference_count": None}
    made = {"schema": 2, "model": "m", "created": "2026-01-01", "environment": {}, "settings": settings}
    return check_results(made | {"runs": [make_run("float", frechet=figure(5.0, 0.5)), *runs]})


QUARTZ = make_run("quartz-w4a4", 13.04, psnr=figure(21.854, 0.22), frechet=figure(7.26, 0.6), custom=figure(1.0))
NVFP4 = make_run("nvfp4-w4a4", -math.inf, psnr=figure(math.inf))


def test_the_table_says_what_the_results_say():
    QUARTZ["published"] = [{"figure": "frechet", "value": 6.98, "source": "the paper"}]
    lines = markdown_table(make_results(QUARTZ, NVFP4)).splitlines()
    assert lines[0] == (
        "| recipe | weights | activations | bits | size of bf16 | SQNR dB ↑ | PSNR dB ↑ | Frechet ↓ | custom ↑ | s an image |"
    )
    assert lines[1].count("---") == 10
    assert lines[3] == "| `quartz-w4a4` | int4\\|x | int8 | 4.06 | 0.250× | 13.0 | 21.85 ± 0.22 | 7.26 ± 0.60 | 1.000 | 0.5 |"
    assert lines[4] == "| `nvfp4-w4a4` | int4\\|x | int8 | 4.06 | 0.250× | −∞ | ∞ | – | – | – |"
    assert lines[-1] == "- `quartz-w4a4`: Frechet 6.98, the paper"


def test_tables_go_between_their_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{marked('results', 'the old one')}\nafter\n{marked('other', 'stays')}\n")
    for _ in range(2):
        insert_table(file, make_results(QUARTZ))
        text = file.read_text()
        assert text == f"before\n{marked('results', captioned_table(make_results(QUARTZ)))}\nafter\n{marked('other', 'stays')}\n"
    with pytest.raises(HalfbyteError, match="has no lines '<!-- figures: written by halfbyte -->'"):
        between_markers(text, "figures", "x")
    with pytest.raises(HalfbyteError, match=r"nothing\.md cannot be read"):
        insert_table(tmp_path / "nothing.md", make_results(QUARTZ))


def test_results_made_alike_are_merged():
    merged = merge([make_results(QUARTZ), make_results(NVFP4)])
    assert [run["recipe"] for run in merged["runs"]] == ["float", "quartz-w4a4", "nvfp4-w4a4"]
    check_results(merged)
    assert merge([make_results(QUARTZ)]) == make_results(QUARTZ)


def changed(change):
    other = copy.deepcopy(make_results(NVFP4))
    change(other)
    return other


DIFFERENT = {
    "extractors": (lambda other: other["settings"].update(digest="11ff"), "their digest differ, '00ff' and '11ff'"),
    "numbers of images": (lambda other: other["settings"].update(images=32), "their images differ, 64 and 32"),
    "models": (lambda other: other.update(model="n"), "their model differ, 'm' and 'n'"),
    "float images": (lambda other: other["runs"][0]["figures"].update(frechet=figure(5.1)), "their float images' figures differ"),
}


@pytest.mark.parametrize(("change", "words"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_was_not_made_alike_is_not_compared(change, words):
    with pytest.raises(EvaluationError, match=f"results cannot be compared: {words}"):
        merge([make_results(QUARTZ), changed(change)])
    merge([make_results(QUARTZ), changed(lambda other: other["settings"].update(batch=8))])  # batches may differ


def test_runs_of_one_name_are_not_merged():
    with pytest.raises(EvaluationError, match="two results hold a run 'quartz-w4a4'"):
        merge([make_results(QUARTZ), make_results(QUARTZ)])


def layer(name, kept=False):
    return SimpleNamespace(name=name, spec=None if kept else "spec", reason="3-D convolutions are not supported")


def test_a_card_says_what_the_model_is_and_how_it_was_evaluated(tmp_path):
    layers = [layer("a"), layer("b", kept=True)]
    card = write_card(tmp_path, "someone/model", get_recipe("quartz-w4a4"), layers, 2_500_000, 10_000_000).read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nbase_model: someone/model\nbase_model_relation: quantized\n")
    for words in (
        "`quartz-w4a4`",
        "1 quantized, 1 kept in float",
        "2.50 MB instead of 10.00 MB in bf16 (0.250×)",
        "Not evaluated yet",
    ):
        assert words in card
    assert "`b` (3-D convolutions are not supported)" in card
    (tmp_path / "README.md").write_text(card + "\nwritten by hand\n")
    results = make_results(QUARTZ)
    for _ in range(2):
        text = add_evaluation(tmp_path, results).read_text()
    assert captioned_table(results) in text
    assert "64 images, 10 steps of DDIMScheduler, seed 0" in text
    assert "Not evaluated yet" not in text
    assert text.endswith("\nwritten by hand\n")
    assert text.count("halfbyte-quantized.png") == 1
    assert (tmp_path / "halfbyte-float.png").read_bytes().startswith(b"\x89PNG")


def test_other_peoples_cards_are_left_alone(tmp_path):
    assert add_evaluation(tmp_path, make_results(QUARTZ)) is None
    (tmp_path / "README.md").write_text("mine")
    assert add_evaluation(tmp_path, make_results(QUARTZ)) is None
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "base_model:" not in write_card(tmp_path, "folder", get_recipe("int8-w8a8"), [layer("a")], 1, 2).read_text()
