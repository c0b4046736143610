"""Sensitivity: damages against a model quantized by hand, and what is kept of them."""

import contextlib
import copy
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
from halfbyte.recipe import LayerSpec, Recipe, WeightSpec
from halfbyte.report.heatmap import decibel
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
        assert family.channels == sum(layer.channels for layer in parts)
        assert family.operations == sum(layer.operations for layer in parts)
        assert family.total("w4a4") > 0.3 * max(layer.total("w4a4") for layer in parts)
    assert sum(family.weights for family in found.families) == sum(layer.weights for layer in found.layers)
    assert all(layer.total("w8a8") < layer.total("w4a4") for layer in found.layers)


def test_operations_are_those_of_the_model(found):
    layers = {layer.name: layer for layer in found.layers}
    assert layers["conv_in"].operations == 8 * 9 * 8 * 8
    assert layers["time_embedding.linear_1"].operations == layers["time_embedding.linear_1"].weights


def test_a_study_is_saved_and_broken_ones_are_refused(found, tmp_path):
    found.save(tmp_path / "study.json")
    assert room.Sensitivity.load(tmp_path / "study.json") == found
    data = json.loads((tmp_path / "study.json").read_text())
    row = data["layers"][0]
    changes = [{"layers": 3}, {"ladder": {"w4a4": 1}}, {"timesteps": None}, {"layers": [{}]}]
    changes += [{"ladder": {}}, {"layers": []}, {"families": []}, {"timesteps": ["late", 1, 0]}, {"timesteps": [True, 1, 0]}]
    fields = ({"name": 3}, {"family": None}, {"weights": "many"}, {"channels": 1.5}, {"operations": True}, {"damage": {}})
    changes += [{"layers": [row | field]} for field in fields]
    for values in ([0.1], ["a", 0.1, 0.1], [-0.1, 0.1, 0.1], [None, 0.1, 0.1], 3):  # of three timesteps
        changes.append({"families": [row | {"damage": row["damage"] | {"w8a8": values}}]})
    for change in changes:
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(HalfbyteError, match=r"bad\.json is no result of 'halfbyte sensitivity'"):
            room.Sensitivity.load(tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        room.Sensitivity.load(tmp_path / "nowhere.json")


def test_specs_that_need_calibration_are_refused(pipe):
    with pytest.raises(ModelError, match="w4a4, int4 x float, needs calibration"):
        room.measure(pipe, {"w4a4": LayerSpec(WeightSpec("int4", rounding="gptq"))})


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
