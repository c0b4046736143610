"""Sensitivity: damages against a model quantized by hand, budgets against brute force, and what a person gets to see."""

import contextlib
import copy
import itertools
import json
import random
import re

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import sensitivity as room
from halfbyte.errors import CheckpointError, HalfbyteError, ModelError
from halfbyte.evaluate import float_states, prediction_sqnr
from halfbyte.recipe import PRESETS, LayerSpec, Recipe, WeightSpec, get_recipe
from halfbyte.report.heatmap import decibel, heat, write_heatmap
from halfbyte.targets import family_of

LADDER = {"w4a4": room.LADDER["w4a4"], "w8a8": room.LADDER["w8a8"]}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=100))


@pytest.fixture(scope="module")
def found(pipe):
    stages = []
    measured = room.measure(pipe, LADDER, images=2, steps=3, progress=lambda *stage: stages.append(stage))
    assert stages[-1][1] == stages[-1][2] == len(stages) == 2 * (len(measured.layers) + len(measured.families))
    return measured


def test_the_damage_of_a_layer_is_that_of_a_model_with_only_it_quantized(pipe, found):
    states = float_states(pipe, 2, 3, 0, 3)
    assert found.timesteps == states.timesteps
    for layer in random.Random(0).sample(found.layers, 4):
        keep = tuple(f"^{re.escape(one.name)}$" for one in found.layers if one is not layer)
        student = copy.deepcopy(pipe.unet)
        hb.quantize(student, Recipe("one", LADDER["w4a4"], edge=LADDER["w4a4"], keep=keep))
        _, by_timestep = prediction_sqnr(student, states)
        expected = [decibel(damage) for damage in layer.damage["w4a4"]]
        assert [value for _, value in by_timestep] == pytest.approx(expected, abs=0.02)


def test_the_model_is_left_as_it_was(pipe, found):
    assert not any(hasattr(module, "spec") for module in pipe.unet.modules())
    assert [layer.name for layer in found.layers] == [
        name for name, module in pipe.unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with contextlib.suppress(KeyboardInterrupt), room.replaced(pipe.unet, {pipe.unet.conv_in: nn.Identity()}):
        assert isinstance(pipe.unet.conv_in, nn.Identity)
        raise KeyboardInterrupt
    assert isinstance(pipe.unet.conv_in, nn.Conv2d)


def test_families_cover_every_layer_once_and_hurt_more_than_their_parts(found):
    for family in found.families:
        parts = [layer for layer in found.layers if layer.family == family.name]
        assert family.weights == sum(layer.weights for layer in parts)
        assert family.operations == sum(layer.operations for layer in parts)
        assert family.total("w4a4") > 0.3 * max(layer.total("w4a4") for layer in parts)
    assert sum(family.weights for family in found.families) == sum(layer.weights for layer in found.layers)
    assert all(layer.total("w8a8") < layer.total("w4a4") for layer in found.layers)


def test_operations_are_those_of_the_model(found):
    layers = {layer.name: layer for layer in found.layers}
    assert layers["conv_in"].operations == 8 * 9 * 8 * 8
    assert layers["time_embedding.linear_1"].operations == layers["time_embedding.linear_1"].weights


def random_study(seed, widths=("w4a4", "w4a8", "w8a8"), count=5):
    draw = random.Random(seed)
    layers = [
        room.LayerDamage(
            f"l{index}", "linear", draw.randint(1, 50), draw.randint(1, 50),
            {width: [draw.random() * 2.0**-place] for place, width in enumerate(widths)},
        )
        for index in range(count)
    ]  # fmt: skip
    return room.Sensitivity("X", [1.0], {width: room.LADDER[width] for width in widths}, layers, [])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [(5.0, None), (6.5, 6.0), (8.0, 5.0)])
def test_a_budget_is_spent_as_well_as_brute_force_does(seed, limits):
    study = random_study(seed)
    names, best = [layer.name for layer in study.layers], {}
    for widths in itertools.product(study.ladder, repeat=len(names)):
        given = dict(zip(names, widths, strict=True))
        stored, seen = room.averages(study, given)
        if stored <= limits[0] + 1e-9 and (limits[1] is None or seen <= limits[1] + 1e-9):
            best[widths] = sum(layer.total(given[layer.name]) for layer in study.layers)
    spent = room.spend(study, *limits)
    assert sum(layer.total(spent[layer.name]) for layer in study.layers) == pytest.approx(min(best.values()), rel=1e-3)
    assert room.averages(study, spent)[0] <= limits[0] + 1e-6


@pytest.mark.parametrize(
    ("limits", "words"),
    [((3.0, None), "has 3 stored bits a weight; these widths reach 4.25 to 8"), ((5.0, 2.0), "has 2 bits an activation")],
)
def test_a_budget_that_cannot_be_met_says_what_can(limits, words):
    with pytest.raises(HalfbyteError, match=words):
        room.spend(random_study(0), *limits)


def test_simulated_widths_are_only_given_when_asked_for():
    study = random_study(1, ("w4a4", "w6a6", "w8a8"))
    for layer in study.layers:
        layer.damage["w6a6"] = [0.0]
    assert "w6a6" not in room.spend(study, 6.0).values()
    assert set(room.spend(study, 6.0, simulated=True).values()) == {"w6a6"}


def test_spending_beats_uniform_bits_of_the_same_size_on_the_demo_model():
    from halfbyte import demo

    pipe = demo.load_pipeline()
    study = room.measure(pipe, {width: room.LADDER[width] for width in ("w4a4", "w8a8")}, images=1, steps=4)
    plain = {layer.name: "w8a8" if layer.family == "edge" else "w4a4" for layer in study.layers}
    stored, seen = room.averages(study, plain)
    widths = room.spend(study, stored + 0.2, seen + 0.2)
    states, score = float_states(pipe, 4, 5, 3), {}
    for recipe in (PRESETS["quartz-w4a4"], room.to_recipe(study, widths, "spent")):
        student = copy.deepcopy(pipe.unet)
        hb.quantize(student, recipe)
        score[recipe.name] = prediction_sqnr(student, states)[0]
    assert score["spent"] > score["quartz-w4a4"] + 1


def test_the_recipe_gives_every_layer_its_width_and_survives_yaml(pipe, found, tmp_path):
    widths = room.spend(found, 5.5)
    assert set(widths.values()) == {"w4a4", "w8a8"}
    (tmp_path / "recipe.yaml").write_text(room.to_recipe(found, widths, "mine").to_yaml())
    recipe = get_recipe(tmp_path / "recipe.yaml")
    assert recipe == room.to_recipe(found, widths, "mine")
    result = hb.quantize(copy.deepcopy(pipe.unet), recipe)
    assert {layer.name: layer.spec for layer in result.layers} == {name: LADDER[width] for name, width in widths.items()}


def test_a_study_is_saved_and_broken_ones_are_refused(found, tmp_path):
    found.save(tmp_path / "study.json")
    assert room.Sensitivity.load(tmp_path / "study.json") == found
    data = json.loads((tmp_path / "study.json").read_text())
    for change in ({"layers": 3}, {"ladder": {"w4a4": 1}}, {"timesteps": None}, {"layers": [{}]}):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(HalfbyteError, match=r"bad\.json is no result of 'halfbyte sensitivity'"):
            room.Sensitivity.load(tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        room.Sensitivity.load(tmp_path / "nowhere.json")


def test_specs_that_need_calibration_are_refused(pipe):
    with pytest.raises(ModelError, match="w4a4, int4 x float, needs calibration"):
        room.measure(pipe, {"w4a4": LayerSpec(WeightSpec("int4", rounding="gptq"))})


def test_the_page_shows_every_layer_at_every_width_and_timestep(found, tmp_path):
    write_heatmap(found, tmp_path / "page.html", room.spend(found, 5.5))
    page = (tmp_path / "page.html").read_text()
    assert page.count("--heat:") == 2 * 3 * (len(found.layers) + len(found.families))
    assert all(page.count(f'<th scope="row"><span>{layer.name}</span>') == 2 for layer in found.layers)
    stored, seen = room.averages(found, room.spend(found, 5.5))
    assert f"{stored:.2f} stored bits a weight and {seen:.2f} bits an activation" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (heat(1.0), heat(10**-5.1), heat(0.0)) == (85, 0, 0)


NAMES = {
    "down_blocks.0.resnets.0.time_emb_proj": "time embedding",
    "time_embedding.linear_1": "time embedding",
    "transformer_blocks.0.norm1.linear": "time embedding",
    "mid_block.attentions.0.to_q": "attention input",
    "transformer_blocks.0.attn.add_k_proj": "attention input",
    "text_model.encoder.layers.0.self_attn.q_proj": "attention input",
    "mid_block.attentions.0.to_out.0": "attention output",
    "transformer_blocks.0.ff.net.0.proj": "feed-forward",
    "transformer_blocks.0.ff_context.net.2": "feed-forward",
    "single_transformer_blocks.0.proj_mlp": "feed-forward",
    "up_blocks.0.resnets.0.conv_shortcut": "shortcut",
    "down_blocks.0.downsamplers.0.conv": "resampling",
    "down_blocks.0.resnets.0.conv1": "convolution",
}


@pytest.mark.parametrize("name", NAMES)
def test_families_are_known_by_name(name):
    assert family_of(name, nn.Conv2d(1, 1, 1)) == NAMES[name]
    assert family_of("something", nn.Linear(1, 1)) == "linear"
