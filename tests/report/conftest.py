"""What an evaluation gathers of a layer's codes, made up."""

import math

import pytest


def make_input_codes(grid="lzs4", shifts=(0.1, 0.2, 0.3, 0.3, 0.1), low=-112.5, high=112.5, **changes):
    """A bell of values."""
    counts = [round(10_000 * math.exp(-(((index - 31.5) / 9) ** 2))) for index in range(64)]
    made = {"grid": grid, "entropy": 3.25, "plain": 2.5, "shifts": list(shifts), "step": 0.05, "zero": 0.0}
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


@pytest.fixture(scope="session")
def input_codes():
    return make_input_codes


@pytest.fixture(scope="session")
def weight_codes():
    return make_weight_codes


@pytest.fixture(scope="session")
def bench():
    return make_bench
