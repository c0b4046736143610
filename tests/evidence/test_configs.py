"""The ready tables: each is read whole, fits its pipeline's class, and runs on a tiny stand-in of it."""

import dataclasses
import inspect
from pathlib import Path

import diffusers
import pytest

from halfbyte.errors import EvaluationError, HalfbyteError
from halfbyte.evidence.command import make_table
from halfbyte.evidence.config import RunConfig, parse_config, read_config
from halfbyte.report.figures import KINDS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = {  # what tiny pipelines cannot do: resolutions of their big originals, and long instructions
    "PixArtSigmaPipeline": {"use_resolution_binning": False},
    "SanaPipeline": {"use_resolution_binning": False, "complex_human_instruction": None, "height": 32, "width": 32},
    "FluxPipeline": {"max_sequence_length": 8},
}
ONE_OF_EACH = {read_config(path).pipeline: path for path in reversed(CONFIGS)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_table_fits_its_pipeline(path):
    config = read_config(path)
    call = inspect.signature(getattr(diffusers, config.pipeline).__call__).parameters
    assert set(config.arguments) <= set(call)
    assert ("prompt" in call) == (config.prompts is not None) == (config.calibration_prompts is not None)
    if config.sampler:
        assert hasattr(diffusers, config.sampler["class"])
    published = [one for part in (config, *config.runs) for one in part.published]
    assert {one["figure"] for one in published} <= set(KINDS)
    assert config.features in ("inception", "demo")
    assert path.read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, about tiny models
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_every_class_runs_on_a_stand_in(stand_in, tmp_path, kind):
    (tmp_path / "prompts.txt").write_text("a b\nb\n")
    config = read_config(ONE_OF_EACH[kind])
    prompts = None if config.prompts is None else str(tmp_path / "prompts.txt")
    small = dataclasses.replace(
        config,
        images=3,
        steps=2,
        batch=2,
        arguments={**config.arguments, **TINY.get(kind, {})},
        prompts=prompts,
        calibration_prompts=prompts,
        features=None,
        reference=None,
        lpips=None,
        clip=None,
        image_reward=False,
        calibration=2,
        calibration_steps=1,
        runs=[RunConfig(recipe="quartz-w4a4"), RunConfig(recipe="nvfp4-w4a4")],
    )
    found = make_table(small, tmp_path / "out", pipe=stand_in(kind))
    first, packed, simulated = found["runs"]
    assert first["recipe"] == "float"
    assert 0 < packed["sqnr"] < 40
    assert 5 < packed["figures"]["psnr"]["value"] < 60
    assert packed["seconds_per_image"] > 0
    assert simulated["seconds_per_image"] is None
    assert 4 < simulated["bits"] < 6
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    assert found["settings"]["sampler"] == config.sampler.get("class", found["settings"]["sampler"])


GOOD = {"model": "demo", "title": "x", "images": 4, "steps": 2, "runs": ["int8-w8a8"]}
WRONG = {
    "no mapping": ([], "table must be a mapping, got list"),
    "no runs": ({**GOOD, "runs": []}, "table.runs must be a list of at least one run"),
    "an unknown key": ({**GOOD, "image": 3}, "table has no key 'image'; its keys are"),
    "a missing key": ({key: value for key, value in GOOD.items() if key != "model"}, "table has no 'model'"),
    "a wrong type": ({**GOOD, "images": "many"}, "table.images must be a whole number, got str 'many'"),
    "an unknown recipe": ({**GOOD, "runs": ["int3"]}, "unknown recipe 'int3'"),
    "a rank of nothing": ({**GOOD, "runs": [{"recipe": "int4-w4a4", "rank": 2}]}, "of a recipe with a 16-bit branch; got 2 for"),
    "an unknown key of a run": ({**GOOD, "runs": [{"recipe": "int8-w8a8", "bits": 4}]}, r"runs\[0\] has no key 'bits'"),
    "a recipe and a folder": ({**GOOD, "runs": [{"recipe": "int8-w8a8", "folder": "x"}]}, "needs a recipe or a folder"),
    "the same run twice": ({**GOOD, "runs": ["int8-w8a8", "int8-w8a8"]}, "several runs called 'int8-w8a8'; give them names"),
    "a healing option of the table's": (
        {**GOOD, "runs": [{"recipe": "int8-w8a8", "heal": {"prompts": ["a"]}}]},
        r"runs\[0\].heal must not have 'prompts': the table's own",
    ),
    "an unknown healing option": (
        {**GOOD, "runs": [{"recipe": "int8-w8a8", "heal": {"stesp": 3}}]},
        r"runs\[0\].heal: heal has no option 'stesp' for lora",
    ),
    "another loss": (
        {**GOOD, "runs": [{"recipe": "int8-w8a8", "heal": {"dfa": "mse"}}]},
        "dfa must be one of .*'step'.*, got 'mse'",
    ),
    "a list for a method": (
        {**GOOD, "runs": [{"recipe": "int8-w8a8", "name": "a", "heal": {"method": ["lora"]}}]},
        "unknown method",
    ),
    "words for a number": (
        {**GOOD, "runs": [{"recipe": "int8-w8a8", "heal": {"steps": "many"}}]},
        r"heal: steps must be .*, got str 'many'",
    ),
    "half a published figure": ({**GOOD, "published": [{"figure": "frechet"}]}, r"published\[0\] has no 'source', 'value'"),
}


@pytest.mark.parametrize(("data", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(data, words):
    with pytest.raises(HalfbyteError, match=words):
        parse_config(data)


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    for name in ("bad.yaml", "missing.yaml"):
        with pytest.raises(EvaluationError, match="cannot be read as YAML"):
            read_config(tmp_path / name)


def test_runs_are_named_by_what_they_are():
    runs = [
        "quartz-w4a4",
        {"recipe": "quartz-w4a4", "gptq": True},
        {"recipe": "quartz-w4a4", "attention": True},
        {"recipe": "svdquant-w4a4", "rank": 2},
        {"recipe": "quartz-w4a4", "heal": {"steps": 3}},
        {"folder": "a/b"},
    ]
    titles = [run.title for run in parse_config({**GOOD, "runs": runs}).runs]
    assert titles == ["quartz-w4a4", "quartz-w4a4+gptq", "quartz-w4a4+attention", "svdquant-w4a4-rank2", "quartz-w4a4+lora", "b"]
