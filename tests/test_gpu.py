"""Quantizing, healing, training and sampling run on a GPU through the same code as on a CPU. Skipped where there is none."""

import copy
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

import halfbyte as hb
from halfbyte.calibration import InputStatistics
from halfbyte.presets import PRESETS
from halfbyte.runtime import backends, gpu

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
PACKABLE = [name for name, recipe in PRESETS.items() if recipe.simulated_only() is None]
ROOT = Path(__file__).parents[1]


def quantized(pipe, recipe, device, **options):
    """A copy of a pipeline on a device, quantized there."""
    made = copy.copy(pipe)
    made.register_modules(unet=copy.deepcopy(pipe.unet))
    made.to(device)
    hb.quantize(made, recipe, calibration=2, steps=4, **options)
    return made


def sample(pipe):
    return pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(0), output_type="np").images


def test_statistics_follow_the_weights():
    found = InputStatistics(channel_absmax=torch.ones(2), hessian=torch.ones(1, 2, 2), rows=torch.ones(1, 3, 2))
    moved = found.on("meta")
    assert {moved.channel_absmax.device.type, moved.hessian.device.type, moved.rows.device.type} == {"meta"}
    assert InputStatistics().on("meta").hessian is None
    assert found.hessian.device.type == "cpu"


@on_gpu
@pytest.mark.parametrize("recipe", PRESETS)
def test_every_recipe_quantizes_on_the_gpu(pipe, recipe):
    made = quantized(pipe, recipe, "cuda", simulate=recipe not in PACKABLE)
    assert {tensor.device.type for tensor in (*made.unet.parameters(), *made.unet.buffers())} == {"cuda"}
    assert np.isfinite(sample(made)).all()


@on_gpu
@pytest.mark.parametrize("recipe", ["quartz-w4a4", "quartz-w4a8", "msfp-w4a4"])
def test_packed_models_sample_as_on_the_cpu(pipe, recipe, monkeypatch):
    """The same codes in the GPU's kernels, in the reference backend on the GPU, and in whatever runs on the CPU."""
    made = quantized(pipe, recipe, "cpu")
    there = sample(made)
    made.to("cuda")
    backends.backend.cache_clear()
    assert backends.backend("cuda").name == "triton", gpu.missing()
    here = sample(made)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    backends.backend.cache_clear()
    plain = sample(made)
    backends.backend.cache_clear()
    assert np.abs(here - plain).max() < 1e-3  # products are the same bits; a norm may turn one code over
    assert np.abs(here - there).mean() < 2e-2  # float layers differ between devices, and codes turn over


@on_gpu
@pytest.mark.parametrize("method", ["talora", "quest"])
def test_healing_runs_on_the_gpu(pipe, tmp_path, method):
    options = {"batch": 4, "sampler_steps": 4, "reuse": 1.0, "output": tmp_path / method}
    options |= {"rank": 4} if method == "talora" else {}
    start = quantized(pipe, "msfp-w4a4", "cuda", simulate=True).unet
    hb.heal(copy.deepcopy(start), pipe.to("cuda"), method, steps=4, **options)
    result = hb.heal(start, pipe, method, steps=4, resume=True, **options)  # takes up what the first run left
    assert all(parameter.is_cuda for parameter in result.model.parameters())


@on_gpu
def test_training_runs_on_the_gpu_and_goes_on(tmp_path):
    data = tmp_path / "data.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    files = [io.BytesIO() for _ in pixels]
    for picture, file in zip(pixels, files, strict=True):
        Image.fromarray(picture).save(file, "PNG")
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": file.getvalue(), "path": None}} for file in files]), data)
    command = [sys.executable, ROOT / "examples" / "train_demo.py", "--data", data, "--output", tmp_path / "out", "--width", "16"]
    for steps in ("2", "22"):
        done = subprocess.run([*command, "--steps", steps, "--no-compile"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model" / "model_index.json").exists()
