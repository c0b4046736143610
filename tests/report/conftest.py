"""Made-up results of an evaluation, and what it gathers of a layer's codes."""

import math
from collections.abc import Callable

import pytest
import torch

from halfbyte.presets import get_recipe
from halfbyte.report.pictures import data_uri, grid_png
from halfbyte.sensitivity import LayerDamage, Sensitivity

EVIL = "<script>alert('$x_{1')</script>"
LAYERS = ("conv_in", "down_blocks.0.conv1", "down_blocks.0.conv2", "down_blocks.1.to_q", f"mid_block.{EVIL}", "conv_out")
INPUT_CODES = {"grid": "lzs4", "entropy": 3.2, "plain": 2.5, "steps": [1, 2], "shifts": [0.5, 0.5], "step": 0.1, "zero": 0.0}
INPUT_CODES |= {"low": -15.0, "high": 15.0, "counts": [1, 20, 300, 20], "outside": 0.0}


def make_input_codes(grid="lzs4", shifts=(0.1, 0.2, 0.3, 0.3, 0.1), low=-112.5, high=112.5, **changes):
    """A bell of values."""
    counts = [round(10_000 * math.exp(-(((index - 31.5) / 9) ** 2))) for index in range(64)]
    made = {"grid": grid, "entropy": 3.25, "plain": 2.5, "shifts": list(shifts), "step": 0.05, "zero": 0.0}
    made["steps"] = [2**shift for shift in range(len(changes.get("shifts", shifts)))]
    return made | {"low": low, "high": high, "counts": counts, "outside": 0.0} | changes


def make_weight_codes(grid="lzs4", entropy=3.5, plain=3.25):
    return {"grid": grid, "entropy": entropy, "plain": plain}


def make_bench():
    """What `halfbyte bench --json` writes: a model and two layers."""

    def row(case, contestant, seconds, **more):
        return {"case": case, "contestant": contestant, "seconds": seconds, "ratio_to": {}, "weight_bytes_of_bf16": None} | more

    own = {"weight_bytes_of_bf16": 0.27}
    rows = [row("linear 4096x3072x3072", "torch bf16", 0.04), row("linear 4096x3072x3072", "quartz-w4a4", 0.01, **own)]
    rows += [row("conv 3x3/1", "quartz-w4a8", 0.002, **own), row("conv 3x3/1", "torch fp32", 0.01)]
    about = {"about": "a UNet, <one> image"}
    rows += [row("unet", "quartz-w4a4", 0.5, **own, **about), row("unet", "torch bf16", 1.0, **about)]
    return {"environment": {"torch": "2", "threads": "2"}, "rows": rows}


def make_study(names=tuple(f"layers.{n}" for n in range(40)), weights=4608):
    """A measurement of sensitivity at two timesteps, the last layer the most sensitive; of more layers than are shown at first."""
    ladder = {width: get_recipe(name).inner for width, name in (("w4a4", "quartz-w4a4"), ("w8a8", "int8-w8a8"))}
    damage = [[1.2 ** (n + 1 - len(names)), 0.5] for n in range(len(names))]
    layers = [
        LayerDamage(name, "inner", weights, 10, 100, {"w4a4": values, "w8a8": [value / 100 for value in values]})
        for name, values in zip(names, damage, strict=True)
    ]
    families = [LayerDamage("inner", "inner", weights * len(names), 10, 100, {width: [1.0, 0.5] for width in ladder})]
    return Sensitivity("UNet", [900.0, 0.0], ladder, layers, families)


@pytest.fixture(scope="session")
def study():
    return make_study


@pytest.fixture(scope="session")
def input_codes():
    return make_input_codes


@pytest.fixture(scope="session")
def weight_codes():
    return make_weight_codes


@pytest.fixture(scope="session")
def bench():
    return make_bench


def _layer(name: str, sqnr: float | None) -> dict:
    kept = sqnr is None
    return {
        "name": name,
        "kind": "Conv2d",
        "shape": [32, 16, 3, 3],
        "weight": None if kept else "lzs4<<4/16",
        "activation": None if kept else "int8",
        "bits": 16.0 if kept else 4.25,
        "reason": "kept by the recipe" if kept else "inner layer",
        "weight_sqnr": None if kept else sqnr + 3,
        "output_sqnr": sqnr,
        "choice": None,
        "input_codes": None if kept else {**INPUT_CODES, "entropy": 3 + sqnr / 100},
        "weight_codes": None if kept else {"grid": "lzs4", "entropy": 3.5 + sqnr / 100, "plain": 3.25},
    }


def _figure(value: float, half: float | None = None, bias: float | None = None) -> dict:
    """A figure with an interval of that half length."""
    known = half is not None
    return {"value": value, "low": value - half if known else None, "high": value + half if known else None, "bias": bias}


def _run(recipe: str, sqnr: float | None, size: int, bits: float) -> dict:
    """A run; the float one where there is no SQNR."""
    none = sqnr is None
    return {
        "recipe": recipe,
        "weights": "lzs4<<4/16",
        "activations": "int8",
        "bits": bits,
        "bytes": size,
        "bytes_bf16": 8_000_000,
        "sqnr": sqnr,
        "sqnr_by_timestep": [] if none else [[900, sqnr + 2], [500, sqnr], [0, sqnr - 2]],
        "figures": {"frechet": _figure(1.234, 0.1, 0.5)}
        | ({} if none else {"psnr": _figure(sqnr + 8, 0.42), "ssim": _figure(0.9125)}),
        "published": [],
        "seconds_per_image": 0.0512,
        "layers": [] if none else [_layer(name, None if name == "conv_in" else sqnr + i) for i, name in enumerate(LAYERS)],
        "images": data_uri(grid_png(torch.linspace(0, 1, 256).view(4, 1, 8, 8), 2)),
    }


def _results() -> dict:
    runs = [
        _run("float", None, 8_000_000, 16.0),
        _run("quartz-w4a4", 16.44, 2_150_000, 4.3),
        _run("quartz-w4a8", 19.06, 2_150_000, 4.3),
        _run(EVIL, 7.9, 2_030_000, 4.06),
        _run("int8-w8a8", 31.5, 4_010_000, 8.02),
    ]
    runs[1]["published"] = [{"figure": "psnr", "value": 23.5, "source": "Somebody 2025"}]
    settings = {
        "images": 64,
        "steps": 20,
        "seed": 0,
        "batch": 32,
        "sampler": "DDIM",
        "arguments": {"guidance_scale": "1.5"},
        "features": "DemoFeatures",
        "digest": "0123456789abcdef0123",
        "reference": "training images",
        "reference_count": 60000,
    }
    environment = {"torch": "2.13.0", "threads": "2", EVIL: EVIL}
    made = {"schema": 2, "model": f"demo {EVIL}", "created": "2025-11-21", "environment": environment}
    return {**made, "settings": settings, "runs": runs}


@pytest.fixture(scope="session", name="EVIL")
def _evil() -> str:
    """A name that is markup."""
    return EVIL


@pytest.fixture(scope="session", name="LAYERS")
def _layers() -> tuple[str, ...]:
    return LAYERS


@pytest.fixture(scope="session")
def make_layer() -> Callable[[str, float | None], dict]:
    return _layer


@pytest.fixture(scope="session")
def figure() -> Callable[..., dict]:
    return _figure


@pytest.fixture(scope="session")
def make_results() -> Callable[[], dict]:
    return _results


@pytest.fixture
def results() -> dict:
    return _results()
