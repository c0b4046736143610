"""Baselines against oracles no one here wrote: ml_dtypes' block formats, numpy's singular values."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call, collect
from halfbyte.conversion import simulate
from halfbyte.errors import CalibrationError, ModelError, RecipeError
from halfbyte.methods.low_rank import low_rank_branch
from halfbyte.presets import PRESETS
from halfbyte.quantizers import quantize_activation, quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, WeightSpec

E4M3, E2M1, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu


def values(*shape, seed=0):
    x = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    x[..., : x.shape[-1] // 2] *= 10
    return x


def nvfp4(blocks, whole):
    """Blocks (..., g, 16) under one float32 scale: e4m3 scales, e2m1 values."""
    whole = whole / np.float32(448 * 6)
    scale = (np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / whole).clip(2.0**-6, 448).astype(E4M3).astype(
        np.float32
    ) * whole
    return (blocks / scale).clip(-6, 6).astype(E2M1).astype(np.float32) * scale


def mxfp4(blocks):
    """Blocks (..., g, 32): the power of two at or below the largest magnitude, over that of 6, as scale."""
    scale = np.exp2(np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2).astype(E8M0).astype(np.float32)
    return (blocks / scale).clip(-6, 6).astype(E2M1).astype(np.float32) * scale


def rounded(x, name):
    """A weight through a preset, as numpy."""
    spec, matrix = PRESETS[name].inner.weight, torch.tensor(x)
    return quantize_weight(matrix, weight_scale(matrix, spec), spec).dequantize().numpy()


def same_but_for_ties(found, expected, scale):
    """Equal up to float rounding; a value that falls between two levels may go to either."""
    apart = np.abs(found - expected) > 1e-6 * np.abs(expected).max()
    assert apart.mean() < 1e-3
    assert np.abs(found - expected).max() <= 2.1 * scale


@pytest.mark.parametrize("seed", range(5))
def test_weights_in_nvfp4_and_mxfp4_are_those_of_ml_dtypes(seed):
    x = values(24, 64, seed=seed)
    expected = nvfp4(x.reshape(24, -1, 16), np.abs(x).max()).reshape(x.shape)
    same_but_for_ties(rounded(x, "nvfp4-w4a4"), expected, np.abs(x).max() / 6)
    expected = mxfp4(x.reshape(24, -1, 32)).reshape(x.shape)
    assert np.array_equal(rounded(x, "mxfp4-w4a4"), expected)  # powers of two: no rounding but the grid's


@pytest.mark.parametrize("shape", [(5, 1, 64), (3, 7, 32)])
def test_activations_have_blocks_in_every_pixel(shape):
    x = values(*shape)
    integers, scale = quantize_activation(torch.tensor(x), PRESETS["mxfp4-w4a4"].inner.activation)
    assert np.array_equal((integers * scale).numpy(), mxfp4(x.reshape(*shape[:2], -1, 32)).reshape(shape))
    integers, scale = quantize_activation(torch.tensor(x), PRESETS["nvfp4-w4a4"].inner.activation)
    expected = nvfp4(x.reshape(*shape[:2], -1, 16), np.abs(x).max(-1)[..., None, None]).reshape(shape)
    same_but_for_ties((integers * scale).numpy(), expected, np.abs(x).max() / 6)


@pytest.mark.parametrize("name", ["nvfp4-w4a4", "mxfp4-w4a4", "int4-g64-w4a4"])
def test_zeros_short_tails_and_bad_values(name):
    spec = PRESETS[name].inner.activation
    x = torch.tensor(values(4, 2, 70))
    x[0], x[1, 0, :16], x[2, 1, 3] = 0, 0, torch.nan
    integers, scale = quantize_activation(x, spec)
    assert (integers[0] == 0).all()
    assert (integers[1, 0, :16] == 0).all()
    assert scale[2, 1, :16].isnan().all()
    assert scale[3].isfinite().all()
    assert not scale[2, 0].isnan().any()
    assert (integers * scale - x)[3].norm() < 0.2 * x[3].norm()
    zero = torch.zeros(3, 40)
    assert (
        quantize_weight(zero, weight_scale(zero, PRESETS[name].inner.weight), PRESETS[name].inner.weight).dequantize() == 0
    ).all()


def test_finer_blocks_and_finer_scales_help_in_the_known_order():
    x, error = values(64, 512), {}
    for name in ("int4-w4a4", "int4-g64-w4a4", "mxfp4-w4a4", "nvfp4-w4a4"):
        error[name] = np.square(rounded(x, name) - x).mean()
    assert error["nvfp4-w4a4"] < error["mxfp4-w4a4"] < error["int4-w4a4"]
    assert error["int4-g64-w4a4"] < error["int4-w4a4"]


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_low_rank_branch_is_that_of_a_plain_decomposition(rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 160, generator=generator)
    matrix += 4 * torch.randn(96, 4, generator=generator) @ torch.randn(4, 160, generator=generator)
    left, singular, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = np.square(singular[rank:]).sum() ** 0.5
    for exact in (True, False):
        branch = low_rank_branch(matrix, rank, exact)
        assert np.linalg.norm((matrix - branch).numpy()) < best * 1.01  # of the residual; bfloat16 factors included
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank]
    assert np.linalg.norm(low_rank_branch(matrix, rank, exact=True).numpy() - expected) < 0.01 * np.linalg.norm(expected)
    assert torch.equal(low_rank_branch(matrix, rank), low_rank_branch(matrix, rank))


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), (256, 64)),
    "conv": (lambda: nn.Conv2d(32, 48, 3, padding=1), (4, 32, 8, 8)),
    "grouped": (lambda: nn.Conv2d(32, 48, 3, groups=2), (4, 32, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_svdquant_beats_its_own_parts(name):
    make, shape = LAYERS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[:, ::7] *= 12  # channels with outliers
    svd, errors = PRESETS["svdquant-w4a4"], {}
    recipes = {
        "plain": svd.replace(smooth=None, inner=svd.inner.replace(low_rank=0)),
        "smoothed": svd.replace(inner=svd.inner.replace(low_rank=0)),
        "all": svd.replace(inner=svd.inner.replace(low_rank=16)),
    }
    for key, recipe in recipes.items():
        torch.manual_seed(0)
        model = nn.Sequential(make())
        with torch.no_grad():
            exact = model(x)
            found = collect(model, [Call((x,), {})], ["0"], rows=["0"]) if recipe.needs_calibration else None
            report = simulate(model, recipe.replace(edge=recipe.inner), found).layers[0]
            errors[key] = (model(x) - exact).norm() / exact.norm()
    assert errors["all"] < errors["smoothed"] < errors["plain"]
    assert report.bits > 4.5


def test_what_cannot_be_packed_or_searched_says_so(build, call):
    for name in ("nvfp4-w4a4", "svdquant-w4a4", "nf4-w4a16"):
        with pytest.raises(ModelError, match="pass simulate=True"):
            hb.quantize(build("UNet2DModel"), name, calibration=[call("UNet2DModel")])
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    found = collect(model, [Call((torch.ones(2, 8),), {})], ["0", "1", "2"])
    with pytest.raises(CalibrationError, match="its statistics need `rows`"):
        simulate(model, PRESETS["svdquant-w4a4"], found)
    for kind in (WeightSpec, ActivationSpec):
        with pytest.raises(RecipeError, match="e4m3 scales belong to groups; set group"):
            kind("e2m1", group_scale="e4m3")
    with pytest.raises(RecipeError, match="smooth must be 0 to 1, 'search' or null"):
        PRESETS["int4-w4a4"].smoothed(2)


@pytest.mark.parametrize("name", ["nvfp4-w4a4", "mxfp4-w4a4", "int4-g64-w4a4", "nf4-w4a16", "svdquant-w4a4"])
def test_every_baseline_runs_a_model_and_passes_gradients(build, call, name):
    model, arguments = build("DiTTransformer2DModel"), call("DiTTransformer2DModel")
    hb.quantize(model, name, calibration=[arguments], simulate=True)
    model(**arguments).sample.square().mean().backward()
    gradients = [parameter.grad for parameter in model.transformer_blocks.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
