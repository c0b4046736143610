"""The command line: round trips, and one sentence for every mistake."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import halfbyte as hb
from halfbyte import cli
from halfbyte.presets import DEFAULT, get_recipe
from halfbyte.recipe import Reconstruction
from halfbyte.runtime.backends import describe


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


@pytest.fixture
def model(pipe, tmp_path):
    """A float pipeline on disk."""
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("model", "recipe.yaml"))


def test_every_command_helps_with_an_example(monkeypatch, capsys):
    for command in ("demo", "quantize", "heal", "sample", "info", "eval", "table", "report"):
        code, out, _ = run(monkeypatch, capsys, command, "--help")
        assert code in (0, None)
        assert f"halfbyte {command}" in out
        assert "Example" in out


def test_defaults_in_words_are_shown(monkeypatch, capsys):
    """Brackets are markup where they are not escaped, and vanish."""
    for command, words in {
        "heal": ("15, without --steps", "2", "16", "router", "temporal, critical", "0.07", "0.02; quest: 0.05", "the pipeline's"),
        "eval": ("its recipe", "the pipeline's"),
    }.items():
        shown = re.sub(r"[│\s]+", " ", run(monkeypatch, capsys, command, "--help")[1])
        assert [word for word in words if f"[default: {word}]" not in shown] == []


def test_one_default_recipe_everywhere():
    """The command line has it as text: importing the presets would make every --help wait for torch."""
    for verb in (cli.quantize, hb.quantize, hb.quantize_folder, hb.HalfbyteConfig):
        assert inspect.signature(verb).parameters["recipe"].default == DEFAULT


def test_quantize_info_sample_and_a_new_process_agree(monkeypatch, capsys, pipe, model, tmp_path):
    code, out, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "out", "--layers")
    assert code == 0, err
    assert "0 kept in float" in out
    assert "time_embedding.linear_1" in out
    code, out, _ = run(monkeypatch, capsys, "info", tmp_path / "out")
    assert "recipe halfbyte-w4a4: 51 packed layers" in out
    code, out, _ = run(monkeypatch, capsys, "sample", tmp_path / "out", "-n", 4, "--steps", 2, "-o", tmp_path / "grid.png")
    assert code == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 16
    hb.quantize(pipe, "halfbyte-w4a4")
    options = "generator=torch.Generator().manual_seed(3), batch_size=2, num_inference_steps=2, output_type='np'"
    here = pipe(generator=torch.Generator().manual_seed(3), batch_size=2, num_inference_steps=2, output_type="np").images
    script = (
        "import sys, numpy, torch, halfbyte; from diffusers import DiffusionPipeline; torch.set_num_threads(1);"
        f"numpy.save(sys.argv[2], DiffusionPipeline.from_pretrained(sys.argv[1])({options}).images)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "out", tmp_path / "there.npy"], check=True, capture_output=True)
    assert (np.load(tmp_path / "there.npy") == here).all()


def test_calibrated_recipes_from_the_command_line(monkeypatch, capsys, model, tmp_path):
    options = ("--gptq", "--smooth", 0.5, "--calibrate", 2, "--steps", 2)
    code, _, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "halfbyte-w4a4+gptq+smooth0.5" in run(monkeypatch, capsys, "info", tmp_path / "out")[1]


def test_the_pipelines_arguments_reach_every_command(monkeypatch, capsys, etas, model, tmp_path):
    student, study, results = tmp_path / "out", tmp_path / "study", tmp_path / "results.json"
    calibrate = ("--recipe", "quest-w4a4", "--calibrate", 2, "--steps", 2)
    commands = {
        "quantize": (model, "-o", student, *calibrate),
        "sample": (student, "-n", 2, "--steps", 2, "-o", tmp_path / "grid.png"),
        "heal": (student, "--teacher", model, "-o", tmp_path / "healed", "--steps", 1, "--batch", 2, "--sampler-steps", 2),
        "sensitivity": (model, "-o", study, "--images", 1, "--steps", 1),
        "eval": (student, "--against", model, "-o", results, "-n", 2, "--steps", 1),
    }
    for name, arguments in commands.items():
        for wrong, words in (
            (("--guidance", 2), "DDIMPipeline takes no argument 'guidance_scale'; it takes 'batch_size', 'eta'"),
            (("--argument", "eta"), "--argument takes NAME=VALUE, such as height=512, got 'eta'"),
            (("--argument", "eta=0.5", "--argument", "eta=1"), "eta is given twice"),
        ):
            code, _, err = run(monkeypatch, capsys, name, *arguments, *wrong)
            assert (name, code) == (name, 1)
            assert words in err
        etas.clear()
        code, _, err = run(monkeypatch, capsys, name, *arguments, "--argument", "eta=0.5")
        assert (name, code) == (name, 0), err
        assert (name, {*etas}) == (name, {0.5})


def test_adaround_from_the_command_line(monkeypatch, capsys, model, tmp_path):
    recipe = get_recipe("qdiffusion-w4a8")
    (tmp_path / "quick.yaml").write_text(recipe.replace(reconstruction=Reconstruction(iterations=2)).to_yaml())
    options = ("--recipe", tmp_path / "quick.yaml", "--adaround", "--calibrate", 2, "--steps", 2, "--layers")
    code, out, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "AdaRound leaves 0." in out
    assert "conv_shortcut.parts.1" in out
    assert "qdiffusion-w4a8+adaround" in run(monkeypatch, capsys, "info", tmp_path / "out")[1]
    code, _, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "other", "--gptq", "--adaround")
    assert code == 1
    assert "two ways to round the same weights; choose one" in err
    assert recipe.adarounded(Reconstruction(iterations=2)).compensated().reconstruction is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "quartz"], "unknown recipe 'quartz'; the presets are 'halfbyte-w4a4'"),
        (["--recipe", "recipe.yaml"], "no key 'bits'; its keys are"),
        (["--recipe", "missing.yaml"], "cannot be read"),
        (["--recipe", "quartz-authors-w4a4"], "cannot be packed"),
    ],
)
def test_bad_recipes(monkeypatch, capsys, model, tmp_path, arguments, words):
    (tmp_path / "recipe.yaml").write_text("name: mine\nbits: 4\ninner: {}\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "out", *arguments)
    assert code == 1
    assert words in err
    assert err.splitlines()[-1].startswith("error: ")  # diffusers' loading bars may stand before it
    assert "Traceback" not in err
    assert left_behind(tmp_path) == []


def test_bad_models_and_outputs(monkeypatch, capsys, pipe, model, tmp_path):
    (tmp_path / "taken").mkdir()
    code, _, err = run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "taken")
    assert (code, "exists already" in err) == (1, True)
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "taken", "-o", tmp_path / "out")
    assert (code, "neither model_index.json nor config.json" in err) == (1, True)
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "taken" / "nan")
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "taken" / "nan", "-o", tmp_path / "out")
    assert (code, "conv_out.weight holds 1 NaN" in err) == (1, True)
    assert left_behind(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    "arguments", [["demo", "--bad"], ["quantize"], ["nonsense"], ["quantize", "x", "-o", "y", "--smooth", "2"]]
)
def test_wrong_usage_is_explained(monkeypatch, capsys, arguments):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Error" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("place", "options", "words", "left"),
    [
        ("streaming.work.make", [], "the same command with --resume continues", [".out.partial"]),
        ("conversion.make_fake_quant", ["--smooth", "0.5", "--calibrate", "1", "--steps", "1"], "nothing was written", []),
    ],
)
def test_ctrl_c_during_quantize(monkeypatch, capsys, model, tmp_path, place, options, words, left):
    room, _, function = place.rpartition(".")
    slow = (
        f"import time, torch; from halfbyte import cli; import halfbyte.{room} as room\n"
        f"made = room.{function}\n"
        "def wait(*a):\n    print('quantizing', flush=True); time.sleep(1); return made(*a)\n"
        f"room.{function} = wait; cli.main()"
    )
    command = [sys.executable, "-u", "-c", slow, "quantize", str(model), "-o", str(tmp_path / "out"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while "quantizing" not in process.stdout.readline():
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in err
    assert words in err
    assert "Traceback" not in err
    assert left_behind(tmp_path) == left
    if left:
        assert run(monkeypatch, capsys, "quantize", model, "-o", tmp_path / "out", "--resume")[0] == 0
        assert left_behind(tmp_path) == ["out"]


def test_info_tells_the_backend_and_why(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "info")
    assert code == 0
    assert describe() in out


def test_the_module_runs_as_a_script():
    source = Path(cli.__file__)
    done = subprocess.run([sys.executable, source, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0


def test_eval_report_and_table_agree(monkeypatch, capsys, model, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, "quantize", model, "-o", "out")
    assert code == 0, err
    assert "Not evaluated yet" in Path("out", "README.md").read_text()
    options = ("-n", 3, "--steps", 2, "--batch-size", 2)
    code, out, err = run(monkeypatch, capsys, "eval", "out", "--against", "model", "-o", "results.json", *options)
    assert code == 0, err
    assert "halfbyte-w4a4" in out
    card = Path("out", "README.md").read_text()
    assert "| `halfbyte-w4a4` |" in card
    assert "3 images, 2 steps of DDIMScheduler, seed 0" in card
    assert Path("results.html").exists()
    table = "{model: model, title: model, images: 3, steps: 2, batch: 2, runs: [int4-w4a4]}"
    Path("table.yaml").write_text(table)
    code, _, err = run(monkeypatch, capsys, "table", "table.yaml", "-o", "table", "--slim", "slim.json")
    assert code == 0, err
    row = {"case": "linear", "contestant": "quartz-w4a4", "seconds": 0.5, "weight_bytes_of_bf16": 0.27}
    Path("bench.json").write_text(json.dumps({"environment": {}, "rows": [row]}))
    code, out, err = run(monkeypatch, capsys, "report", "results.json", "slim.json", "-o", "both.html", "--bench", "bench.json")
    assert code == 0, err
    assert "int4-w4a4" in out
    page = Path("both.html").read_text()
    assert "int4-w4a4" in page
    assert "Times as fast as" in page
    assert "Inputs on their levels" in page
    code, _, err = run(monkeypatch, capsys, "sensitivity", model, "-o", "study", "--images", 1, "--steps", 1)
    assert code == 0, err
    study = Path("study", "sensitivity.json")
    code, _, err = run(monkeypatch, capsys, "report", "results.json", "-o", "with.html", "--sensitivity", study)
    assert code == 0, err
    assert "Sensitivity of layers at w4a4" in Path("with.html").read_text()
    code, _, err = run(monkeypatch, capsys, "report", "results.json", "-o", "none.html", "--sensitivity", "bench.json")
    assert (code, "bench.json is no result of 'halfbyte sensitivity'" in err, Path("none.html").exists()) == (1, True, False)
    slim = json.loads(Path("slim.json").read_text())
    assert all(one["layers"] == [] for one in slim["runs"])
    code, _, err = run(monkeypatch, capsys, "eval", "out", "--against", "model", "-o", "results.json", *options)
    assert (code, "results.json exists already" in err) == (1, True)


MISTAKES = {  # arguments, in a folder with model (float), packed, "file" and an empty folder -> words of the error
    "quantize model -o file/out": "file/out was not written: Not a directory",
    "quantize packed -o out": "packed/unet is quantized already; start from the float model",
    "quantize file -o out": "file is not a diffusers pipeline",
    "quantize strange -o out": "strange has no denoiser: model_index.json names none of unet, transformer",
    "quantize broken -o out": "model_index.json is not JSON",
    "sample nowhere": "nowhere is not a folder; give the folder that",
    "sample empty": "empty is not a model: it has neither model_index.json nor config.json",
    "sample broken": "model_index.json is not JSON",
    "sample packed/unet": "UNet2DModel has neither a 'unet' nor a 'transformer'",
    "sample packed -n 1 --steps 1 -o .": ". is a folder; give the name of a file in it",
    "sample packed -n 1 --steps 1 -o file/x.png": "file/x.png was not written",
    "info nowhere": "nowhere is not a folder",
    "info model": "model holds no halfbyte checkpoint",
    f"info {'a' * 300}": "is not a folder",
    "demo --images 2 --recipe nothing": "unknown recipe 'nothing'",
    "eval packed --against model -o x.json --features net.onnx": "net.onnx is not a file; give 'inception'",
    "eval packed --against model -o x.json --images model": "give one with --features",
    "eval packed --against model -o x.json --prompts nowhere.txt": "nowhere.txt cannot be read as a list of prompts",
    "eval packed --against packed -o x.json": "packed is quantized already; start from the float model",
    "table nowhere.yaml -o x": "nowhere.yaml cannot be read as YAML",
    "report nowhere.json": "nowhere.json cannot be read",
}


def test_every_mistake_ends_in_one_sentence_and_leaves_nothing(monkeypatch, capsys, pipe, model, tmp_path):
    monkeypatch.chdir(tmp_path)
    hb.save(hb.quantize(pipe, "int4-w4a4") and pipe, "packed")
    Path("file").touch()
    for name, index in (("empty", None), ("broken", "{"), ("strange", '{"_class_name": "Nothing"}')):
        Path(name).mkdir()
        if index:
            Path(name, "model_index.json").write_text(index)
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in MISTAKES.items():
        code, _, err = run(monkeypatch, capsys, *arguments.split())
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (1, 1), (arguments, err)
        assert words in errors[0], arguments
        assert err.splitlines()[-1] == errors[0], arguments
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_the_command_needs_no_open_stdin():
    command = ["sh", "-c", f"exec {sys.executable} {cli.__file__} info <&-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend" in done.stdout


@pytest.mark.parametrize("seed", [-5, 99999999999999999999])
def test_any_integer_is_a_seed(monkeypatch, capsys, model, tmp_path, seed):
    for name in ("one.png", "two.png"):
        code, _, err = run(monkeypatch, capsys, "sample", model, "-n", 1, "--steps", 1, "--seed", seed, "-o", tmp_path / name)
        assert code == 0, err
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_sensitivity_measures_once_and_writes_a_recipe_that_quantize_takes(monkeypatch, capsys, model, tmp_path):
    study = tmp_path / "study"
    code, out, err = run(monkeypatch, capsys, "sensitivity", model, "-o", study, "--images", 1, "--steps", 1)
    assert code == 0, err
    assert "convolution" in out
    assert {file.name for file in study.iterdir()} == {"sensitivity.json", "sensitivity.html"}
    code, out, err = run(monkeypatch, capsys, "sensitivity", model, "-o", study, "--bits", 5, "--activation-bits", 6)
    assert code == 0, err
    assert "using the measurement in" in out
    assert "bits a weight" in out
    code, _, err = run(monkeypatch, capsys, "quantize", model, "--recipe", study / "recipe.yaml", "-o", tmp_path / "out")
    assert code == 0, err
    code, out, err = run(monkeypatch, capsys, "sensitivity", model, "-o", study, "--budget", "0.99x", "--budget", "6bits")
    assert code == 0, err
    words = " ".join(out.split())
    assert "Predicted step of one image: " in words
    assert "Times hold for this machine" in words
    assert get_recipe(study / "recipe.yaml").name == "budget-0.99x-6bits"
    table = (study / "latency.json").read_bytes()
    for arguments, words in (
        (["--bits", 1], "these widths reach 4.25 to 8"),
        (["--budget", "0.0001ms"], "has 0.0001 ms a step of one image; these widths reach"),
        (["--budget", "fast"], "a budget is a number above 0 and a unit"),
        (["--budget", "0.9x", "--dtype", "int3"], "the dtype of a step must be one of 'bf16', 'fp32'"),
    ):
        code, _, err = run(monkeypatch, capsys, "sensitivity", model, "-o", study, *arguments)
        assert code == 1
        assert words in err
    assert (study / "latency.json").read_bytes() == table, "the times were measured again"
