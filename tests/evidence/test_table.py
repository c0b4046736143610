"""Tables: what is done is kept under all that it depends on, and taken from there; what does not fit is refused."""

import pytest
import torch

import halfbyte as hb
from halfbyte.conversion import packed_layers
from halfbyte.errors import EvaluationError, SamplerError
from halfbyte.evidence.command import make_table
from halfbyte.evidence.config import parse_config
from halfbyte.evidence.table import copied
from halfbyte.report import load_results
from halfbyte.report.markdown import markdown_table, marked

DATA = {"model": "given", "title": "tiny", "images": 3, "steps": 2, "batch": 2, "calibration": 2, "calibration_steps": 1}


def table(runs, **changes):
    return parse_config({**DATA, "runs": runs, **changes})


def names(folder):
    return sorted(path.name.rpartition("-")[0] for path in (folder / "runs").iterdir())


def test_runs_are_kept_and_taken_again(pipe, tmp_path):
    out, stages = tmp_path / "out", []
    file = tmp_path / "README.md"
    file.write_text(marked("results", "old"))
    first = make_table(table(["quartz-w4a4"]), out, file, pipe=pipe)
    assert names(out) == ["float", "quartz-w4a4"]
    assert markdown_table(first) in file.read_text()
    assert (out / "table.md").read_text() == markdown_table(first) + "\n"
    assert load_results(out / "results.json") == first
    nvfp4 = {"recipe": "nvfp4-w4a4", "published": [{"figure": "psnr", "value": 30, "source": "X"}]}
    longer = table(["quartz-w4a4", nvfp4], title="other")
    second = make_table(longer, out, report=lambda *stage: stages.append(stage[0]), pipe=pipe)
    assert [run["recipe"] for run in second["runs"]] == ["float", "quartz-w4a4", "nvfp4-w4a4"]
    assert second["runs"][:2] == first["runs"]
    assert second["runs"][2]["published"][0]["source"] == "X"
    assert "sampling nvfp4-w4a4" in stages
    assert "sampling quartz-w4a4" not in stages
    assert not packed_layers(pipe.unet)  # the float pipeline stays as it came


CHANGES = {
    "steps": {"steps": 3},
    "seed": {"seed": 5},
    "images": {"images": 4},
    "the pipeline's arguments": {"arguments": {"eta": 0.5}},
    "the sampler": {"sampler": {"class": "DDIMScheduler", "timestep_spacing": "trailing"}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_what_depends_on_something_else_is_made_anew(pipe, tmp_path, changes):
    plain = make_table(table(["int8-w8a8"]), tmp_path, pipe=pipe)
    made = make_table(table(["int8-w8a8"], **changes), tmp_path, pipe=pipe)
    assert len(names(tmp_path)) == 4
    assert made["runs"][1]["figures"] != plain["runs"][1]["figures"]


def test_the_pipelines_arguments_hold_for_calibrating_and_healing_too(pipe, tmp_path, etas):
    heal = {"recipe": "int4-w4a4", "gptq": True, "heal": {"steps": 2, "batch": 2, "sampler_steps": 2, "rank": 2}}
    make_table(table([heal], arguments={"eta": 0.5}), tmp_path, pipe=pipe)
    assert len(etas) > 6  # two models' images in two batches each, states, calibration, trajectories
    assert {*etas} == {0.5}


def test_a_model_with_other_weights_is_another_model(pipe, tmp_path):
    make_table(table(["int8-w8a8"]), tmp_path, pipe=pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.1)
    make_table(table(["int8-w8a8"]), tmp_path, pipe=pipe)
    assert len(names(tmp_path)) == 4


def test_folders_and_healed_recipes_stand_beside_recipes(pipe, tmp_path):
    student = copied(pipe)
    hb.quantize(student, "int4-w4a4")
    hb.save(student, tmp_path / "mine")
    heal = {"recipe": "int4-w4a4", "name": "healed", "heal": {"steps": 2, "batch": 2, "sampler_steps": 2, "rank": 2}}
    found = make_table(table([{"folder": str(tmp_path / "mine")}, "int4-w4a4", heal]), tmp_path / "out", pipe=pipe)
    _, folder, recipe, healed = found["runs"]
    assert (folder["recipe"], healed["recipe"]) == ("mine", "healed")
    assert folder["figures"] == recipe["figures"]
    assert folder["sqnr"] == recipe["sqnr"]
    assert healed["figures"] != recipe["figures"]
    assert healed["seconds_per_image"] is not None


def test_what_does_not_fit_is_refused(pipe, tmp_path):
    cases = [
        (table(["int8-w8a8"], pipeline="DiTPipeline"), EvaluationError, "this table is for a DiTPipeline, the model is a DDIMPip"),
        (table(["int8-w8a8"], sampler={"class": "Nothing"}), EvaluationError, "diffusers has no sampler 'Nothing'"),
        (table(["int8-w8a8"], prompts="missing.txt"), EvaluationError, "cannot be read as a list of prompts"),
        (table(["int8-w8a8"], arguments={"guidance": 2}), SamplerError, "DDIMPipeline takes no argument 'guidance'"),
    ]
    for config, error, words in cases:
        with pytest.raises(error, match=words):
            make_table(config, tmp_path / "out", pipe=pipe)
    (tmp_path / "prompts.txt").write_text("a b\n")
    with pytest.raises(EvaluationError, match="need calibration_prompts: others than those they are judged by"):
        make_table(table(["msfp-w4a4"], prompts=str(tmp_path / "prompts.txt")), tmp_path / "out", pipe=pipe)
