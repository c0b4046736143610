"""ComfyUI's quantized layers, byte by byte: which of ours they hold, and that a naive reader finds the same numbers."""

import json

import pytest
import torch

from halfbyte.comfyui.layout import INT8, NVFP4, TENSORS, Matrix, fits, format_of, loss, mark, sizes, to_tiles
from halfbyte.errors import ModelError
from halfbyte.presets import PRESETS
from halfbyte.quantizers import quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec

NVFP4_WEIGHT = PRESETS["nvfp4-w4a4"].inner.weight
HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 as its own specification counts


def quantized(spec, rows, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, count, generator=generator) * torch.randn(rows, count, generator=generator).exp()
    values[: rows // 4] *= 1e-4
    values[-1] = 0
    weight = quantize_weight(values, weight_scale(values, spec), spec)
    return Matrix(weight.levels, weight.scale, spec), weight.dequantize()


@pytest.mark.parametrize("grid", ["int4", "e2m1", "e1m2", "e3m0", "int8"])
@pytest.mark.parametrize("shape", [(5, 7), (16, 48)])
def test_int8_holds_every_grid_of_whole_numbers(grid, shape):
    matrix, expected = quantized(WeightSpec(grid), *shape)
    found = TENSORS[INT8](matrix)
    assert {name: (tuple(one.shape), one.dtype) for name, one in found.items()} == sizes(INT8, *shape)
    assert torch.equal(found["weight"].float() * found["weight_scale"], expected)


def test_int8_holds_shifted_levels():
    matrix, expected = quantized(WeightSpec("lzs4", max_shift=4), 16, 40)
    found = TENSORS[INT8](matrix)
    assert found["weight"].abs().max() == 112
    assert torch.equal(found["weight"].float() * found["weight_scale"], expected)


def read_nvfp4(tensors, rows, count):
    """One value at a time, as the layout is described."""
    codes, tiles, along = tensors["weight"], tensors["weight_scale"].flatten(), -(-count // 64)
    values = torch.empty(rows, count)
    for row in range(rows):
        for column in range(count):
            byte = int(codes[row, column // 2])
            code = byte >> 4 if column % 2 == 0 else byte & 15
            number = HALVES[code & 7] * (-1 if code & 8 else 1)
            block = column // 16
            tile = row // 128 * along + block // 4
            small = tiles[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4].float()
            values[row, column] = number * (tensors["weight_scale_2"] * small)
    return values


@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (144, 32), (272, 64)])
def test_nvfp4_is_read_back_to_the_bit(shape):
    matrix, expected = quantized(NVFP4_WEIGHT, *shape)
    found = TENSORS[NVFP4](matrix)
    assert {name: (tuple(one.shape), one.dtype) for name, one in found.items()} == sizes(NVFP4, *shape)
    assert torch.equal(read_nvfp4(found, *shape), expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_one_float32_is_found_again(seed):
    """Whatever the largest scale was: the quotient by 448 may be the neighbour of the number it came from."""
    matrix, _ = quantized(NVFP4_WEIGHT, 16, 64, seed)
    found = TENSORS[NVFP4](matrix)
    tile = found["weight_scale"].view(torch.uint8).flatten()  # the only one
    back = tile.view(32, 4, 4)[:16, 0].contiguous().view(torch.float8_e4m3fn).float()
    assert torch.equal(back * found["weight_scale_2"] / 2, matrix.scale)


def test_scales_of_another_kind_are_refused():
    matrix, _ = quantized(NVFP4_WEIGHT.replace(group_scale="float32"), 16, 64)
    with pytest.raises(ModelError, match="no e4m3 multiples of one float32"):
        TENSORS[NVFP4](matrix)


def test_tiles():
    """Golden: where rows 0, 1, 32 and 128, blocks 0, 1 and 4 go in a 160 x 5 matrix."""
    scale = torch.zeros(160, 5)
    places = {(0, 0): 0, (0, 1): 1, (1, 0): 16, (32, 0): 4, (127, 3): 511, (0, 4): 512, (128, 0): 1024}
    for number, (row, block) in enumerate(places, 1):
        scale[row, block] = number
    tiled = to_tiles(scale.to(torch.float8_e4m3fn)).flatten().float()
    assert {int(at): int(tiled[at]) for at in tiled.nonzero().flatten()} == {at: i for i, at in enumerate(places.values(), 1)}
    assert tiled.shape == (256 * 8,)


def test_the_mark_is_json():
    assert json.loads(mark(INT8, False).numpy().tobytes()) == {"format": "int8_tensorwise"}
    assert json.loads(mark(NVFP4, True).numpy().tobytes()) == {"format": "nvfp4", "full_precision_matrix_mult": True}


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_has_an_answer(name):
    """A format that holds it, or a loss in words; int8 for all that can be packed."""
    spec = PRESETS[name].inner
    assert (format_of(spec.weight) is None or spec.low_rank) == bool(loss(spec, smoothed=False))
    if spec.simulated_only() is None:
        assert format_of(spec.weight) == INT8
        assert spec.weight.top <= 127


LOSSES = {
    "sets": (LayerSpec(WeightSpec(sets=2)), False, "all but one of its 2 sets of weights"),
    "branch": (LayerSpec(low_rank=8), False, "branch of rank 8"),
    "smoothing": (LayerSpec(), True, "the factors that smooth its input"),
    "groups": (LayerSpec(WeightSpec(group=64)), False, "int4 g64: what can be held is one scale an output channel"),
    "codebook": (LayerSpec(WeightSpec("nf4")), False, "nf4"),
    "mxfp4": (PRESETS["mxfp4-w4a4"].inner, False, "e2m1 g32 e8m0"),
}


@pytest.mark.parametrize(("spec", "smoothed", "words"), LOSSES.values(), ids=LOSSES)
def test_what_would_be_lost(spec, smoothed, words):
    assert words in loss(spec, smoothed)


def test_nvfp4_takes_whole_blocks_only():
    assert fits(NVFP4, 16, 32)
    assert not fits(NVFP4, 24, 32)
    assert not fits(NVFP4, 16, 24)
    assert fits(INT8, 3, 5)
    assert loss(LayerSpec(activation=ActivationSpec("int8")), False) is None
