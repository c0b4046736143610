"""Rounding with shifts against a slow oracle of its docstring, bit for bit; scale searches against brute force."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import quantizers
from halfbyte.formats import get_grid, round_to_grid
from halfbyte.quantizers import (
    absmax_scale,
    minmax_scale,
    round_units,
    round_with_multiples,
    round_with_shifts,
    search_scale,
    spread,
    weight_scale,
)
from halfbyte.recipe import WeightSpec

# Magnitudes of the grids that carry shifts, and their largest shift.
MAGNITUDES = {
    "lzs4": (range(8), 4),
    "e1m2": (range(8), 4),
    "e2m1": ([0, 1, 2, 3, 4, 6, 8, 12], 3),
    "ue1m3": (range(16), 4),
    "ue2m2": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28], 3),
}
INTEGER_GRIDS = ("lzs4", "e1m2", "ue1m3")
TINY = float(np.finfo(np.float32).tiny)

every_grid = pytest.mark.parametrize("name", MAGNITUDES)


def tensor(values):
    return torch.tensor(np.asarray(values, dtype=np.float32))


def nearest(value, name):
    """The nearest level; of two equally near, the one of even magnitude index."""
    magnitudes = list(MAGNITUDES[name][0])
    levels = {(m, i) for i, m in enumerate(magnitudes)}
    if not name.startswith("u"):
        levels |= {(-m, i) for m, i in levels}
    return min(levels, key=lambda level: (abs(value - level[0]), level[1] % 2))[0]


def candidates(values, name, max_shift):
    """Shift -> rounded values, for FLAG and the shift after it, FLAG first."""
    top = MAGNITUDES[name][0][-1]
    flag = min(max(int(max(map(abs, values))).bit_length() - top.bit_length(), 0), max_shift)
    shifts = (flag, min(flag + 1, max_shift))
    return {shift: [nearest(value / 2**shift, name) * 2**shift for value in values] for shift in shifts}


def error(rounded, values):
    return sum((a - b) ** 2 for a, b in zip(rounded, values, strict=True))


def oracle(values, name, max_shift):
    found = candidates(values, name, max_shift)
    shift = min(found, key=lambda shift: error(found[shift], values))  # the first of equals is FLAG
    return found[shift], shift


def truncated(values, name, max_shift):
    top, shift = MAGNITUDES[name][0][-1], min(candidates(values, name, max_shift))
    kept = [min(int(abs(value)) >> shift, top) << shift for value in values]
    return [-k if value < 0 else k for k, value in zip(kept, values, strict=True)], shift


def by_subgroups(rows, subgroup, function, *args):
    """A function of one subgroup, over rows of numbers: the rounded rows and the rows of shifts."""
    exact = [[Fraction(float(value)) for value in row] for row in rows]
    parts = [[function(row[i : i + subgroup], *args) for i in range(0, len(row), subgroup)] for row in exact]
    return [[value for part, _ in row for value in part] for row in parts], [[shift for _, shift in row] for row in parts]


def awkward_units(name, columns):
    """Whole numbers and quarters, where ties and equal errors abound, and rows at the edges of every shift."""
    generator = np.random.default_rng(columns)
    limit = (MAGNITUDES[name][0][-1] << MAGNITUDES[name][1]) * 1.2
    integers = np.rint(generator.laplace(0, limit / 12, (6, columns))).clip(-limit, limit)
    quarters = np.rint(generator.normal(0, limit / 4, (4, columns))) / 4
    edges = np.resize(
        [7, 8, 15, 16, 31, 32, 63, 64, 127, 0, 0.5, 7.5, 7.75, 12, 14, 15.5, 111, 112, 120, 200, 300, 1e-40], (2, columns)
    )
    return np.concatenate([integers, quarters, edges, -edges, np.zeros((1, columns))]).astype(np.float32)


HAND = [  # the vectors of the QuaRTZ notes: input, FLAG, rounded, truncated
    ([3, -2, 5, 0], 0, [3, -2, 5, 0], [3, -2, 5, 0]),
    ([100, 3, -2, 10], 4, [96, 0, 0, 16], [96, 0, 0, 0]),
    ([15, 1, -7, 8], 1, [14, 0, -8, 8], [14, 0, -6, 8]),
    ([127, -64, 20, 5], 4, [112, -64, 16, 0], [112, -64, 16, 0]),
    ([0, 0, 0, 0], 0, [0, 0, 0, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("values", "flag", "rounded", "cut"), HAND)
def test_vectors_by_hand(values, flag, rounded, cut):
    for truncate, expected in ((False, rounded), (True, cut)):
        levels, shift = round_with_shifts(tensor(values), get_grid("lzs4"), 4, 4, truncate)
        assert levels.tolist() == expected
        assert shift.tolist() == [flag]
        assert not levels[levels == 0].signbit().any()


def test_the_shift_after_flag_is_taken_where_it_is_nearer():
    cases = [
        ([31, 0, 0, 0], 4, [32, 0, 0, 0], 3),  # FLAG 2 would saturate at 28
        ([31, 4, 4, 4], 4, [28, 4, 4, 4], 2),  # but there the fours would vanish
        ([15, 0, 0, 0], 4, [14, 0, 0, 0], 1),  # 14 and 16 are equally near: FLAG
        ([15.5, 0, 0, 0], 4, [16, 0, 0, 0], 2),
        ([31, 0, 0, 0], 2, [28, 0, 0, 0], 2),  # not beyond the largest shift
    ]
    for values, max_shift, expected, shift in cases:
        levels, shifts = round_with_shifts(tensor(values), get_grid("lzs4"), max_shift, 4)
        assert (levels.tolist(), shifts.tolist()) == (expected, [shift])


@every_grid
@pytest.mark.parametrize("subgroup", [1, 7, 16, 32])
@pytest.mark.parametrize("columns", [1, 33])
def test_rounding_with_shifts_is_the_oracle_bit_for_bit(name, subgroup, columns):
    """Errors of quarters are exact in float32, so every choice, ties included, is the documented one."""
    units = awkward_units(name, columns)
    for max_shift in (1, MAGNITUDES[name][1]):
        levels, shifts = round_with_shifts(tensor(units), get_grid(name), max_shift, subgroup)
        expected, expected_shifts = by_subgroups(units, subgroup, oracle, name, max_shift)
        assert levels.tolist() == expected
        assert shifts.tolist() == expected_shifts
        assert (levels.dtype, shifts.dtype) == (torch.float32, torch.uint8)
        assert not levels[levels == 0].signbit().any()


def multiplied(values, name, most):
    """The smallest multiple that reaches the largest magnitude, or the one below where its error is less."""
    top, largest = MAGNITUDES[name][0][-1], max(map(abs, values))
    reaching = min(max(-(-largest // top), 1), most)
    found = {m: [nearest(value / m, name) * m for value in values] for m in (reaching, max(reaching - 1, 1))}
    multiple = min(found, key=lambda m: error(found[m], values))  # the first of equals is the one that reaches
    return found[multiple], multiple


@every_grid
@pytest.mark.parametrize("subgroup", [1, 7, 16, 32])
def test_rounding_with_multiples_is_the_oracle_bit_for_bit(name, subgroup):
    limit = 255 if name.startswith("u") else 127
    for most in (2, min(16, limit // MAGNITUDES[name][0][-1])):
        units = np.rint(awkward_units(name, 33)).clip(-127, limit)
        levels, multiples = round_with_multiples(tensor(units), get_grid(name), most, subgroup)
        expected, chosen = by_subgroups(units, subgroup, multiplied, name, most)
        assert levels.tolist() == expected
        assert multiples.tolist() == chosen
        assert (levels.dtype, multiples.dtype) == (torch.float32, torch.uint8)
        assert not levels[levels == 0].signbit().any()


def test_multiples_by_hand():
    cases = [
        ([104, 15, -2, 10], 16, [105, 15, 0, 15], 15),  # lzs4, top 7
        ([100, 3, -2, 10], 16, [98, 0, 0, 14], 14),  # one less than would reach is nearer
        ([7, 1, -7, 0], 16, [7, 1, -7, 0], 1),
        ([112, 0, 0, 0], 8, [56, 0, 0, 0], 8),  # not beyond the largest
    ]
    for values, most, expected, multiple in cases:
        levels, multiples = round_with_multiples(tensor(values), get_grid("lzs4"), most, 4)
        assert (levels.tolist(), multiples.tolist()) == (expected, [multiple])


@pytest.mark.parametrize("name", INTEGER_GRIDS)
@pytest.mark.parametrize("subgroup", [1, 7, 16])
def test_truncation_is_a_right_shift(name, subgroup):
    units = awkward_units(name, 33)
    units = abs(units) if name.startswith("u") else units
    levels, shifts = round_with_shifts(tensor(units), get_grid(name), 4, subgroup, truncate=True)
    expected, expected_shifts = by_subgroups(units, subgroup, truncated, name, 4)
    assert levels.tolist() == expected
    assert shifts.tolist() == expected_shifts


@every_grid
def test_real_numbers_take_the_shift_of_less_error(name):
    """Sums of squares are rounded here: where both errors agree to six digits either choice is right."""
    generator, max_shift = np.random.default_rng(5), MAGNITUDES[name][1]
    units = generator.standard_t(3, (20, 48)).astype(np.float32) * np.float32(9.7)
    levels, shifts = round_with_shifts(tensor(units), get_grid(name), max_shift, 16)
    for row, rounded, chosen in zip(units, levels.tolist(), shifts.tolist(), strict=True):
        for start, shift in zip((0, 16, 32), chosen, strict=True):
            exact = [Fraction(float(value)) for value in row[start : start + 16]]
            found = candidates(exact, name, max_shift)
            assert rounded[start : start + 16] == found[shift]
            assert error(found[shift], exact) <= min(error(other, exact) for other in found.values()) * Fraction(1000001, 1000000)


@pytest.mark.parametrize("truncate", [False, True])
def test_layout_and_cached_parts_change_nothing(monkeypatch, truncate):
    units = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)) * 30
    wide = torch.zeros(7, 200)
    wide[:, ::2] = units
    expected = round_with_shifts(units, get_grid("lzs4"), 4, 16, truncate)
    expected3 = [part.view(7, 1, -1) for part in expected]
    views = [units, units.t().contiguous().t(), wide[:, ::2]]
    for cached in (quantizers.CACHED_VALUES, 1, 16, 31, 32, 33, 7 * 112):
        monkeypatch.setattr(quantizers, "CACHED_VALUES", cached)
        for view in views:
            before = view.clone()
            assert all(map(torch.equal, round_with_shifts(view, get_grid("lzs4"), 4, 16, truncate), expected))
            assert all(map(torch.equal, round_with_shifts(view.unsqueeze(1), get_grid("lzs4"), 4, 16, truncate), expected3))
            assert torch.equal(view, before), "the input is not changed"


def test_no_rows_and_no_columns():
    for shape, groups in (((0, 20), (0, 2)), ((3, 0), (3, 0)), ((2, 0, 5), (2, 0, 1))):
        levels, shifts = round_with_shifts(torch.zeros(shape), get_grid("lzs4"), 4, 16)
        assert (levels.shape, shifts.shape) == (shape, groups)


def test_round_units_is_one_or_the_other():
    units = torch.linspace(-130, 130, 64).view(2, 32)
    assert torch.equal(round_units(units, get_grid("e2m1"), 0, 16), round_to_grid(units, get_grid("e2m1")))
    assert torch.equal(round_units(units, get_grid("e2m1"), 3, 16), round_with_shifts(units, get_grid("e2m1"), 3, 16)[0])


def test_absmax_maps_the_largest_magnitude_onto_the_top():
    rows = tensor([[1, -7, 3], [0.5, 0.25, 0], [0, 0, 0], [-3e38, 1, 1]])
    assert absmax_scale(rows, 7).tolist() == tensor([1, 0.5 / 7, 1, 3e38 / 7]).tolist()


AWKWARD_ROWS = {
    "zeros": ([0, -0.0, 0], 1.0),
    "NaN": ([1, np.nan, 2], np.nan),
    "infinity": ([1, np.inf, 2], np.nan),
    "minus infinity": ([1, -np.inf, 2], np.nan),
    "NaN and infinity": ([np.nan, -np.inf, np.inf], np.nan),
    "subnormal": ([1e-40, -1e-42, 0], 1.0),
    "subnormal after division": ([6.9 * TINY, 0, 0], 1.0),
    "smallest normal scale": ([7 * TINY, 0, 0], TINY),
}


@pytest.mark.parametrize(("row", "expected"), AWKWARD_ROWS.values(), ids=AWKWARD_ROWS)
def test_awkward_rows_have_a_safe_scale_and_leave_their_neighbours_alone(row, expected):
    rows = tensor([[1, 2, -7], row, [0.5, 3.5, 3]])
    plain = absmax_scale(rows, 7)
    searched, (ranged, zero) = search_scale(rows, get_grid("int4")), minmax_scale(rows, 7)
    assert np.array_equal(plain.numpy(), np.float32([1, expected, 0.5]), equal_nan=True)
    assert np.isnan([plain[1], searched[1], ranged[1]]).tolist() == [np.isnan(expected)] * 3
    assert torch.equal(searched[[0, 2]], search_scale(rows[[0, 2]], get_grid("int4")))
    assert (searched[[0, 2]] > 0).all()
    assert zero.isfinite().all()


def test_minmax_by_hand():
    """Ranges are widened to hold 0, so that 0 is always a level."""
    rows = tensor([[-1, 2, 0], [1, 2, 3], [-3, -1, -2], [0, 0, 0], [-15, 0, 0], [1e-41, 0, -1e-41]])
    scale, zero = minmax_scale(rows, 15)
    assert torch.equal(scale, tensor([0.2, 0.2, 0.2, 1, 1, 1]))
    assert zero.tolist() == [5, 0, 15, 0, 15, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12), st.sampled_from([7, 15, 28, 240, 255]))
def test_minmax_covers_the_range_with_an_integer_zero(values, top):
    scale, zero = (part.item() for part in minmax_scale(tensor([values]), top))
    assert 0 <= zero <= top
    assert zero == round(zero)
    levels = np.float32(values).astype(np.float64) / scale + zero
    assert levels.min() > -0.501
    assert levels.max() < top + 0.501


SEARCHED = [("int4", 0), ("lzs4", 0), ("e2m1", 0), ("e3m0", 0), ("int8", 0), ("ue2m2", 0), ("ue3m1", 0)]
SEARCHED += [(name, shift) for name, (_, shift) in MAGNITUDES.items()]


@pytest.mark.parametrize(("name", "max_shift", "norm"), [(*case, (2.0, 1.0, 2.4)[i % 3]) for i, case in enumerate(SEARCHED)])
def test_search_is_never_worse_than_absmax_and_finds_the_best_factor(name, max_shift, norm):
    grid = get_grid(name)
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)) ** 3 * tensor([1e-15, 1, 3, 1e10, 1e-3])[:, None]
    rows = rows.abs() if name.startswith("u") else rows
    widest = absmax_scale(rows, grid.top << max_shift)

    def losses(scale):
        rounded = round_units(rows / scale[:, None], grid, max_shift, 16).double() * scale[:, None].double()
        return ((rounded - rows.double()).abs() ** norm).sum(-1)

    found = losses(search_scale(rows, grid, max_shift, 16, norm))
    steps = torch.linspace(1.0, 0.5, 20) if max_shift else torch.linspace(1.0, 0.3, 40)
    best = torch.stack([losses(widest * factor) for factor in steps.tolist()]).amin(0)
    normal = slice(0, None) if norm == 1 else slice(1, None)  # squares of 1e-15 are too small for float32: absmax then
    assert (found[normal] <= best[normal] * (1 + 1e-4)).all()
    assert (found <= losses(widest) * (1 + 1e-4)).all()


def test_search_clips_an_outlier_and_keeps_a_uniform_row():
    row = torch.full((1, 400), 1.0)
    row[0, 0] = 7.0
    assert search_scale(row, get_grid("int4")).item() == 1.0
    gaussian = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    assert (search_scale(gaussian, get_grid("int4")) < absmax_scale(gaussian, 7) * 0.9).all()


def test_each_row_is_searched_on_its_own(monkeypatch):
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    together = search_scale(rows, get_grid("e2m1"), 3)
    assert torch.equal(torch.cat([search_scale(row[None], get_grid("e2m1"), 3) for row in rows]), together)
    assert torch.equal(search_scale(rows.t().contiguous().t(), get_grid("e2m1"), 3), together)
    monkeypatch.setattr(quantizers, "CACHED_VALUES", 64)
    assert torch.equal(search_scale(rows, get_grid("e2m1"), 3), together)
    assert search_scale(rows[:0], get_grid("e2m1"), 3).shape == (0,)


def test_scales_do_not_depend_on_the_default_dtype():
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    expected = search_scale(rows, get_grid("int4"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(search_scale(rows, get_grid("int4")), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_group_scales_belong_to_runs_along_k(scale):
    matrix = torch.randn(3, 70, generator=torch.Generator().manual_seed(4))
    found = weight_scale(matrix, WeightSpec("int4", scale=scale, group=32))
    assert found.shape == (3, 3)
    for run in range(3):
        part = torch.nn.functional.pad(matrix, (0, 26))[:, 32 * run : 32 * run + 32]
        assert torch.equal(found[:, run : run + 1], weight_scale(part, WeightSpec("int4", scale=scale)))
    spread_out = spread(found, 70, 32)
    assert spread_out.shape == (3, 70)
    assert torch.equal(spread_out[:, [0, 31, 32, 63, 64, 69]], found[:, [0, 0, 1, 1, 2, 2]])
    assert spread(found[:, :1], 70, 0).shape == (3, 1)
