"""Runs that are killed at random moments, and runs of several processes."""

import json
import os
import random
import signal
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
    finish(start(whole, what=what))
    chance, steps = random.Random(0), []
    for number in range(KILLS):
        process, aim = start(broken, what=what), 2 * number + chance.randint(0, 2)
        while rows(broken) < aim and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))  # within a step, while it is saved, or while the next one starts
        process.kill()
        process.communicate()
        steps.append(rows(broken))
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    finish(start(broken, what=what))
    assert len(set(steps)) > KILLS // 2
    expected, found = load_file(whole / "final.safetensors"), load_file(broken / "final.safetensors")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert [row["loss"] for row in log(whole)] == [row["loss"] for row in log(broken)]
    assert not list(broken.glob(".*"))


def rows(folder):
    """Steps that a run, or the stages of one, have logged."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.rglob("log.jsonl"))


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
