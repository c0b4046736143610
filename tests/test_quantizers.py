"""Scales by absmax, min-max and search against brute force, and how they are spread over values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import quantizers
from halfbyte.formats import get_grid
from halfbyte.quantizers import (
    absmax_scale,
    minmax_scale,
    quantize_weight,
    search_factors,
    search_scale,
    spread,
    weight_scale,
)
from halfbyte.recipe import WeightSpec

INT4 = WeightSpec("int4")
TINY = float(np.finfo(np.float32).tiny)


def tensor(values):
    return torch.tensor(np.asarray(values, dtype=np.float32))


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
    searched, (ranged, zero) = search_scale(rows, INT4), minmax_scale(rows, 7)
    assert np.array_equal(plain.numpy(), np.float32([1, expected, 0.5]), equal_nan=True)
    assert np.isnan([plain[1], searched[1], ranged[1]]).tolist() == [np.isnan(expected)] * 3
    assert torch.equal(searched[[0, 2]], search_scale(rows[[0, 2]], INT4))
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


SEARCHED = [WeightSpec(name) for name in ("int4", "lzs4", "e2m1", "e3m0", "int8")]
SEARCHED += [WeightSpec(name, max_shift=get_grid(name).largest_shift) for name in ("lzs4", "e1m2", "e2m1")]
SEARCHED += [WeightSpec(name, max_multiple=most) for name, most in (("int4", 16), ("lzs4", 16), ("e1m2", 5), ("e2m1", 10))]
SEARCHED = [spec.replace(norm=(2.0, 1.0, 2.4)[i % 3]) for i, spec in enumerate(SEARCHED)]


@pytest.mark.parametrize("spec", SEARCHED, ids=lambda spec: f"{spec.describe()} {spec.norm}")
def test_search_finds_the_best_factor(spec):
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)) ** 3 * tensor([1e-15, 1, 3, 1e10, 1e-3])[:, None]
    widest = absmax_scale(rows, spec.top)

    def losses(scale):
        rounded = quantize_weight(rows, scale[:, None], spec).levels.double() * scale[:, None].double()
        return ((rounded - rows.double()).abs() ** spec.norm).sum(-1)

    found = losses(search_scale(rows, spec))
    lowest, highest, points = (0.8, 1.5, 8) if spec.max_multiple else (0.5, 1, 20) if spec.max_shift else (0.3, 1, 40)
    assert sorted(search_factors(spec)) == pytest.approx(np.linspace(lowest, highest, points).tolist())
    best = torch.stack([losses(widest * factor) for factor in search_factors(spec)]).amin(0)
    normal = slice(0, None) if spec.norm == 1 else slice(1, None)  # squares of 1e-15 are too small for float32: absmax then
    # multipliers are chosen by squares when values are rounded, so with other norms those are not the ones searched with
    margin = 0.1 if spec.has_multipliers and spec.norm != 2 else 1e-4
    assert (found[normal] <= best[normal] * (1 + margin)).all()
    assert (found <= losses(widest) * (1 + margin)).all()


def test_search_clips_an_outlier_and_keeps_a_uniform_row():
    row = torch.full((1, 400), 1.0)
    row[0, 0] = 7.0
    assert search_scale(row, INT4).item() == 1.0
    gaussian = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    assert (search_scale(gaussian, INT4) < absmax_scale(gaussian, 7) * 0.9).all()


@pytest.mark.parametrize("spec", [WeightSpec("e2m1", max_shift=3), WeightSpec("e2m1", max_multiple=10)], ids=WeightSpec.describe)
def test_each_row_is_searched_on_its_own(monkeypatch, spec):
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    together = search_scale(rows, spec)
    assert torch.equal(torch.cat([search_scale(row[None], spec) for row in rows]), together)
    assert torch.equal(search_scale(rows.t().contiguous().t(), spec), together)
    monkeypatch.setattr(quantizers, "CACHED_VALUES", 64)
    assert torch.equal(search_scale(rows, spec), together)
    assert search_scale(rows[:0], spec).shape == (0,)


def test_scales_do_not_depend_on_the_default_dtype():
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    expected = search_scale(rows, INT4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(search_scale(rows, INT4), expected)
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
