"""AdaRound: between the best of all roundings and nearest, and nothing it returns changes when rounded again."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import CalibrationError, NonFiniteError, RecipeError
from halfbyte.formats import GRIDS
from halfbyte.methods.adaround import (
    FIRST_BETA,
    LAST_BETA,
    AdaRounding,
    SoftRounding,
    adaround,
    beta_at,
    neighbours,
    passes,
    regularizer,
    turn,
)
from halfbyte.quantizers import quantize_weight, weight_scale
from halfbyte.recipe import Reconstruction, WeightSpec

QUICK = Reconstruction(iterations=100)
SPECS = [
    *(WeightSpec(name) for name, grid in GRIDS.items() if grid.signed),
    *(WeightSpec(name, max_shift=grid.largest_shift) for name, grid in GRIDS.items() if grid.signed and grid.largest_shift),
    WeightSpec("lzs4", max_shift=2, subgroup=24),
    WeightSpec("e2m1", max_multiple=10),
    WeightSpec("int4", group=24, scale="absmax"),
]
NAMES = [f"{spec.describe()} {spec.scale}" for spec in SPECS]


def layer(rows: int, columns: int, seed: int = 0, samples: int = 400) -> tuple[Tensor, Tensor]:
    """Random weights (O, K) and the float64 Hessian (K, K) of inputs that are correlated among channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = (torch.randn(samples, columns, generator=generator) @ mix + 0.5).double()
    return torch.randn(rows, columns, generator=generator), x.T @ x


def nearest(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    return quantize_weight(matrix, scale, spec).dequantize()


def cost(matrix: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    difference = (matrix - rounded).double()
    return float((difference @ hessian.double() * difference).sum())


def obvious_neighbours(weight: float, step: float, levels: list[float]) -> tuple[float, float]:
    """The levels around a weight, by looking at every pair."""
    values = sorted({level * step for level in levels})
    for low, high in itertools.pairwise(values):
        if low <= weight < high:
            return low, high
    return (values[0], values[1]) if weight < values[0] else (values[-2], values[-1])


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.signed and grid.coding != "codebook"])
def test_neighbours_are_the_levels_around_a_weight(name):
    spec, generator = WeightSpec(name), torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 30, generator=generator)
    scale = torch.full((4, 1), 2.0**-3)
    matrix[0] = torch.tensor([GRIDS[name].levels[i % len(GRIDS[name].levels)] * float(scale[0]) for i in range(30)])  # on levels
    low, high = neighbours(matrix, scale, spec)
    for row, column in itertools.product(range(4), range(30)):
        expected = obvious_neighbours(float(matrix[row, column]), float(scale[row]), list(GRIDS[name].levels))
        assert (float(low[row, column]), float(high[row, column])) == pytest.approx(expected, abs=1e-7), (row, column)


def best_of_all(matrix: Tensor, hessian: Tensor, spec: WeightSpec, scale: Tensor) -> float:
    """The least error over every combination of roundings, row by row."""
    low, high = neighbours(matrix, scale, spec)
    total = 0.0
    for row in range(len(matrix)):
        choices = torch.tensor(list(itertools.product([False, True], repeat=matrix.shape[1])))
        rounded = torch.where(choices, high[row], low[row])
        error = (rounded - matrix[row]).double()
        total += float(((error @ hessian) * error).sum(1).min())
    return total


@pytest.mark.parametrize(
    "spec", [WeightSpec("int4"), WeightSpec("e2m1"), WeightSpec("lzs4", max_shift=4, subgroup=4)], ids=WeightSpec.describe
)
def test_lies_between_the_best_of_all_roundings_and_nearest(spec):
    gained = possible = 0.0
    for seed in range(8):
        matrix, hessian = layer(3, 10, seed, samples=40)
        scale = weight_scale(matrix, spec)
        found = adaround(matrix, hessian, spec, scale, QUICK)
        best, ours, plain = (
            best_of_all(matrix, hessian, spec, scale),
            cost(matrix, found.matrix, hessian),
            cost(matrix, nearest(matrix, scale, spec), hessian),
        )
        assert best <= ours * (1 + 1e-5)
        assert ours <= plain * (1 + 1e-5)
        assert found.error == pytest.approx(ours / plain, rel=1e-3)
        gained, possible = gained + plain - ours, possible + plain - best
    assert gained > 0.85 * possible, (gained, possible)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_beats_nearest_and_is_a_fixed_point(spec):
    matrix, hessian = layer(12, 70)
    scale = weight_scale(matrix, spec)
    found = adaround(matrix, hessian, spec, scale, QUICK)
    assert cost(matrix, found.matrix, hessian) < 0.8 * cost(matrix, nearest(matrix, scale, spec), hessian)
    again = quantize_weight(found.matrix, scale, spec)
    assert torch.equal(again.dequantize(), found.matrix)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 24), st.sampled_from(SPECS))
def test_never_worse_than_nearest(seed, rows, columns, spec):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    x = torch.randn(6, columns, generator=generator).double() * torch.randint(0, 2, (columns,), generator=generator)
    scale = weight_scale(matrix, spec)
    found = adaround(matrix, x.T @ x, spec, scale, Reconstruction(iterations=5))
    ours, plain = cost(matrix, found.matrix, x.T @ x), cost(matrix, nearest(matrix, scale, spec), x.T @ x)
    assert ours <= plain * (1 + 1e-6) + 1e-9
    assert 0 <= found.kept_nearest <= rows


def test_the_gradient_is_that_of_the_output_error():
    matrix, hessian = layer(4, 12, samples=30)
    spec = WeightSpec("int4", scale="absmax")
    scale = weight_scale(matrix, spec)
    soft = SoftRounding(matrix, scale, spec)
    assert torch.allclose(soft.soft(soft.share()).detach(), matrix, atol=1e-6)  # it starts at the weights themselves
    with torch.no_grad():
        soft.alpha += 0.3
    rounded = soft.soft(soft.share())
    error = rounded - matrix
    expected = torch.autograd.grad(((error @ hessian.float()) * error).sum(), soft.alpha, retain_graph=True)[0]
    slope = 2 * ((rounded.detach() - matrix) @ hessian.float())
    found = torch.autograd.grad((rounded * slope).sum(), soft.alpha)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_turning_ends_where_no_single_weight_gains():
    matrix, hessian = layer(5, 20)
    spec = WeightSpec("int4")
    low, high = neighbours(matrix, weight_scale(matrix, spec), spec)
    hessian = hessian / hessian.diagonal().mean()
    found = turn(matrix, low, high, hessian.float())
    for row, column in itertools.product(range(5), range(20)):
        turned = found.clone()
        turned[row, column] = low[row, column] if found[row, column] == high[row, column] else high[row, column]
        assert cost(matrix[row : row + 1], turned[row : row + 1], hessian) > 0.99999 * cost(
            matrix[row : row + 1], found[row : row + 1], hessian
        )


def test_the_schedule_warms_up_and_anneals():
    assert beta_at(0.1, 0.2) is None
    assert beta_at(0.2, 0.2) == FIRST_BETA
    assert beta_at(1.0, 0.2) == LAST_BETA
    assert beta_at(0.6, 0.2) == pytest.approx(11)
    assert float(regularizer(torch.tensor([0.0, 1.0]), 2)) == 0
    assert float(regularizer(torch.tensor([0.5]), 20)) == 1


def test_a_budget_of_seconds_ends_a_run_early():
    assert list(passes(4)) == [0, 0.25, 0.5, 0.75]
    assert len(list(passes(10**9, 0.01))) < 10**7
    shares = list(passes(10**9, 0.01))
    assert shares == sorted(shares)
    assert shares[-1] < 1


def test_the_same_inputs_give_the_same_bits():
    matrix, hessian = layer(6, 33)
    scale = weight_scale(matrix, WeightSpec())
    first, second = (adaround(matrix, hessian, WeightSpec(), scale, QUICK) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert "of nearest's output error" in first.describe()


def test_without_iterations_weights_are_only_turned():
    matrix, hessian = layer(6, 33)
    scale = weight_scale(matrix, WeightSpec())
    found = adaround(matrix, hessian, WeightSpec(), scale, Reconstruction(iterations=0))
    low, high = neighbours(matrix, scale, WeightSpec())
    plain = nearest(matrix, scale, WeightSpec())
    products = (hessian / hessian.diagonal().mean()).float()
    assert torch.equal(found.matrix, turn(matrix, plain, torch.where(plain == low, high, low), products))
    assert found.error < 0.9


def test_a_model_s_seconds_are_shared_and_every_layer_is_noted():
    matrix, hessian = layer(6, 33)
    scale, spec = weight_scale(matrix, WeightSpec()), WeightSpec()
    rounding = AdaRounding(Reconstruction(iterations=10**6, seconds=1e-9), {"first": 1, "second": 3})
    expected = adaround(matrix, hessian, spec, scale, Reconstruction(iterations=0)).matrix
    found = rounding.round(matrix, hessian[None], spec, scale, "first")
    assert torch.equal(found, expected)  # out of time before the first iteration
    grouped = rounding.round(
        torch.cat([matrix, matrix]), torch.stack([hessian, hessian]), spec, torch.cat([scale, scale]), "second"
    )
    assert torch.equal(grouped, torch.cat([expected, expected]))
    assert rounding.notes["first"].startswith("AdaRound leaves 0.")
    assert rounding.notes["second"] == "AdaRound of 2 groups of channels"


def test_weights_on_the_grid_stay_as_they_are():
    matrix, hessian = layer(3, 12)
    matrix[:, 0], scale = 7.0, torch.ones(3, 1)
    matrix = matrix.round().clamp(-7, 7)
    found = adaround(matrix, hessian, WeightSpec("int4"), scale, QUICK)
    assert torch.equal(found.matrix, matrix)
    assert (found.error, found.kept_nearest) == (1.0, 3)
    assert found.describe().endswith("3 of 3 channels at nearest")


def test_bad_input_is_refused():
    matrix, hessian = layer(3, 12)
    scale = weight_scale(matrix, WeightSpec())
    with pytest.raises(CalibrationError, match=r"conv_in: weights .* need a Hessian"):
        adaround(matrix, hessian[:5, :5], WeightSpec(), scale, name="conv_in")
    hessian[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="Hessian of the calibration inputs"):
        adaround(matrix, hessian, WeightSpec(), scale)
    for wrong in (
        {"iterations": -1},
        {"unit": "block", "iterations": 0},
        {"seconds": 0.0},
        {"learning_rate": 0.0},
        {"warmup": 1.0},
        {"regularizer": -1.0},
    ):
        with pytest.raises(RecipeError, match="Reconstruction: "):
            Reconstruction(**wrong)
