"""`halfbyte.heal` and the command: from quantized to healed, packed, saved, loaded in a new process; and every bad input."""

import copy
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel

import halfbyte as hb
from halfbyte import api, cli
from halfbyte.errors import HealError, SamplerError, StoppedError
from halfbyte.evaluate import float_states, prediction_sqnr, sample_images
from halfbyte.heal.student import load_student
from halfbyte.layers import FakeQuant

TINY = {"method": "talora", "steps": 6, "batch": 4, "sampler_steps": 4, "reuse": 1.0, "rank": 4}
FAST = ("--method", "talora", "--steps", 6, "--batch", 4, "--sampler-steps", 4, "--rank", 4)


def run(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SIMULATED = {}  # recipe -> the simulated tiny UNet; searching grids takes seconds


def simulated(pipe, recipe="msfp-w4a4"):
    """A student of the tiny pipeline: every call gives a fresh copy."""
    student = copy.copy(pipe)
    if recipe not in SIMULATED:
        student.register_modules(unet=copy.deepcopy(pipe.unet))
        hb.quantize(student, recipe, calibration=4, steps=4, simulate=True)
        SIMULATED[recipe] = student.unet
    student.register_modules(unet=copy.deepcopy(SIMULATED[recipe]))
    return student


@pytest.mark.parametrize(("method", "recipe"), [("lora", "msfp-w4a4"), ("quest", "quest-w4a4")])
def test_every_trajectory_is_sampled_with_the_arguments_given(pipe, etas, method, recipe):
    student = simulated(pipe, recipe)
    etas.clear()
    hb.heal(student, pipe, method, arguments={"eta": 0.5}, steps=2, batch=2, sampler_steps=2)
    assert len(etas) > 2
    assert {*etas} == {0.5}
    with pytest.raises(SamplerError, match="DDIMPipeline takes no argument 'guidance_scale'"):
        hb.heal(simulated(pipe, recipe), pipe, method, arguments={"guidance_scale": 2.0}, steps=2, batch=2)


def test_healing_brings_the_student_closer_to_its_teacher(pipe):
    student, plain = simulated(pipe, "msfp-w4a4"), simulated(pipe, "msfp-w4a4")
    states = float_states(pipe, 8, 10, seed=5)
    result = hb.heal(student, pipe, **{**TINY, "steps": 40, "batch": 8}, learning_rate=5e-3)
    assert prediction_sqnr(student.unet, states)[0] > prediction_sqnr(plain.unet, states)[0] + 0.1
    assert result.model is student.unet
    assert [row["step"] for row in result.log] == [10, 20, 30, 40]
    assert result.settings["dfa"] == "step"
    assert result.error > 0
    assert float(result.gamma[[0, 250, 500, 750]].mean()) == pytest.approx(1)  # the four timesteps of its trajectories
    assert set(result.choice) == {n for n, m in student.unet.named_modules() if isinstance(m, FakeQuant) and "conv_" not in n[:5]}
    assert all(choice.shape == (1000,) and choice.dtype == torch.uint8 for choice in result.choice.values())
    several = [m for m in student.unet.modules() if isinstance(m, FakeQuant) and m.spec.weight.sets == 2]
    assert len(several) > 10
    assert result.stored_before < result.stored_bytes < 3 * result.stored_before
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"routing": "split", "loras": 3}, {"dfa": "off"}, {"dfa": "ddim", "ema": 0.9}]
)
def test_ablations(pipe, options):
    student = simulated(pipe)
    result = hb.heal(student, pipe, **{**TINY, **options})
    sets = {len(choice.unique()) for choice in result.choice.values()}
    assert sets == {"lora": {1}}.get(options.get("method"), {3} if "loras" in options else sets)
    if "loras" in options:
        assert all(choice[::400].tolist() == [0, 1, 2] for choice in result.choice.values())
    assert (result.gamma is None) == (options.get("dfa") == "off")


def test_packed_saved_and_loaded_the_healed_model_samples_the_same_in_every_sampler(pipe, tmp_path):
    student = simulated(pipe)
    hb.heal(student, pipe, **TINY)
    levels = {
        (name, number): layer.quantized_weight(number).codes()
        for name, layer in student.unet.named_modules()
        if isinstance(layer, FakeQuant)
        for number in range(layer.spec.weight.sets)
    }
    hb.pack(student.unet)
    hb.save(student, tmp_path / "healed")
    script = (
        "import sys, numpy, torch, halfbyte, diffusers; torch.set_num_threads(1);"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "from halfbyte.evaluate import sample_images;"
        "numpy.save(sys.argv[2], sample_images(pipe, 2, 5, 3).numpy())"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "healed", tmp_path / "images.npy"], check=True, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "images.npy"), sample_images(student, 2, 5, 3).numpy())
    loaded = hb.load(tmp_path / "healed")
    from halfbyte.formats import get_grid, levels_to_codes

    for (name, number), codes in levels.items():
        layer = loaded.unet.get_submodule(name)
        assert torch.equal(levels_to_codes(layer.levels(number), get_grid(layer.spec.weight.grid)), codes), name


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # DPM-Solver of diffusers with numpy 2
@pytest.mark.parametrize(
    ("kind", "steps"), [(DDIMScheduler, 10), (DDIMScheduler, 20), (DDIMScheduler, 50), (DPMSolverMultistepScheduler, 8)]
)
def test_any_sampler_and_number_of_steps_works_after_healing(healed, kind, steps):
    """Every call uses the weight set of its timestep, wherever the sampler puts it."""
    unet, choice = healed
    scheduler, sample = kind(), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    layer = unet.mid_block.resnets[0].conv1
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(unet(sample, timestep).sample, timestep, sample).prev_sample
            assert layer.chosen_set() == choice["mid_block.resnets.0.conv1"][int(timestep)]
    assert sample.isfinite().all()


@pytest.fixture(scope="module")
def healed():
    """A packed healed denoiser whose layers switch weights at timestep 500, and its choices."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(32,), layers_per_block=1
    )
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler())
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    hb.quantize(student, "int4-w4a4", simulate=True)
    result = hb.heal(student, pipe, **TINY)
    return hb.pack(student.unet), result.choice


def test_the_same_call_with_resume_goes_on_after_a_stop(pipe, tmp_path):
    whole, student, before = simulated(pipe, "int4-w4a4"), simulated(pipe, "int4-w4a4"), []
    hb.heal(whole, pipe, **TINY)

    def stop(stage, done, total):
        if not before:
            before.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        hb.heal(student, pipe, **TINY, output=tmp_path, progress=stop)
    assert not any("lora" in name for name, _ in student.unet.named_parameters())
    hb.heal(student, pipe, **TINY, output=tmp_path, resume=True)
    expected, found = whole.unet.state_dict(), student.unet.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def other_pipe(build, **changes):
    config = {**build("UNet2DModel").config, **changes}
    return DDIMPipeline(UNet2DModel.from_config(config), DDIMScheduler())


def test_refusals(pipe, build):
    student = simulated(pipe, "int4-w4a4")
    wider = other_pipe(build, block_out_channels=(32, 32))
    for arguments, options, words in [
        ((student, wider), {}, "student and teacher differ: conv_in.weight is 16x1x3x3 in the student and 32x1x3x3 in the teacher"),
        ((student, student), {}, "the teacher is a quantized UNet2DModel; healing learns from the float model"),
        ((student, pipe.unet), {}, "the teacher is a UNet2DModel; healing needs its whole pipeline"),
        ((pipe, pipe), {}, "no trainable quantized layers"),
        ((simulated(pipe, "int8-w8a8"), pipe), {}, "none of the 51 quantized layers has weights of fewer than 8 bits"),
        ((student, pipe), {"method": "magic"}, "unknown method 'magic'; the methods are 'lora', 'quest', 'talora'"),
        ((student, pipe), {"momentum": 1}, "heal has no option 'momentum' for talora; its options are 'accumulate', "),
        ((student, pipe), {"share": 0.1}, "heal has no option 'share' for talora"),
        ((student, pipe), {"dfa": "flow"}, "DDIMScheduler needs denoising factors of the form 'ddpm' or 'ddim', got 'flow'"),
        ((student, pipe), {"rank": 0}, "rank must be"),
        ((student, pipe), {"method": "lora", "loras": 2}, "lora has one LoRA a layer, got loras=2; the method talora takes"),
    ]:
        with pytest.raises(HealError) as caught:
            hb.heal(*arguments, **{**TINY, **options})
        assert words in str(caught.value)


@pytest.fixture
def folders(pipe, tmp_path):
    """A float pipeline on disk, and a quantized one."""
    pipe.save_pretrained(tmp_path / "model")
    quantized = api.load_float(tmp_path / "model")
    hb.quantize(quantized, "msfp-w4a4", calibration=4, steps=4)
    hb.save(quantized, tmp_path / "quantized")
    return tmp_path / "quantized", tmp_path / "model"


def test_the_student_of_a_folder_rounds_as_the_folder_does(folders):
    quantized, model = folders
    pipe, student = load_student(quantized, api.load_float(model))
    for name, layer in student.named_modules():
        if isinstance(layer, FakeQuant):
            packed = pipe.unet.get_submodule(name)
            assert torch.equal(layer.quantized_weight().levels, packed.levels()), name
            assert layer.spec == packed.spec
            for key in ("weight_scale", "activation_scale", "activation_zero"):
                ours, theirs = getattr(layer, key), getattr(packed, key)
                assert (ours is None and theirs is None) or torch.equal(ours, theirs), (name, key)


@pytest.mark.parametrize("method", ["lora", "quest"])
def test_the_student_of_a_folder_learns_as_the_one_it_was_saved_from(folders, tmp_path, method):
    quantized, model = folders
    run = {**TINY, "method": method, "log_every": 1}
    run.pop("rank")
    teacher = api.load_float(model)
    student = api.load_float(model)
    hb.quantize(student, "msfp-w4a4", calibration=4, steps=4, simulate=True)
    expected = hb.heal(student, teacher, **run)
    found = hb.heal(load_student(quantized, teacher)[1], teacher, **run)
    for ours, theirs in zip(found.log, expected.log, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert any(layer.activation_zero is not None for layer in student.unet.modules() if isinstance(layer, FakeQuant))


def test_smoothed_and_compensated_folders(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    quantized = api.load_float(tmp_path / "model")
    hb.quantize(quantized, hb.PRESETS["int4-w4a4"].compensated().smoothed(0.5), calibration=4, steps=4)
    hb.save(quantized, tmp_path / "quantized")
    packed, student = load_student(tmp_path / "quantized", api.load_float(tmp_path / "model"))
    states = float_states(pipe, 2, 5, 0)
    assert prediction_sqnr(student, states)[0] == pytest.approx(prediction_sqnr(packed.unet, states)[0], abs=0.2)


def test_the_command_heals_a_folder(monkeypatch, capsys, folders, tmp_path):
    quantized, model = folders
    out = tmp_path / "healed"
    code, text, err = run(monkeypatch, capsys, "heal", quantized, "--teacher", model, "-o", out, *FAST)
    assert code == 0, err
    assert "6 steps" in text
    assert "49 layers choose by timestep" in " ".join(text.split()) or "of 49 layers" in " ".join(text.split())
    folder = tmp_path / "healed.healing"
    assert sorted(path.name for path in folder.iterdir()) == ["healing.json", "log.jsonl", "report.html"]
    results = json.loads((folder / "healing.json").read_text())
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<rect") >= 49 * 2
    assert "mid_block.resnets.0.conv1" in page
    assert len(results["choice"]) == 49
    assert sum(length for _, length in results["choice"]["mid_block.resnets.0.conv1"]) == 1000
    assert sample_images(hb.load(out), 2, 3).isfinite().all()
    code, text, _ = run(monkeypatch, capsys, "info", out)
    assert "e2m1 x2" in text or " x2 x " in text
    code, _, err = run(monkeypatch, capsys, "heal", out, "--teacher", model, "-o", tmp_path / "again", *FAST)
    assert (code, "is healed already" in err) == (1, True)
    harmful = (*FAST, "--learning-rate", 20)
    code, text, _ = run(monkeypatch, capsys, "heal", quantized, "--teacher", model, "-o", tmp_path / "worse", *harmful)
    assert (code, "(NO BETTER than before" in " ".join(text.split())) == (0, True)


def test_the_command_heals_a_folder_by_quest(monkeypatch, capsys, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    quantized = api.load_float(tmp_path / "model")
    hb.quantize(quantized, "quest-w4a8", calibration=2, steps=3)
    hb.save(quantized, tmp_path / "quantized")
    before = quantized.unet.get_submodule("mid_block.resnets.0.conv1").activation_scale
    fast = ("--steps", 6, "--batch", 4, "--sampler-steps", 4, "--method", "quest")
    out = tmp_path / "healed"
    code, text, err = run(monkeypatch, capsys, "heal", tmp_path / "quantized", "--teacher", tmp_path / "model", "-o", out, *fast)
    assert code == 0, err
    words = " ".join(text.split())
    for part in ("6 steps", "% of the parameters trained", "temporal stage: weights of", "critical stage", "GB of memory"):
        assert part in words, part
    folder = tmp_path / "healed.healing"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "critical/log.jsonl",
        "healing.json",
        "report.html",
        "temporal/log.jsonl",
    ]
    assert "What was trained" in (folder / "report.html").read_text()
    healed = hb.load(out)
    scale = healed.unet.get_submodule("mid_block.resnets.0.conv1").activation_scale
    assert scale.shape == before.shape == (3,)
    assert not torch.equal(scale, before)
    assert sample_images(healed, 2, 5).isfinite().all()
    _, again = load_student(out, api.load_float(tmp_path / "model"))  # healed by quest, a folder is as any other
    for name, layer in again.named_modules():
        if isinstance(layer, FakeQuant):
            assert torch.equal(layer.quantized_weight().levels, healed.unet.get_submodule(name).levels()), name


def test_bad_folders_end_in_a_sentence(monkeypatch, capsys, folders, tmp_path):
    quantized, model = folders
    (tmp_path / "taken").mkdir()
    for arguments, words in [
        ((model, "--teacher", model, "-o", tmp_path / "out"), "is not quantized; make a quantized folder with 'halfbyte quantize'"),
        ((quantized, "--teacher", quantized, "-o", tmp_path / "out"), "is quantized already; start from the float model"),
        ((quantized, "--teacher", model, "-o", tmp_path / "taken"), "exists already"),
        ((tmp_path / "none", "--teacher", model, "-o", tmp_path / "out"), "is not a folder"),
        (
            (quantized, "--teacher", model, "-o", tmp_path / "out", "--prompts", tmp_path / "none"),
            "cannot be read as a list of prompts",
        ),
        ((quantized, "--teacher", model, "-o", tmp_path / "out", "--method", "magic"), "unknown method 'magic'"),
        ((quantized, "--teacher", model, "-o", tmp_path / "out", "--method", "quest", "--rank", 4), "no option 'rank' for quest"),
        ((quantized, "--teacher", model, "-o", tmp_path / "out", "--share", 0.1), "no option 'share' for lora"),
    ]:
        code, _, err = run(monkeypatch, capsys, "heal", *arguments)
        assert (code, words in err) == (1, True), err
        assert not (tmp_path / "out").exists()


def test_a_stopped_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stopped(*arguments, **options):
        raise StoppedError("stopped at step 7, saved in out.healing; continue with resume (--resume)", 15)

    monkeypatch.setattr("halfbyte.heal.command.heal_folder", stopped)
    code, _, err = run(monkeypatch, capsys, "heal", tmp_path, "--teacher", tmp_path, "-o", tmp_path / "out")
    assert code == 128 + 15
    assert "stopped at step 7" in err
    assert "nothing was written" not in err
