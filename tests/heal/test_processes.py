"""Runs that are killed at random moments, and runs of several processes."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("tiny_run.py")
KILLS = 10
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def start(folder, *launcher, what="talora"):
    command = [sys.executable, *launcher, SCRIPT, folder, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


every_method = pytest.mark.parametrize("what", ["talora", "quest"])


@pytest.mark.slow
@every_method
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, what):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(whole, what=what)
    process.stdout.readline()
    training = time.monotonic()
    finish(process)
    length, chance, steps = time.monotonic() - training, random.Random(0), []
    for _ in range(KILLS):
        process = start(broken, what=what)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.05, 0.35) * length)
        process.kill()
        process.communicate()
        steps.append(sum(len(file.read_bytes().splitlines()) for file in broken.rglob("log.jsonl")))
    finish(start(broken, what=what))
    assert len(set(steps)) > 1, "the kills came before the first step"
    expected, found = load_file(whole / "final.safetensors"), load_file(broken / "final.safetensors")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert [row["loss"] for row in log(whole)] == [row["loss"] for row in log(broken)]
    assert not list(broken.glob(".*"))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --multi_gpu is how accelerate asks for several processes on a machine; ACCELERATE_USE_CPU keeps them on the CPU, over gloo
LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)


@pytest.mark.slow
@every_method
def test_two_processes_follow_the_loss_curve_of_one(tmp_path, what):
    finish(start(tmp_path / "one", what=what))
    finish(start(tmp_path / "two", *LAUNCH, "--num_processes", "2", "--main_process_port", "0", what=what))
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.05), ours["step"]


@pytest.mark.slow
def test_a_student_shared_out_by_fsdp_has_the_same_gradients(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        SCRIPT,
        tmp_path,
        "fsdp",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "fsdp").exists()
