"""`halfbyte eval` on folders: figures that are right, survive kills bit for bit, and do not depend on the number of processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import EvaluationError, OutputExistsError, ResumeError, StoppedError
from halfbyte.evaluate import sample_images
from halfbyte.evaluate.images import open_images, to_pixels, write_png
from halfbyte.evaluate.sampling import Sampling
from halfbyte.evidence.command import WORK_SUFFIX, EvalOptions, evaluate_folder, slimmed
from halfbyte.metrics import psnr
from halfbyte.report import check_results, load_results

SCRIPT = Path(__file__).with_name("tiny_eval.py")
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
SMALL = EvalOptions(Sampling(images=4, steps=2, batch=3))
KILLS = 10


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 6, 3)

    def forward(self, images):
        return torch.relu(self.convolution(images)).mean((2, 3))


@pytest.fixture
def folders(pipe, tmp_path):
    """model, quantized, photos and network.pt in a folder."""
    pipe.save_pretrained(tmp_path / "model")
    hb.quantize(pipe, "int4-w4a4")
    hb.save(pipe, tmp_path / "quantized")
    for index, image in enumerate(torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(2))):
        write_png(to_pixels(image), tmp_path / "photos" / f"{index}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Network().eval(), torch.rand(1, 1, 8, 8)).save(tmp_path / "network.pt")
    return tmp_path


def same(results):
    """What must not differ between two evaluations: all but times and dates."""
    rows = [{key: value for key, value in run.items() if key != "seconds_per_image"} for run in results["runs"]]
    return json.dumps({**results, "runs": rows, "created": "", "environment": ""})


def evaluate(folder, name="results.json", options=SMALL, report=None):
    return evaluate_folder(folder / "quantized", folder / "model", folder / name, options, report)


def test_figures_are_those_of_the_images(pipe, folders):
    stages = []
    found = evaluate(folders, report=lambda *stage: stages.append(stage))
    assert load_results(folders / "results.json") == found
    check_results(found)
    float_images = sample_images(hb.load(folders / "model"), 4, 2, batch=3)
    images = sample_images(pipe, 4, 2, batch=3)
    expected = psnr(to_pixels(float_images) / 255, to_pixels(images) / 255).mean().item()
    first, run = found["runs"]
    assert run["figures"]["psnr"]["value"] == pytest.approx(expected, rel=1e-6)
    assert (first["recipe"], run["recipe"], first["figures"]) == ("float", "int4-w4a4", {})
    assert 0 < run["sqnr"] < 30
    assert all(layer["output_sqnr"] is not None for layer in run["layers"])
    settings = found["settings"]
    assert (settings["images"], settings["steps"], settings["seed"], settings["sampler"]) == (4, 2, 0, "DDIMScheduler")
    assert {"halfbyte", "torch", "diffusers", "torchmetrics", "pillow"} <= set(found["environment"])
    assert not (folders / f"results.json{WORK_SUFFIX}").exists()
    assert {stage for stage, *_ in stages} == {"sampling float", "measuring float", "sampling int4-w4a4", "measuring int4-w4a4"}
    assert all(run["images"] is None and not run["layers"] for run in slimmed(found)["runs"])


@pytest.mark.parametrize("npz", [False, True])
def test_images_can_be_kept(folders, npz):
    evaluate(folders, options=EvalOptions(SMALL.sampling, save_images=folders / "kept", npz=npz))
    names = ("float.npz", "quantized.npz") if npz else ("float", "quantized")
    kept = [open_images(folders / "kept" / name).read(0, 9) for name in names]
    assert [len(images) for images in kept] == [4, 4]
    assert torch.equal(kept[0], to_pixels(sample_images(hb.load(folders / "model"), 4, 2, batch=3)))


def test_sets_are_compared_in_the_features_of_a_file(folders):
    network = str(folders / "network.pt")
    found = evaluate(folders, options=EvalOptions(SMALL.sampling, network, trust_code=True, reference=folders / "photos"))
    settings, (first, run) = found["settings"], found["runs"]
    assert set(first["figures"]) == {"frechet", "kernel", "precision", "recall"}
    assert {"frechet_float", "kernel_float", "psnr", "ssim"} <= set(run["figures"])
    assert (settings["features"], settings["reference"], settings["reference_count"]) == ("network.pt", "photos", 9)
    assert len(settings["digest"]) == 64


def test_what_cannot_be_done_is_said_before_any_work(folders):
    (folders / "taken.json").touch()
    cases = [
        ("taken.json", SMALL, OutputExistsError, "taken.json exists already"),
        ("a.json", EvalOptions(SMALL.sampling, save_images=folders / "model"), OutputExistsError, "choose another folder"),
        ("a.json", EvalOptions(SMALL.sampling, reference=folders / "photos"), EvaluationError, "give one with --features"),
    ]
    before = sorted(folders.iterdir())
    for name, options, error, words in cases:
        with pytest.raises(error, match=words):
            evaluate(folders, name, options)
    assert sorted(folders.iterdir()) == before


def test_ctrl_c_keeps_what_is_done_and_another_evaluation_does_not_take_it(folders):
    sent = []

    def stop(stage, done, _):
        if stage == "sampling float" and done >= 6 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    with pytest.raises(StoppedError, match="run the same command again to go on") as stopped:
        evaluate(folders, report=stop)
    assert stopped.value.signal == signal.SIGINT
    work = folders / f"results.json{WORK_SUFFIX}"
    assert len(list((work / "float" / "images").glob("*.png"))) == 3
    with pytest.raises(ResumeError, match=r"its sampling\.seed is 0, this run's is 7"):
        evaluate(folders, options=EvalOptions(Sampling(images=4, steps=2, batch=3, seed=7)))
    broken = evaluate(folders)
    assert same(broken) == same(evaluate(folders, "whole.json"))


def start(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def count_files(folder):
    return sum(name.endswith((".png", ".safetensors")) for _, _, names in os.walk(folder) for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_moments_an_evaluation_ends_with_the_same_figures(folders):
    server = start(SCRIPT, folders, "serve")

    def ask(line):
        print(line, file=server.stdin, flush=True)
        return int(server.stdout.readline())

    assert server.stdout.readline() == "ready\n"
    ask("whole")
    assert ask("wait") == 0
    chance, files = random.Random(0), [0]
    for _ in range(KILLS):
        number, goal, deadline = ask("broken"), files[-1] + chance.randint(1, 4), time.monotonic() + 30
        while count_files(folders / f"broken.json{WORK_SUFFIX}") < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(number, signal.SIGKILL)
        assert ask("wait") == signal.SIGKILL
        files.append(count_files(folders / f"broken.json{WORK_SUFFIX}"))
    ask("broken")
    assert ask("wait") == 0, server.stderr.read()
    assert len(set(files)) > 8, f"the kills came at the same places: {files}"
    assert same(load_results(folders / "broken.json")) == same(load_results(folders / "whole.json"))
    assert load_results(folders / "whole.json")["settings"]["images"] == 30
    server.communicate(timeout=30)


# --multi_gpu is how accelerate asks for several processes on a machine; ACCELERATE_USE_CPU keeps them on the CPU, over gloo
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folders):
    for name, launcher in (("one", ()), ("two", (*LAUNCH.split(), "--num_processes", "2"))):
        process = start(*launcher, SCRIPT, folders, name)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert not (folders / f"{name}.json{WORK_SUFFIX}").exists()
    assert same(load_results(folders / "one.json")) == same(load_results(folders / "two.json"))


def test_a_quantized_folder_says_how_it_was_evaluated(folders):
    shutil.rmtree(folders / "photos")
    evaluate(folders)
    assert not (folders / "quantized" / "README.md").exists()  # no card was written by hb.save, and none is made up
