"""The training scripts run, stop and go on, and write what the demo loads."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def parquet(path, grey, count=24):
    draw = np.random.default_rng(0)
    rows = []
    for index in range(count):
        pixels = draw.integers(0, 256, (28, 28, 1 if grey else 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(pixels, (28, 28, 3)).copy()).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": index % 10})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("grey", "width"), [(True, 16), (False, 16)])
def test_training_runs_goes_on_and_leaves_a_pipeline(tmp_path, grey, width):
    from diffusers import DiffusionPipeline

    data = parquet(tmp_path / "data.parquet", grey)
    options = ("--data", data, "--output", tmp_path / "out", "--width", width, "--batch-size", 4, "--no-compile", "--float32")
    first = run("train_demo.py", *options, "--steps", 2)
    assert first.returncode == 0, first.stderr
    second = run("train_demo.py", *options, "--steps", 22)  # past the check that every parameter learns
    assert second.returncode == 0, second.stderr
    assert "continuing from step 2" in second.stdout
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.unet.config.in_channels == (1 if grey else 3)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "on `data.parquet` (24 images): 22 steps of 4 images" in card
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (512, 512)
    assert not (tmp_path / "out" / "checkpoint.new").exists()


@pytest.mark.slow
def test_a_transformer_is_trained_on_the_latents_of_an_autoencoder(tmp_path):
    from diffusers import DiffusionPipeline

    data = parquet(tmp_path / "data.parquet", grey=True)
    options = ("--data", data, "--batch-size", 4, "--no-compile")
    first = run("train_demo_autoencoder.py", *options, "--output", tmp_path / "autoencoder", "--steps", 2)
    assert first.returncode == 0, first.stderr
    options += ("--output", tmp_path / "out", "--autoencoder", tmp_path / "autoencoder", "--width", 64, "--float32")
    for steps in (2, 22):
        done = run("train_demo.py", *options, "--steps", steps)
        assert done.returncode == 0, done.stderr
    assert "continuing from step 2" in done.stdout
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "model")
    images = pipe([3, 13, 203], guidance_scale=3.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 32, 32, 1)
    table = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert pipe.scheduler.config.clip_sample is False  # latents lie outside -1..1
    assert torch.equal(table[3], table[13])
    assert not torch.equal(table[3], table[4])


@pytest.mark.slow
def test_the_classifier_is_trained_and_its_statistics_written(tmp_path):
    data = parquet(tmp_path / "data.parquet", grey=True)
    done = run(
        "train_demo_features.py",
        "--train",
        data,
        "--test",
        data,
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--no-compile",
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"features.safetensors", "statistics.safetensors"}


@pytest.mark.parametrize("lost", [None, "zero"])
def test_a_part_that_does_not_learn_ends_the_run(monkeypatch, lost):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from train_demo import check_gradients

    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net(torch.ones(1, 2)).sum().backward()
    check_gradients(net)
    net[0].weight.grad = None if lost is None else torch.zeros(2, 2)
    with pytest.raises(SystemExit, match=r"1 parameters get no gradient, 0.weight first"):
        check_gradients(net)


def test_a_parquet_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["none"]}), tmp_path / "data.parquet")
    done = run("train_demo.py", "--data", tmp_path / "data.parquet", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "'image' or 'img'" in done.stderr
    assert "Traceback" not in done.stderr
