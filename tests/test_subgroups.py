"""Rounding with shifts and with multiples against slow oracles of their docstrings, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from halfbyte import subgroups
from halfbyte.formats import get_grid
from halfbyte.subgroups import round_with_best_multiples, round_with_multiples, round_with_shifts

# Magnitudes of the grids that carry shifts, and their largest shift.
MAGNITUDES = {
    "lzs4": (range(8), 4),
    "e1m2": (range(8), 4),
    "e2m1": ([0, 1, 2, 3, 4, 6, 8, 12], 3),
    "ue1m3": (range(16), 4),
    "ue2m2": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28], 3),
}
INTEGER_GRIDS = ("lzs4", "e1m2", "ue1m3")

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


def best_multiplied(values, name, most):
    """The multiple of least error, the smallest of equals."""
    found = {m: [nearest(value / m, name) * m for value in values] for m in range(1, most + 1)}
    multiple = min(found, key=lambda m: error(found[m], values))
    return found[multiple], multiple


@every_grid
@pytest.mark.parametrize("subgroup", [1, 7, 16])
def test_the_best_of_all_multiples_is_the_oracle_bit_for_bit(name, subgroup):
    limit = 255 if name.startswith("u") else 127
    for most in (2, min(16, limit // MAGNITUDES[name][0][-1])):
        units = awkward_units(name, 33)
        levels, multiples = round_with_best_multiples(tensor(units), get_grid(name), most, subgroup)
        expected, chosen = by_subgroups(units, subgroup, best_multiplied, name, most)
        assert levels.tolist() == expected
        assert multiples.tolist() == chosen
        assert (levels.dtype, multiples.dtype) == (torch.float32, torch.uint8)
        again = round_with_best_multiples(levels, get_grid(name), most, subgroup)
        assert torch.equal(again[0], levels), "what was rounded once rounds to itself"


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
    levels, multiples = round_with_best_multiples(tensor([91, 26, -2, 13]), get_grid("lzs4"), 16, 4)
    assert (levels.tolist(), multiples.tolist()) == ([91, 26, 0, 13], [13])


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
    for cached in (subgroups.CACHED_VALUES, 1, 16, 31, 32, 33, 7 * 112):
        monkeypatch.setattr(subgroups, "CACHED_VALUES", cached)
        for view in views:
            before = view.clone()
            assert all(map(torch.equal, round_with_shifts(view, get_grid("lzs4"), 4, 16, truncate), expected))
            assert all(map(torch.equal, round_with_shifts(view.unsqueeze(1), get_grid("lzs4"), 4, 16, truncate), expected3))
            assert torch.equal(view, before), "the input is not changed"


def test_no_rows_and_no_columns():
    for shape, groups in (((0, 20), (0, 2)), ((3, 0), (3, 0)), ((2, 0, 5), (2, 0, 1))):
        levels, shifts = round_with_shifts(torch.zeros(shape), get_grid("lzs4"), 4, 16)
        assert (levels.shape, shifts.shape) == (shape, groups)
