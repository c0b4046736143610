"""The embedded model through every method: `halfbyte demo`."""

import copy
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.api import quantize
from halfbyte.conversion import Result, quantizable_layers, stored_bytes
from halfbyte.errors import MissingExtraError
from halfbyte.evaluate import float_states, layer_sqnr, prediction_sqnr, sample_images
from halfbyte.formats import get_grid
from halfbyte.layers import GridChoice
from halfbyte.metrics import FeatureStatistics, frechet_distance, psnr, spread, ssim
from halfbyte.recipe import LayerSpec, get_recipe
from halfbyte.report.pictures import data_uri, grid_png
from halfbyte.runtime.backends import describe

HERE = Path(__file__).parent
MODEL = HERE / "model"
RECIPES = ("int8-w8a8", "int4-w4a4", "quartz-w4a4", "msfp-w4a4", "quartz-w4a8")
CALIBRATION = 8  # images sampled for recipes that need calibration
STATE_TRAJECTORIES = 16  # images whose denoiser calls the noise predictions are compared on
LAYER_CALLS = 2  # of those calls, how many the per-layer figures use
Report = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
PICTURED = 64  # images in each grid of the report
STRIP = 16  # images of each run in the one picture that shows all runs below each other


@dataclass(frozen=True)
class Settings:
    """Size of a demo run."""

    images: int = 128
    steps: int = 10
    seed: int = 0
    recipes: tuple[str, ...] = RECIPES

    @property
    def work(self) -> int:
        """Units of progress: denoised images times steps, over all runs."""
        return self.images * self.steps * (1 + len(self.recipes))


def load_pipeline() -> Any:
    """The embedded DDIMPipeline in float32: an unconditional denoiser of Fashion-MNIST images, padded to 32x32."""
    from diffusers import DDIMPipeline

    pipe = DDIMPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(settings: Settings, report: Report | None = None) -> tuple[dict[str, Any], Tensor]:
    """Sample, quantize and compare.

    Args:
        report: called with (what is being done, units done, units in all).
    Returns:
        The results that `report.write_report` takes, and the first STRIP images of every run, one run after another.
    """
    pipe = load_pipeline()
    states = float_states(pipe, STATE_TRAJECTORIES, settings.steps, settings.seed + 1)
    images, seconds = _sample(pipe, settings, "float", report)
    plain = 2 * sum(layer.weight.numel() for layer in quantizable_layers(pipe.unet).values())
    runs, strips = [_float_run(images, seconds / settings.images, plain)], [images[:STRIP]]
    for name in settings.recipes:
        row, made = _quantized_run(pipe, name, settings, states, images, report)
        runs.append(row)
        strips.append(made[:STRIP])
    results = {
        "schema": 1,
        "model": "halfbyte demo: a DDPM UNet of Fashion-MNIST, 4.3 M parameters",
        "created": date.today().isoformat(),
        "environment": environment(),
        "settings": {
            "images": settings.images,
            "steps": settings.steps,
            "seed": settings.seed,
            "sampler": type(pipe.scheduler).__name__,
            "features": "DemoFeatures (64 features of a Fashion-MNIST classifier)",
            "reference_count": int(_reference().count),
        },
        "runs": runs,
    }
    return results, torch.cat(strips)


def _sample(pipe: Any, settings: Settings, name: str, report: Report | None) -> tuple[Tensor, float]:
    share = settings.images * settings.steps
    before = 0 if name == "float" else share * (1 + settings.recipes.index(name))

    def progress(done: int, _: int) -> None:
        if report:
            report(f"sampling {name}", before + done, settings.work)

    started = time.perf_counter()
    images = sample_images(pipe, settings.images, settings.steps, settings.seed, progress=progress)
    return images, time.perf_counter() - started


def _float_run(images: Tensor, seconds: float, size: int) -> dict[str, Any]:
    return {
        "recipe": "float",
        "weights": "float32",
        "activations": "float32",
        "bits": 16.0,
        "bytes": size,
        "bytes_bf16": size,
        "sqnr": None,
        "sqnr_by_timestep": [],
        "psnr": None,
        "ssim": None,
        "frechet": frechet_to_real(images),
        "seconds_per_image": seconds,
        "layers": [],
        "images": data_uri(grid_png(images[:PICTURED], 8)),
    }


def _quantized_run(
    pipe: Any, name: str, settings: Settings, states: Any, reference: Tensor, report: Report | None
) -> tuple[dict[str, Any], Tensor]:
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    calibration = CALIBRATION if get_recipe(name).needs_calibration else None
    result = quantize(student, name, calibration, steps=settings.steps, seed=settings.seed + 2)
    sqnr, by_timestep = prediction_sqnr(student.unet, states)
    damage = layer_sqnr(pipe.unet, student.unet, states.calls[:: max(1, len(states.calls) // LAYER_CALLS)])
    images, seconds = _sample(student, settings, name, report)
    stored, plain = stored_bytes(student.unet)
    row = {
        "recipe": name,
        "weights": result.recipe.inner.weight.describe(),
        "activations": result.recipe.inner.activation.describe() if result.recipe.inner.activation else "float",
        "bits": 16 * stored / plain,
        "bytes": stored,
        "bytes_bf16": plain,
        "sqnr": sqnr,
        "sqnr_by_timestep": [list(pair) for pair in by_timestep],
        "psnr": spread(psnr(reference, images)),
        "ssim": spread(ssim(reference, images)),
        "frechet": frechet_to_real(images),
        "seconds_per_image": seconds / settings.images,
        "layers": layer_rows(result, damage),
        "images": data_uri(grid_png(images[:PICTURED], 8)),
    }
    return row, images


def layer_rows(result: Result, damage: dict[str, float]) -> list[dict[str, Any]]:
    """The layer table of a result, as the report wants it."""
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weight": layer.spec.weight.describe() if layer.spec else None,
            "activation": layer.spec.activation.describe() if layer.spec and layer.spec.activation else None,
            "bits": layer.bits,
            "reason": layer.reason,
            "weight_sqnr": layer.weight_sqnr,
            "output_sqnr": damage.get(layer.name),
            "choice": None if layer.choice is None or layer.spec is None else choice_row(layer.spec, layer.choice),
        }
        for layer in result.layers
    ]


def choice_row(spec: LayerSpec, choice: GridChoice) -> dict[str, Any]:
    """What a grid search found for a layer, as the report wants it."""
    grid = get_grid(spec.activation.grid) if spec.activation else None
    return {
        "weight_grid": spec.weight.grid,
        "input_grid": grid.name if grid else "float",
        "maxval": choice.input_scale * (grid.top - choice.input_zero) if grid else math.inf,
        "offset": -choice.input_scale * choice.input_zero,
        "low": choice.input_range[0],
        "high": choice.input_range[1],
        "weight_errors": choice.weight_errors,
        "input_errors": choice.input_errors,
    }


def _reference() -> FeatureStatistics:
    """Features of the 60,000 real training images."""
    from halfbyte.demo.features import load_statistics

    sums = load_statistics()
    return FeatureStatistics(sums["features_sum"], sums["features_cov_sum"], int(sums["count"]))


@torch.inference_mode()
def frechet_to_real(images: Tensor) -> float:
    """Frechet distance of images (N, 1, 32, 32) to the real ones, on the demo's own features; not comparable with FID."""
    from halfbyte.demo.features import DemoFeatures

    found = FeatureStatistics.empty(DemoFeatures.num_features)
    found.update(DemoFeatures.load().features(images))
    return frechet_distance(found, _reference())


def environment() -> dict[str, str]:
    """What the figures depend on: versions, threads, processor, backend."""
    versions = {name: importlib.metadata.version(name) for name in ("halfbyte", "torch", "diffusers")}
    return {
        **versions,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "backend": describe(),
    }


def check_extras() -> None:
    """Raises MissingExtraError before any work is done when the report or the metrics could not be made."""
    for module in ("torchmetrics", "PIL", "jinja2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f"the demo needs {module}; install it with: pip install 'halfbyte[eval,report]'")
