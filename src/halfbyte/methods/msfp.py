"""MSFP: 4-bit floating point, signed or unsigned for each layer, by search (arXiv 2505.21591, sections on mixup-sign quantization).

Every grid is an integer table (`formats`), so the paper's real-valued exponent bias is our scale: maxval = scale * top. Inputs that
come from a SiLU or GELU, or are measurably skewed, may take an unsigned grid with an offset below zero. The offset here is a
whole number of scales, value = scale * (level - zero), which makes real zero an integer: zero padding of convolutions stays exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.calibration import InputStatistics
from halfbyte.errors import CalibrationError
from halfbyte.formats import Grid, get_grid, round_to_grid
from halfbyte.layers import GridChoice
from halfbyte.quantizers import FixedScale, absmax_scale, quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, GridSearch, LayerSpec, WeightSpec
from halfbyte.subgroups import CACHED_VALUES

LEAST, MOST = 0.1, 1.2  # of the range of the data: where maxval is searched (Kuzmin et al. 2022)
POINTS = 111  # scales tried where no search says how many
ZEROS = 8  # offsets tried for every scale, from the least value to 0
SAMPLE = 4096  # values of an input that the search looks at
FINALISTS = 8  # scales and zero points of every grid that are compared by the error of the layer's output


@dataclass
class Candidates:
    """Scales and zero points of one grid, with the mean squared error each leaves on the sample; all (n,)."""

    grid: Grid
    scale: Tensor
    zero: Tensor
    error: Tensor

    def best(self, count: int) -> "Candidates":
        """Those of least error, in ascending order of it."""
        order = self.error.argsort(stable=True)[:count]
        return Candidates(self.grid, self.scale[order], self.zero[order], self.error[order])


def one_sided(statistics: InputStatistics, skew: float) -> str:
    """Why an input may take unsigned grids, in words; empty where it may not."""
    if statistics.source:
        return f"its input is a {statistics.source} output"
    low, high = statistics.range
    return f"its input is skewed, {low:.3g} to {high:.3g}" if -low < skew * high else ""


def input_candidates(values: Tensor, grid: Grid, low: float, high: float, points: int) -> Candidates:
    """Every scale (and zero point, for unsigned grids) tried for an input.

    Args:
        values: float32 (n,), a sample of the input. low, high: its range.
        points: scales tried, evenly spaced from 0.1 to 1.2 times the one that just holds the range. 8-bit grids take that one:
            beside steps so fine it counts what clipping costs, and the rarest values are not in the sample.
    """
    span = max(-low, high) if grid.signed else max(high, 0.0) - min(low, 0.0)
    widest = absmax_scale(torch.tensor([[span]]), grid.top)
    scale = widest if grid.bits == 8 else widest * torch.linspace(LEAST, MOST, points)
    if grid.signed:
        zero = torch.zeros_like(scale)
    else:
        lowest = (max(-low, 0.0) / scale).clamp(max=grid.top)
        parts = torch.linspace(1, 0, 1 if grid.bits == 8 else ZEROS)
        zero = (lowest[:, None] * parts).round().flatten()
        scale = scale.repeat_interleave(len(parts))
    error = torch.cat([_errors(values, grid, s, z) for s, z in _parts(scale, zero, len(values))])
    return Candidates(grid, scale, zero, error)


def _parts(scale: Tensor, zero: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, CACHED_VALUES // max(1, count))
    return list(zip(scale.split(size), zero.split(size), strict=True))


def _errors(values: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    """Mean squared error of a sample (n,) under each scale and zero point (m,)."""
    return (_rounded(values, grid, scale[:, None], zero[:, None]) - values).square_().mean(1)


def _rounded(values: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    return (round_to_grid(values * scale.reciprocal() + zero, grid) - zero) * scale


def _output_error(error: Tensor, matrix: Tensor) -> Tensor:
    """Mean square of what an error of the input (G, n, K) becomes behind the weights (O, K) of a layer with G groups."""
    return (error @ matrix.view(len(error), -1, matrix.shape[-1]).transpose(1, 2)).square().mean()


def _by_output(found: Candidates, rows: Tensor, matrix: Tensor) -> Candidates:
    """The candidates with the mean squared error of the layer's output in place of their own."""
    pairs = zip(found.scale, found.zero, strict=True)
    error = [_output_error(_rounded(rows, found.grid, scale, zero) - rows, matrix) for scale, zero in pairs]
    return Candidates(found.grid, found.scale, found.zero, torch.stack(error).to(found.scale.device)).best(len(error))


def search_input(statistics: InputStatistics, names: Sequence[str], points: int, matrix: Tensor | None = None) -> list[Candidates]:
    """The best scales and zero points of some grids for an input, grid by grid, each in ascending order of error.

    Args:
        names: of the grids.
        matrix: weights float32 (O, K), to rank the finalists by the error of the layer's output; None: by that of the input.
    """
    low, high = statistics.range
    values = statistics.reservoir
    values = values[:: -(-len(values) // SAMPLE)]
    found = [input_candidates(values, get_grid(name), low, high, points).best(FINALISTS) for name in names]
    if matrix is None:
        return found
    if statistics.rows is None:
        raise CalibrationError("the error of a layer's output needs `rows` among its statistics")
    return [_by_output(one, statistics.rows, matrix) for one in found]


def search_weight(matrix: Tensor, spec: WeightSpec, search: GridSearch, rows: Tensor | None) -> tuple[WeightSpec, dict[str, float]]:
    """The grid of least error for a weight matrix, under scales an output channel as the spec finds them.

    Args:
        matrix: float32 (O, K).
        rows: a sample of what it is multiplied with, float32 (G, n, K), to choose the grid by the error of the layer's output.
    Returns:
        The spec with its grid, and the error of every grid.
    """
    errors = {}
    for name in search.weight_grids:
        one = spec.replace(grid=name)
        error = quantize_weight(matrix, weight_scale(matrix, one), one).dequantize() - matrix
        errors[name] = float(error.square().mean() if rows is None else _output_error(rows, error))
    return spec.replace(grid=min(errors, key=errors.__getitem__)), errors


def search_layer(spec: LayerSpec, matrix: Tensor, statistics: InputStatistics, search: GridSearch) -> tuple[LayerSpec, GridChoice]:
    """Grids, scales and zero point of one layer.

    Args:
        spec: what the recipe says of inner layers; its input is quantized. matrix: weights float32 (O, K).
    Returns:
        The spec with its grids, and what the search found.
    """
    why, by_output = one_sided(statistics, search.skew), search.objective == "output" and statistics.rows is not None
    names = [*search.signed_grids, *(search.unsigned_grids if why else ())]
    found = search_input(statistics, names, search.points, matrix if by_output else None)
    best = min(found, key=lambda one: float(one.error[0]))
    weight, errors = search_weight(matrix, spec.weight, search, statistics.rows if by_output else None)
    activation = spec.activation.replace(grid=best.grid.name, zero_point=not best.grid.signed)  # type: ignore[union-attr]
    choice = GridChoice(
        float(best.scale[0]),
        int(best.zero[0]),
        statistics.range,
        why,
        errors,
        {one.grid.name: float(one.error[0]) for one in found},
    )
    return LayerSpec(weight, activation), choice


def fixed_scale(spec: ActivationSpec, statistics: InputStatistics) -> FixedScale:
    """Calibrated scales of an input whose grid is given, of least error over all timesteps or for each.

    Returns:
        float32 (T,) and int64 (T,), in ascending order of the calibrated timesteps; T = 1 for static scales.
    """
    if spec.scale == "static":
        best = search_input(statistics, [spec.grid], POINTS)[0]
        return FixedScale(best.scale[:1], best.zero[:1].long())
    timesteps = sorted(timestep for timestep in statistics.ranges if timestep is not None)
    found = [
        input_candidates(statistics.reservoirs[t], get_grid(spec.grid), *statistics.ranges[t], POINTS).best(1) for t in timesteps
    ]
    return FixedScale(torch.cat([one.scale for one in found]), torch.cat([one.zero for one in found]).long())
