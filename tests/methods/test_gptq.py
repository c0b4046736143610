"""GPTQ on every grid: equal to a slow reference, better than nearest, and nothing it returns changes when rounded again."""

import pytest
import torch
from torch import Tensor

from halfbyte.errors import CalibrationError, NonFiniteError, RecipeError
from halfbyte.formats import GRIDS, round_to_grid
from halfbyte.methods.gptq import activation_order, gptq, inverse_factor
from halfbyte.quantizers import quantize_weight, round_units, spread, weight_scale
from halfbyte.recipe import WeightSpec

PLAIN = [WeightSpec(name) for name, grid in GRIDS.items() if grid.signed]
SHIFTED = [WeightSpec(name, max_shift=grid.largest_shift) for name, grid in GRIDS.items() if grid.signed and grid.largest_shift]
OTHERS = [
    WeightSpec("lzs4", max_shift=4, subgroup=32),
    WeightSpec("lzs4", max_shift=2, subgroup=24),
    WeightSpec("e2m1", max_shift=3, scale="absmax"),
    WeightSpec("e2m1", max_multiple=10),
    WeightSpec("lzs4", max_multiple=16, subgroup=24, scale="absmax"),
    WeightSpec("int4", max_multiple=15, subgroup=32),
    WeightSpec("int4", group=64),
    WeightSpec("int4", group=24, scale="absmax"),
]
SPECS = [*PLAIN, *SHIFTED, *OTHERS]
NAMES = [f"{spec.describe()} {spec.scale}" for spec in SPECS]


def layer(rows: int, columns: int, seed: int = 0, samples: int = 400) -> tuple[Tensor, Tensor]:
    """Random weights (O, K) and the float64 Hessian (K, K) of correlated inputs with loud and quiet channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0, -3, columns).exp()
    loudness = (0.7 * torch.randn(columns, generator=generator)).exp()
    x = (torch.randn(samples, columns, generator=generator) @ mix.T * loudness).double()
    weights = torch.randn(rows, columns, generator=generator) / (0.3 + torch.rand(rows, columns, generator=generator))
    return weights, x.T @ x


def nearest(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    return quantize_weight(matrix, scale, spec).dequantize()


def cost(matrix: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    difference = (matrix - rounded).double()
    return float((difference @ hessian.double() * difference).sum())


def obvious_gptq(matrix: Tensor, hessian: Tensor, spec: WeightSpec, scale: Tensor, damp: float = 0.01) -> Tensor:
    """The same by the definition of the optimal brain surgeon: the inverse of what remains is computed anew for every column."""
    grid, count = GRIDS[spec.grid], matrix.shape[1]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(count, dtype=hessian.dtype)
    weights, rounded = matrix.double(), torch.zeros_like(matrix)
    scales = spread(scale, count, spec.group).expand_as(matrix)
    multipliers = torch.ones_like(scales)
    for j in range(count):
        if spec.has_multipliers and j % spec.subgroup == 0:
            own = slice(j, min(j + spec.subgroup, count))
            multipliers[:, own] = round_units((weights / scales)[:, own].float(), spec)[1].float()
        levels = round_to_grid((weights[:, j] / scales[:, j]).float() / multipliers[:, j], grid) * multipliers[:, j]
        rounded[:, j] = levels * scales[:, j]
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = (weights[:, j] - rounded[:, j]) / inverse[0, 0]
        weights[:, j:] -= error[:, None] * inverse[0]
    return rounded


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_equals_the_obvious_algorithm(spec):
    matrix, hessian = layer(12, 70)
    scale = weight_scale(matrix, spec)
    expected = obvious_gptq(matrix, hessian, spec, scale)
    for block in (1, 33, 128):
        assert torch.equal(gptq(matrix, hessian, spec, scale, block=block), expected), block


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_outputs_change_less_than_by_nearest(spec):
    for seed in range(2):
        matrix, hessian = layer(32, 160, seed)
        scale = weight_scale(matrix, spec)
        rounded = {"nearest": nearest(matrix, scale, spec), "double": gptq(matrix, hessian, spec, scale)}
        rounded["float"] = gptq(matrix, hessian.float(), spec, scale)
        rounded["activation"] = gptq(matrix, hessian, spec, scale, order="activation")
        costs = {kind: cost(matrix, values, hessian) for kind, values in rounded.items()}
        assert costs["double"] < 0.7 * costs["nearest"]
        assert costs["float"] == pytest.approx(costs["double"], rel=0.05)
        assert costs["activation"] < 0.7 * costs["nearest"]


@pytest.mark.parametrize("columns", [1, 17, 130])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_rounding_the_result_again_changes_nothing(spec, columns):
    matrix, hessian = layer(24, columns, seed=columns)
    scale = weight_scale(matrix, spec)
    for order in ("natural", "activation"):
        result = gptq(matrix, hessian, spec, scale, order=order)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        for stored in (torch.float32, torch.bfloat16, torch.float16):  # a layer keeps the result in the type of its weight
            assert torch.equal(nearest(result.to(stored), scale, spec), result), (order, stored)


@pytest.mark.parametrize("spec", [*SHIFTED, OTHERS[0]], ids=lambda spec: spec.describe())
def test_any_values_below_one_shift_survive_rounding(spec):
    """Why results are fixed points: a smaller FLAG, found when rounding again, still holds every value of the subgroup."""
    generator, grid = torch.Generator().manual_seed(0), GRIDS[spec.grid]
    levels = torch.tensor(sorted({max(level, -grid.top) for level in grid.levels}), dtype=torch.float32)
    picked = levels[torch.randint(len(levels), (20000, spec.subgroup), generator=generator)]
    quiet = torch.rand(20000, 1, generator=generator) * grid.top  # subgroups whose largest level is small, too
    picked = torch.where(picked.abs() <= quiet, picked, 0)
    shift = torch.randint(spec.max_shift + 1, (20000, 1), generator=generator)
    scale = 0.1 + torch.rand(20000, 1, generator=generator)
    matrix = picked * 2.0**shift * scale
    assert torch.equal(nearest(matrix, scale, spec), matrix)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.describe())
def test_uncorrelated_inputs_leave_nothing_to_compensate(spec):
    matrix, hessian = layer(16, 100)
    scale = weight_scale(matrix, spec)
    expected = nearest(matrix, scale, spec)
    assert torch.equal(gptq(matrix, hessian.diagonal().diag(), spec, scale), expected)
    assert torch.equal(gptq(matrix, torch.zeros(100, 100), spec, scale), expected)  # no input was ever seen


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_dead_inputs_are_rounded_to_nearest(spec, order):
    matrix, hessian = layer(16, 100)
    dead = torch.zeros(100, dtype=torch.bool)
    dead[[0, 3, 50, 99]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    scale = weight_scale(matrix, spec)
    result = gptq(matrix, hessian, spec, scale, order=order)
    rounded = nearest(matrix, scale, spec)
    assert cost(matrix, result, hessian) < 0.8 * cost(matrix, rounded, hessian)
    if spec.has_multipliers:  # those of compensated neighbours may differ, so only the size of the error is known
        assert (result - matrix)[:, dead].square().mean() < 4 * (rounded - matrix).square().mean()
    else:
        assert torch.equal(result[:, dead], rounded[:, dead])


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_dead_inputs_do_not_disturb_the_others(damp):
    matrix, hessian = layer(16, 60)
    alive = torch.arange(60) % 7 != 2
    scale = weight_scale(matrix, WeightSpec("e2m1"))
    expected = gptq(matrix[:, alive], hessian[alive][:, alive], WeightSpec("e2m1"), scale, damp)
    hessian[~alive] = 0
    hessian[:, ~alive] = 0
    assert torch.equal(gptq(matrix, hessian, WeightSpec("e2m1"), scale, damp)[:, alive], expected)


def test_factor_is_a_root_of_the_inverse():
    _, hessian = layer(1, 50)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(50)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(50, dtype=torch.float64), rtol=0, atol=1e-6)


def test_damping_grows_until_the_hessian_can_be_factored():
    matrix, _ = layer(8, 40)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    few = x.T @ x  # rank 5 of 40
    spec = WeightSpec("lzs4", max_shift=4)
    scale = weight_scale(matrix, spec)
    result = gptq(matrix, few, spec, scale, damp=0.0)
    assert cost(matrix, result, few) < cost(matrix, nearest(matrix, scale, spec), few)
    dented = few - 0.05 * few.diagonal().mean() * torch.eye(40)  # least eigenvalue below zero: more than the usual damping
    _, failed = torch.linalg.cholesky_ex(dented + 0.01 * few.diagonal().mean() * torch.eye(40))
    assert failed
    assert gptq(matrix, dented, spec, scale).isfinite().all()


def test_a_matrix_that_is_no_hessian_is_refused():
    matrix, hessian = layer(4, 20)
    spec = WeightSpec("int4")
    with pytest.raises(CalibrationError, match=r"mid\.conv: its Hessian is not positive definite.*sum of x x\^T"):
        gptq(matrix, -hessian, spec, weight_scale(matrix, spec), name="mid.conv")


@pytest.mark.parametrize("place", ["weight matrix", "Hessian of the calibration inputs", "weight scale"])
def test_damaged_tensors_are_named(place):
    matrix, hessian = layer(4, 20)
    scale = torch.ones(4, 1)
    {"weight matrix": matrix, "Hessian of the calibration inputs": hessian, "weight scale": scale}[place][2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"up.0: the {place} holds 1 NaN or infinite values of"):
        gptq(matrix, hessian, WeightSpec("int4"), scale, name="up.0")


def test_shapes_that_disagree_are_refused():
    matrix, hessian = layer(4, 20)
    spec = WeightSpec("int4", group=8)
    with pytest.raises(CalibrationError, match=r"scales \(4, 3\), got \(20, 20\) and \(4, 1\)"):
        gptq(matrix, hessian, spec, torch.ones(4, 1))
    with pytest.raises(CalibrationError, match=r"need a Hessian \(20, 20\).*got \(19, 19\).*another layer"):
        gptq(matrix, hessian[1:, 1:], spec, torch.ones(4, 3))


@pytest.mark.parametrize(
    "wrong", [{"damp": -0.1}, {"damp": 2.0}, {"damp": float("nan")}, {"block": 0}, {"order": "random"}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    matrix, hessian = layer(4, 20)
    with pytest.raises(RecipeError, match="damp must be 0 to 1, block at least 1 and order 'natural' or 'activation'"):
        gptq(matrix, hessian, WeightSpec("int4"), torch.ones(4, 1), **wrong)


@pytest.mark.parametrize(("spec", "run"), [(WeightSpec("int4"), 1), (SHIFTED[0], 16), (WeightSpec("int4", group=24), 24)], ids=str)
def test_activation_order_keeps_runs_whole(spec, run):
    count = 100
    energy = torch.rand(count, generator=torch.Generator().manual_seed(0))
    columns, runs = activation_order(energy, spec)
    assert sorted(columns.tolist()) == list(range(count))
    members = [columns[start : start + run] for start in range(0, count, run)]
    assert [int(part[0]) // run for part in members] == runs.tolist()
    for part in members:
        assert len(set((part // run).tolist())) == 1
        assert energy[part].diff().le(0).all()
    full = [part for part in members if len(part) == run]
    assert len(full) == count // run
    assert all(len(part) == run for part in members[:-1])
    sums = torch.stack([energy[part].sum() for part in full])
    assert sums.diff().le(0).all()


def test_activation_order_without_runs_is_a_relabelling():
    matrix, hessian = layer(8, 60)
    spec = WeightSpec("e2m1")
    scale = weight_scale(matrix, spec)
    by_energy = hessian.diagonal().argsort(descending=True)
    expected = torch.empty_like(matrix)
    expected[:, by_energy] = gptq(matrix[:, by_energy], hessian[by_energy][:, by_energy], spec, scale)
    assert torch.equal(gptq(matrix, hessian, spec, scale, order="activation"), expected)


def test_inputs_are_left_alone():
    matrix, hessian = layer(4, 40)
    spec = WeightSpec("lzs4", max_shift=4)
    scale = weight_scale(matrix, spec)
    before = [tensor.clone() for tensor in (matrix, hessian, scale)]
    gptq(torch.nn.Parameter(matrix), hessian, spec, scale)
    gptq(matrix.bfloat16(), hessian.float(), spec, scale)
    assert all(torch.equal(a, b) for a, b in zip(before, (matrix, hessian, scale), strict=True))
