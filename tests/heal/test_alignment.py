"""QuEST's two stages: what is chosen within the share, how they follow each other, stop, continue, and fail."""

import copy
import json
import os
import signal

import pytest
import torch

import halfbyte as hb
from halfbyte.calibration import record_calls
from halfbyte.errors import DivergedError, HealError, ResumeError, StoppedError
from halfbyte.evaluate import float_states, prediction_sqnr, sample_images
from halfbyte.heal.alignment import SelectiveSettings, plan
from halfbyte.heal.selective import Selective, SelectiveLayer, quantized_layers
from halfbyte.heal.settings import Settings
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

TIMED = Recipe("timed", LayerSpec(WeightSpec("int4"), ActivationSpec("int4", scale="timestep")))
TINY = {"method": "quest", "steps": 6, "batch": 4, "sampler_steps": 4, "reuse": 1.0, "log_every": 1, "warmup": 1}
MADE = {}


@pytest.fixture
def student(pipe):
    """The tiny pipeline, quantized with scales for each of four timesteps."""
    made = copy.copy(pipe)
    if not MADE:
        made.register_modules(unet=copy.deepcopy(pipe.unet))
        hb.quantize(made, TIMED, calibration=4, steps=4, simulate=True)
        MADE["unet"] = made.unet
    made.register_modules(unet=copy.deepcopy(MADE["unet"]))
    return made


def planned(student, pipe, **options):
    settings = Settings(steps=6, batch=4, sampler_steps=4)
    return plan(student.unet, pipe, settings, SelectiveSettings(**options), record_calls(pipe, 1, 4))


def count(student, names):
    return sum(p.numel() for name in names for p in student.unet.get_submodule(name).parameters())


def test_the_stages_share_the_parameters(student, pipe):
    layers, total = quantized_layers(student.unet), sum(p.numel() for p in pipe.unet.parameters())
    times = {name for name in layers if "time_emb" in name}
    temporal, critical = planned(student, pipe, share=0.6)
    assert set(temporal.weights) == set(temporal.scales) == times
    assert critical.weights
    assert not times & {*critical.weights, *critical.scales}
    assert set(critical.scales) == {name for name, layer in layers.items() if layer.activation_scale is not None} - times
    assert count(student, {*temporal.weights, *critical.weights}) <= 0.6 * total
    (whole,) = planned(student, pipe, stages="full")
    assert set(whole.weights) == set(layers)
    assert planned(student, pipe, share=0.6) == [temporal, critical]


def test_a_time_embedding_too_large_for_the_share_is_cut(student, pipe):
    total = sum(p.numel() for p in pipe.unet.parameters())
    temporal, critical = planned(student, pipe, share=0.06)
    assert 0 < count(student, temporal.weights) <= 0.015 * total
    assert count(student, critical.weights) > 0
    assert count(student, {*temporal.weights, *critical.weights}) <= 0.06 * total
    assert len(temporal.scales) > len(temporal.weights)
    assert [stage.weights for stage in planned(student, pipe, share=0)] == [(), ()]


def test_healing_brings_the_student_closer_to_its_teacher(student, pipe):
    states = float_states(pipe, 8, 10, seed=5)
    before = prediction_sqnr(student.unet, states)[0]
    result = hb.heal(student, pipe, **{**TINY, "steps": 40, "batch": 8})
    assert prediction_sqnr(student.unet, states)[0] > before + 0.3
    assert result.model is student.unet
    assert result.share <= 0.07
    assert list(result.trained) == ["temporal", "critical"]
    assert result.choice == {}
    assert result.gamma.shape == (4,)
    assert result.settings["dfa"] == "step"
    assert 0 < result.error < result.error_before
    assert result.stored_bytes == result.stored_before
    assert result.peak_bytes > 1e7
    assert [row["step"] for row in result.log] == list(range(1, 41))
    assert [row["stage"] for row in result.log] == ["temporal"] * 4 + ["critical"] * 36
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(result.log, result.log[1:], strict=False))
    assert json.loads(json.dumps(result.to_dict()))["trained"]["critical"]["weights"]
    assert not any(isinstance(layer, SelectiveLayer) for layer in student.unet.modules())
    hb.pack(student.unet)
    for steps in (3, 4, 11):  # calibrated at four timesteps: any number of steps works
        assert sample_images(student, 2, steps).isfinite().all()


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"stages": "temporal", "global_weight": 0}, ["temporal"]),
        ({"stages": ("critical",), "local_weight": 0}, ["critical"]),
        ({"stages": ["full"]}, ["full"]),
        ({"share": 0}, ["temporal", "critical"]),
        ({"scale_rate": 0}, ["temporal", "critical"]),
        ({"affine": False}, ["temporal", "critical"]),
    ],
)
def test_ablations(student, pipe, options, stages):
    before = {name: value.clone() for name, value in student.unet.state_dict().items()}
    result = hb.heal(student, pipe, **TINY, **options)
    changed = {name for name, value in student.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert list(result.trained) == stages
    norms, biases = ({name for name in changed if part in name} for part in ("norm", ".bias"))
    assert any(name.endswith("weight") for name in changed - norms) == (options.get("share") != 0)
    assert bool(norms) == ("affine" not in options and stages != ["temporal"])
    assert (len(biases) > 40) == bool(norms)
    assert any(name.endswith("activation_scale") for name in changed) == (options.get("scale_rate") != 0)
    assert (result.share > 0.5) == (stages == ["full"])
    assert any("time_emb" in name for name in changed - biases) == (stages != ["critical"])


def test_static_and_dynamic_scales(pipe):
    for scale, trained in (("static", True), ("dynamic", False)):
        made = copy.copy(pipe)
        made.register_modules(unet=copy.deepcopy(pipe.unet))
        recipe = Recipe(scale, LayerSpec(WeightSpec("int4"), ActivationSpec("int4", scale=scale)))
        hb.quantize(made, recipe, calibration=2 if trained else None, steps=2, simulate=True)
        result = hb.heal(made, pipe, **TINY)
        assert any(stage["scales"] for stage in result.trained.values()) == trained
        assert all(stage["weights"] for stage in result.trained.values())


def equal(one, other):
    ours, theirs = one.unet.state_dict(), other.unet.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("stop", [1, 4])  # in the first stage, and in the second
def test_the_same_call_with_resume_goes_on_after_a_stop(student, pipe, tmp_path, stop):
    whole, before, seen = copy.deepcopy(student), copy.deepcopy(student), []
    expected = hb.heal(whole, pipe, **TINY, ema=0.9, accumulate=2)

    def progress(stage, done, total):
        seen.append(done)
        if len(seen) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        hb.heal(student, pipe, **TINY, ema=0.9, accumulate=2, output=tmp_path, progress=progress)
    assert equal(student, before)
    result = hb.heal(student, pipe, **TINY, ema=0.9, accumulate=2, output=tmp_path, resume=True)
    assert equal(student, whole)
    assert [row["loss"] for row in result.log] == [row["loss"] for row in expected.log]
    with pytest.raises(ResumeError, match=r"its method\.global_weight is 2\.0, this run's is 1\.0"):
        hb.heal(before, pipe, **TINY, ema=0.9, accumulate=2, global_weight=1.0, output=tmp_path, resume=True)
    with pytest.raises(ResumeError, match=r"its method\.share is 0\.07, this run's is 0\.01"):
        hb.heal(before, pipe, **TINY, ema=0.9, accumulate=2, share=0.01, output=tmp_path, resume=True)


def test_a_student_that_diverges_keeps_the_last_good_state(student, pipe, monkeypatch):
    real = Selective.loss

    def exploding(self, model, batch):
        return real(self, model, batch) * (torch.nan if self.stage.name == "critical" else 1.0)

    monkeypatch.setattr(Selective, "loss", exploding)
    before = copy.deepcopy(student)
    with pytest.raises(DivergedError, match="loss became nan at step 0"):
        hb.heal(student, pipe, **TINY)
    assert not equal(student, before), "what the first stage learned is lost"
    assert all(value.isfinite().all() for value in student.unet.state_dict().values())
    assert not any(isinstance(layer, SelectiveLayer) for layer in student.unet.modules())


class Overflow:
    """A hook that makes the input of a layer infinite in training, from an optimizer step on."""

    def __init__(self, step):
        self.calls, self.step = 0, step

    def __call__(self, layer, args):
        self.calls += torch.is_grad_enabled()
        return (args[0] * torch.inf,) if self.calls > self.step else None


def test_nan_names_layer_and_timestep(student, pipe):
    layer = "mid_block.resnets.0.conv1"
    student.unet.get_submodule(layer).register_forward_pre_hook(Overflow(TINY["batch"] * 2))
    with pytest.raises(DivergedError, match=rf"come out of layer '{layer}', at timestep \d+\. The student is back at step \d"):
        hb.heal(student, pipe, **TINY)
    assert all(value.isfinite().all() for value in student.unet.state_dict().values())


def test_the_folder_of_another_recipe_or_model_is_not_continued(student, pipe, tmp_path):
    hb.heal(student, pipe, **TINY, output=tmp_path)
    other, recipe = copy.copy(pipe), TIMED.replace(name="other")
    other.register_modules(unet=copy.deepcopy(pipe.unet))
    hb.quantize(other, recipe, calibration=4, steps=4, simulate=True)
    with pytest.raises(ResumeError, match=r'its recipe\.name is "timed", this run\'s is "other"'):
        hb.heal(other, pipe, **TINY, output=tmp_path, resume=True)
    changed = copy.copy(pipe)
    changed.register_modules(unet=copy.deepcopy(pipe.unet))
    student.register_modules(unet=copy.deepcopy(MADE["unet"]))
    with torch.no_grad():
        changed.unet.conv_in.bias += 1
    with pytest.raises(ResumeError, match=r"its teacher is .*, this run's is "):
        hb.heal(student, changed, **TINY, output=tmp_path, resume=True)


def test_a_teacher_of_another_shape_is_refused(student, pipe, build):
    config = {**build("UNet2DModel").config, "block_out_channels": (32, 32)}
    wider = type(pipe)(type(pipe.unet).from_config(config), pipe.scheduler)
    with pytest.raises(HealError, match=r"student and teacher differ: conv_in\.weight is 16x1x3x3 in the student and 32x1x3x3"):
        hb.heal(student, wider, **TINY)


def test_recomputed_activations_and_bf16(student, pipe):
    exact, rough = copy.deepcopy(student), copy.deepcopy(student)
    expected = hb.heal(exact, pipe, **TINY)
    found = hb.heal(student, pipe, **TINY, recompute=True)
    assert [row["loss"] for row in found.log] == pytest.approx([row["loss"] for row in expected.log], rel=1e-4)
    low = hb.heal(rough, pipe, **TINY, bf16=True)
    assert low.log[0]["loss"] == pytest.approx(expected.log[0]["loss"], rel=0.3)
    assert low.log[0]["loss"] != expected.log[0]["loss"]


def broken(student, **changes):
    made = copy.deepcopy(student)
    layer = made.unet.get_submodule("mid_block.resnets.0.conv1")
    for name, value in changes.items():
        setattr(layer, name, value)
    return made


def test_refusals(student, pipe):
    name = "mid_block.resnets.0.conv1"
    for made, options, words in [
        (broken(student, activation_scale=None), {}, f"the timestep input scales of {name} need 4 entries, found none"),
        (broken(student, activation_scale=torch.ones(3)), {}, f"the timestep input scales of {name} need 4 entries, found 3"),
        (
            broken(student, timestep=None),
            {},
            f"{name} need an entry for each calibrated timestep, and no timestep is known, found 4",
        ),
        (student, {"stages": "all"}, "stages must be one or several of 'critical', 'full', 'temporal', got 'all'"),
        (student, {"stages": ()}, "got none"),
        (student, {"stages": ["critical", "full"]}, "the stage 'full' trains all there is; give it alone"),
        (student, {"share": 1.5}, "share must be 0 to 1, got 1.5"),
        (student, {"share": 0, "scale_rate": 0}, "the stage 'temporal' has nothing to train"),
        (student, {"share": 0, "global_weight": 0}, "the stage 'temporal' trains no weights, so it has no local loss"),
        (student, {"dfa": "flow"}, "form 'ddpm' or 'ddim', got 'flow'"),
        (student, {"dfa": "next"}, "dfa must be one of 'auto', 'ddim', 'ddpm', 'flow', 'off', 'step', got 'next'"),
        (student, {"rank": 4}, "heal has no option 'rank' for quest"),
        (student, {"global_weight": -1}, "global_weight must be >= 0"),
    ]:
        with pytest.raises(HealError) as caught:
            hb.heal(made, pipe, **{**TINY, **options})
        assert words in str(caught.value)
