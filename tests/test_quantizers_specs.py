"""Whole weights and activations through their specs: every grid, shift, zero point and group against slow numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.formats import GRIDS, decode, get_grid
from halfbyte.packing import pack_multipliers, unpack_multipliers
from halfbyte.quantizers import (
    FixedScale,
    decode_weight,
    quantize_activation,
    quantize_weight,
    round_activation,
    straight_through,
    weight_scale,
)
from halfbyte.recipe import ActivationSpec, WeightSpec

MAGNITUDES = {
    "int4": range(8),
    "lzs4": range(8),
    "e2m1": [0, 1, 2, 3, 4, 6, 8, 12],
    "e1m2": range(8),
    "e3m0": [0, 1, 2, 4, 8, 16, 32, 64],
    "ue2m2": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
    "ue1m3": range(16),
    "ue3m1": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
    "int8": range(128),
    "uint8": range(256),
}
SHIFTS = {"lzs4": 4, "e2m1": 3, "e1m2": 4, "ue2m2": 3, "ue1m3": 4}
SHAPES = [(0, 1, 5), (2, 0, 5), (1, 1, 1), (3, 1, 16), (2, 3, 17), (1, 4, 33), (4, 1, 7)]
TINY = np.finfo(np.float32).tiny


def activation_specs():
    for name, grid in ((name, grid) for name, grid in GRIDS.items() if not grid.simulated_only):
        plain = ActivationSpec(name, zero_point=not grid.signed)
        yield plain
        yield plain.replace(group=8)
        yield plain.replace(peak=5)
        for subgroup in (7, 16) if name in SHIFTS else ():
            shifted = plain.replace(max_shift=SHIFTS[name], subgroup=subgroup)
            yield from (shifted, shifted.replace(max_shift=1), shifted.replace(group=16), shifted.replace(peak=105))
            if grid.contiguous:
                yield shifted.replace(rounding="truncate", peak=127)


ACTIVATION_SPECS = [*activation_specs()]
WEIGHT_SPECS = [WeightSpec(name) for name, grid in GRIDS.items() if grid.signed and not grid.simulated_only]
WEIGHT_SPECS += [WeightSpec(name, max_shift=shift) for name in SHIFTS if name[0] != "u" for shift in range(1, SHIFTS[name] + 1)]
WEIGHT_SPECS += [WeightSpec("lzs4", max_shift=4, subgroup=subgroup) for subgroup in (1, 7, 32, 64)]
WEIGHT_SPECS += [WeightSpec(name, max_multiple=most) for name, most in (("int4", 16), ("lzs4", 16), ("e1m2", 3), ("e2m1", 10))]
WEIGHT_SPECS += [WeightSpec("e2m1", max_multiple=10, subgroup=subgroup) for subgroup in (1, 7, 32)]
WEIGHT_SPECS += [WeightSpec(name, group=group) for name in ("int4", "e2m1") for group in (1, 16, 64)]

SYMMETRIC = [spec for spec in ACTIVATION_SPECS if not spec.zero_point]

every_activation = pytest.mark.parametrize("spec", ACTIVATION_SPECS, ids=lambda spec: f"{spec.describe()}_{spec.peak}")
every_weight = pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=WeightSpec.describe)


def nearest(units, name):
    """Levels nearest to float32 numbers; of two equally near, the one of even magnitude index."""
    levels = [(m, i) for i, m in enumerate(MAGNITUDES[name])]
    if name[0] != "u":
        levels += [(-m, i) for m, i in levels] + {"int4": [(-8, 8)], "int8": [(-128, 128)]}.get(name, [])
    table = np.array([level for level, index in sorted(levels, key=lambda pair: pair[1] % 2)], dtype=np.float64)
    return table[np.abs(np.float64(units)[..., None] - table).argmin(-1)] + 0.0


def suppress_zeros(row, spec):
    """Stage 2 on the 8-bit integers of one pixel."""
    top, done = MAGNITUDES[spec.grid][-1], []
    for start in range(0, len(row), spec.subgroup):
        part = row[start : start + spec.subgroup]
        flag = min(max(int(np.abs(part).max()).bit_length() - top.bit_length(), 0), spec.max_shift)
        more = min(flag + 1, spec.max_shift)
        low, high = (nearest(part / 2**shift, spec.grid) * 2**shift for shift in (flag, more))
        if spec.rounding == "truncate":
            done.append(np.sign(part) * np.minimum(np.abs(part) // 2**flag, top) * 2**flag)
        else:
            done.append(high if ((high - part) ** 2).sum() < ((low - part) ** 2).sum() else low)
    return np.concatenate(done)


def slow_activation(x, spec):
    """Integers (r, p, c) and scales alike: stage 1 one block of equal scale at a time, then stage 2 one pixel at a time."""
    integers, scales, zeros = np.zeros(x.shape), np.zeros(x.shape, np.float32), np.zeros(x.shape)
    pixels = [slice(pixel, pixel + 1) for pixel in range(x.shape[1])] if spec.group else [slice(None)]
    width = spec.group or x.shape[2]
    for row, pixel, start in itertools.product(range(len(x)), pixels, range(0, x.shape[2], width)):
        here = row, pixel, slice(start, start + width)
        block, zero = x[here], np.float32(0)
        low, high = min(block.min(), np.float32(0)), max(block.max(), np.float32(0))
        scale = (high - low if spec.zero_point else np.abs(block).max()) / np.float32(spec.top)
        scale = np.float32(1) if scale < TINY else scale
        if spec.zero_point:
            zero = np.rint(-low / scale)
        units = block * (np.float32(1) / scale) + zero
        stage1 = np.rint(units).clip(0 if spec.zero_point else -spec.top, spec.top)
        integers[here] = stage1 if spec.max_shift else nearest(units, spec.grid)
        scales[here], zeros[here] = scale, zero
    if spec.max_shift:
        for pixel in np.ndindex(x.shape[:2]):
            integers[pixel] = suppress_zeros(integers[pixel], spec)
    return integers - zeros, scales


def inputs(shape, seed=0):
    """Long-tailed numbers, with a row of zeros and a skewed one where there is room."""
    x = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    x[1:2] = 0
    x[2:3] = np.abs(x[2:3]) - np.float32(0.2)
    return x


@every_activation
def test_activations_are_the_oracle_bit_for_bit(spec):
    for shape in SHAPES:
        x = inputs(shape)
        integers, scale = quantize_activation(torch.tensor(x), spec)
        assert (integers.dtype, scale.dtype, integers.shape) == (torch.float32, torch.float32, shape)
        if x.size == 0:
            continue
        expected, scales = slow_activation(x, spec)
        assert np.array_equal(integers.numpy(), expected), shape
        assert np.array_equal(scale.expand(shape).numpy(), scales), shape
        assert scale.shape == (shape if spec.group else (shape[0], 1, 1))
        assert not integers[integers == 0].signbit().any()


@every_activation
def test_integers_stay_within_a_byte_and_close_to_the_input(spec):
    x = torch.tensor(inputs((5, 3, 40)))
    integers, scale = quantize_activation(x, spec)
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() <= (255 if spec.zero_point else 128)
    fine = get_grid(spec.grid).signed or get_grid(spec.grid).contiguous  # unsigned minifloats are coarse far above their minimum
    if fine and spec.peak == 0 and spec.rounding == "nearest":
        error = (integers * scale - x).square().sum((1, 2)) / x.square().sum((1, 2)).clamp(min=1e-30)
        assert error.max() < 0.06, "12 dB at the least"


@every_activation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_spoils_its_own_row_alone(spec, bad):
    x = torch.tensor(inputs((4, 2, 20)))
    clean, clean_scale = quantize_activation(x, spec)
    x[1, 1, 3] = bad
    integers, scale = quantize_activation(x, spec)
    spoilt = scale.isnan().expand_as(x)
    pixels, channels = slice(1 if spec.group else 0, None), slice(0, spec.group or None)
    assert spoilt[1, pixels, channels].all()
    assert int(spoilt.sum()) == len(range(2)[pixels]) * len(range(20)[channels])
    assert (integers[spoilt] == 0).all()
    assert torch.equal(integers[~spoilt], clean[~spoilt]) or (spec.group and spec.max_shift)  # a subgroup may span two groups
    assert torch.equal(scale[[0, 2, 3]], clean_scale[[0, 2, 3]])


@every_activation
def test_dtypes_and_layouts(spec):
    x = torch.tensor(inputs((3, 4, 20)))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = x.to(dtype)
        assert all(map(torch.equal, quantize_activation(cast, spec), quantize_activation(cast.float(), spec)))
    expected = quantize_activation(x, spec)
    wide = torch.zeros(3, 4, 60)
    wide[..., ::3] = x
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), x.permute(1, 2, 0).contiguous().permute(2, 0, 1), wide[..., ::3]):
        before = view.clone()
        assert all(map(torch.equal, quantize_activation(view, spec), expected))
        assert torch.equal(view, before), "the input is not changed"


@settings(max_examples=40, deadline=None)
@given(power=st.integers(-60, 60), seed=st.integers(0, 99), spec=st.sampled_from(ACTIVATION_SPECS))
def test_a_power_of_two_moves_into_the_scale(power, seed, spec):
    x = torch.tensor(inputs((3, 2, 20), seed))
    x[1] = 1.0  # a row of zeros keeps its scale of 1
    integers, scale = quantize_activation(x, spec)
    moved, moved_scale = quantize_activation(x * 2.0**power, spec)
    assert torch.equal(moved, integers)
    assert torch.equal(moved_scale, scale * 2.0**power)


@pytest.mark.parametrize("spec", SYMMETRIC, ids=lambda spec: f"{spec.describe()}_{spec.peak}")
def test_signed_activations_are_odd(spec):
    x = torch.tensor(inputs((3, 2, 20)))
    integers, scale = quantize_activation(x, spec)
    mirrored, mirrored_scale = quantize_activation(-x, spec)
    assert torch.equal(mirrored, -integers)
    assert torch.equal(mirrored_scale, scale)


def matrices():
    """Weight matrices (O, K) at the edges of every size, one with a row of zeros, one in bfloat16."""
    for shape in ((1, 1), (5, 16), (3, 17), (2, 100)):
        yield torch.tensor(inputs(shape))
    yield torch.tensor(inputs((4, 40))).bfloat16()


@every_weight
def test_codes_and_multipliers_hold_the_whole_weight(spec):
    for matrix in matrices():
        scale = weight_scale(matrix.float(), spec)
        quantized = quantize_weight(matrix, scale, spec)
        codes = quantized.codes()
        groups = -(-matrix.shape[1] // spec.subgroup)
        assert (codes.dtype, codes.shape, scale.dtype) == (torch.uint8, matrix.shape, torch.float32)
        assert int(codes.max()) < 2 ** get_grid(spec.grid).bits
        if get_grid(spec.grid).coding == "sign-magnitude":
            assert not (codes == 8).any(), "negative zero is never produced"
        assert (quantized.multiplier is None) == (spec.max_shift == spec.max_multiple == 0)
        if quantized.multiplier is not None:
            assert (quantized.multiplier.dtype, quantized.multiplier.shape) == (torch.uint8, (len(matrix), groups))
            allowed = range(1, spec.max_multiple + 1) if spec.max_multiple else [2**shift for shift in range(spec.max_shift + 1)]
            assert {*quantized.multiplier.unique().tolist()} <= {*allowed}
            packed = pack_multipliers(quantized.multiplier, spec.max_multiple > 0)
            assert torch.equal(unpack_multipliers(packed, groups, spec.max_multiple > 0), quantized.multiplier)
        assert torch.equal(decode_weight(codes, quantized.multiplier, spec), quantized.levels)
        assert quantized.levels.abs().max() <= 128


@every_weight
def test_decoding_in_plain_python(spec):
    """value = level[code] * multiplier, times the scale of the row or of the group."""
    matrix = torch.tensor(inputs((4, 40)))
    quantized = quantize_weight(matrix, weight_scale(matrix, spec), spec)
    codes, levels = quantized.codes().tolist(), get_grid(spec.grid).levels
    dense = quantized.dequantize()
    for row, column in itertools.product(range(4), range(40)):
        multiplier = 1 if quantized.multiplier is None else int(quantized.multiplier[row, column // spec.subgroup])
        integer = levels[codes[row][column]] * multiplier
        scale = quantized.scale[row, column // spec.group if spec.group else 0]
        assert quantized.levels[row, column] == integer
        assert dense[row, column] == integer * scale


@every_weight
def test_weights_without_multipliers_are_nearest_and_all_are_stable(spec):
    matrix = torch.tensor(inputs((5, 48)))
    scale = weight_scale(matrix, spec)
    quantized = quantize_weight(matrix, scale, spec)
    again = quantize_weight(quantized.dequantize(), scale, spec)
    assert torch.equal(again.levels, quantized.levels)
    if not spec.has_multipliers:
        wide = scale.repeat_interleave(spec.group, 1)[:, :48] if spec.group else scale
        assert np.array_equal(quantized.levels.numpy(), nearest((matrix / wide).numpy(), spec.grid))
        assert torch.equal(decode(quantized.codes(), get_grid(spec.grid)), quantized.levels)


def test_a_row_of_zeros_is_scale_one_and_code_zero():
    for spec in WEIGHT_SPECS:
        matrix = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, -0.0, 0.0, 0.0]])
        quantized = quantize_weight(matrix, weight_scale(matrix, spec), spec)
        assert (quantized.scale[1] == 1).all()
        assert quantized.codes()[1].tolist() == [0] * 4
        assert quantized.multiplier is None or (quantized.multiplier[1] == 1).all()


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    exact = torch.linspace(-2, 2, 9, requires_grad=True)
    rounded = exact.detach().round()
    value = straight_through(exact * 3, rounded)
    assert torch.equal(value, rounded)
    seen = torch.arange(9.0)
    (value * seen).sum().backward()
    assert torch.equal(exact.grad, 3 * seen)
    with torch.no_grad():
        assert torch.equal(straight_through(exact, rounded), rounded)
    assert not straight_through(exact.detach(), rounded).requires_grad


@pytest.mark.parametrize(
    "spec",
    [
        ActivationSpec("int8"),
        ActivationSpec("lzs4", max_shift=4),
        ActivationSpec("ue2m2", zero_point=True),
        ActivationSpec("e2m1", scale="static"),
        ActivationSpec("int4", group=4),
    ],
)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (5, 7, 9), (3, 300, 200)])
def test_a_rounded_input_is_integers_times_scales(spec, shape):
    """In parts, into one output: the same bits, also for rows with a NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.numel():
        x[0, 0, 0] = torch.nan
    fixed = FixedScale(torch.tensor(0.2), torch.tensor(0)) if spec.scale == "static" else None
    integers, scale = quantize_activation(x, spec, fixed)
    assert torch.equal(round_activation(x, spec, fixed).nan_to_num(7.0), (integers * scale).nan_to_num(7.0))
    assert round_activation(x.transpose(1, 2).contiguous().transpose(1, 2), spec, fixed).is_contiguous()
