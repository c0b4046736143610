"""Scale searches and rounding as plain functions on rows of values; nothing here knows modules.

Three steps, each usable alone: find a scale (`absmax_scale`, `minmax_scale`, `search_scale`), choose multipliers where the spec has
them (subgroups.py), and look at a whole weight or activation through its spec (`quantize_weight`, `quantize_activation`). Both the
trainable and the packed layers call these same functions, which is why they agree to the last code.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import Grid, decode, get_grid, levels_to_codes, round_to_grid
from halfbyte.recipe import ActivationSpec, WeightSpec
from halfbyte.subgroups import (
    CACHED_VALUES,
    columns_of,
    flag,
    power_of_two,
    round_with_best_multiples,
    round_with_multiples,
    round_with_shifts,
    saturated,
    sum_columns,
)

SEARCH_POINTS = 40


def absmax_scale(rows: Tensor, top: int) -> Tensor:
    """Scale that maps the largest magnitude of each row onto `top`.

    Args:
        rows: float32 (r, n), n >= 1.
    Returns:
        float32 (r,). Rows of zeros get scale 1; rows with a NaN or an infinity get NaN, so that their results are NaN, not wrong.
    """
    return _usable(rows.abs().amax(-1) / top)


def minmax_scale(rows: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point that map each row's range, widened to hold 0, onto 0..top.

    Returns:
        float32 (r,) and float32 integers (r,): value = scale * (level - zero).
    """
    low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    scale = _usable((high - low) / top)
    return scale, (-low / scale).round().nan_to_num()


def _usable(scale: Tensor) -> Tensor:
    tiny = scale < torch.finfo(torch.float32).tiny  # zero, or so small that its reciprocal overflows
    return torch.where(tiny, 1.0, torch.where(scale.isfinite(), scale, torch.nan))


def search_factors(spec: WeightSpec) -> list[float]:
    """What absmax scales are multiplied with in a search: float32 values."""
    if spec.max_multiple:
        return torch.tensor([1.0, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5], dtype=torch.float32, device="cpu").tolist()
    lowest, points = (0.5, SEARCH_POINTS // 2) if spec.max_shift else (0.3, SEARCH_POINTS)
    return torch.linspace(1.0, lowest, points, dtype=torch.float32, device="cpu").tolist()


def search_scale(rows: Tensor, spec: WeightSpec) -> Tensor:
    """Scale of each row that leaves the least sum of |error|**norm, among multiples of absmax scales.

    Clipping a few large values buys finer steps for the rest, so grids are searched down to 0.3 of the absmax scale (Lp shrink
    search). A grid with shifts repeats itself every factor of two: one octave will do. With multiples clipping hardly pays, but
    each scale suits the small subgroups, with few multiples to choose from, differently; some of those tried are wider.

    Args:
        rows: float32 (r, n).
    Returns:
        float32 (r,).
    """
    factors = search_factors(spec)
    step = max(1, CACHED_VALUES // max(1, rows.shape[-1]))
    found = [_search_part(part, spec, factors) for part in rows.split(step)]
    return torch.cat(found) if found else rows.new_ones(0)


def _search_part(rows: Tensor, spec: WeightSpec, factors: list[float]) -> Tensor:
    widest = absmax_scale(rows, spec.top)
    loss_of = _loss(rows, spec)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in factors:
        scale = widest * factor
        loss = loss_of(scale)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def _loss(rows: Tensor, spec: WeightSpec) -> Callable[[Tensor], Tensor]:
    """The sum of |error|**norm of each row (r, n) as a function of its scale (r,).

    Only the errors are computed, not the rounded values (subgroups.py). Every operation is one of float32 and every sum in a fixed
    order, in subgroups first: the C++ engine (csrc/weights.h) finds the same bits.
    """
    grid = get_grid(spec.grid)
    groups = F.pad(rows, (0, -rows.shape[-1] % spec.subgroup)).reshape(-1, spec.subgroup)
    columns, largest = columns_of(groups)
    width = -(-rows.shape[-1] // spec.subgroup)

    def errors(units: Tensor, step: Tensor) -> Tensor:
        found = round_to_grid(units, grid).sub_(units).mul_(step)
        return sum_columns(found.square_() if spec.norm == 2 else found.abs_().pow_(spec.norm))

    def with_shifts(scale: Tensor) -> Tensor:
        peak = largest / scale
        shift = flag(peak, grid, spec.max_shift)
        step = scale * power_of_two(shift)
        units = columns / step
        found, full = errors(units, step), saturated(peak, shift, grid, spec.max_shift)
        if len(full):
            found[full] = torch.minimum(found[full], errors(units[:, full] * 0.5, step[full] * 2))
        return found

    def with_multiples(scale: Tensor) -> Tensor:
        found = errors(columns / scale, scale)
        for multiple in range(2, spec.max_multiple + 1):
            step = scale * multiple
            found = torch.minimum(found, errors(columns / step, step))
        return found

    def loss(scale: Tensor) -> Tensor:
        each = scale[:, None].expand(-1, width).reshape(-1)
        if spec.max_multiple:
            found = with_multiples(each)
        elif spec.max_shift:
            found = with_shifts(each)
        else:
            found = errors(columns / each, each)
        return sum_columns(found.view(len(rows), width).t())

    return loss


def weight_scale(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """Scales of a weight matrix by its spec.

    Args:
        matrix: float32 (O, K).
    Returns:
        float32 (O, 1), or (O, ceil(K / group)) where the spec has group scales.
    """
    grid, rows = get_grid(spec.grid), _groups(matrix, spec.group)
    scale = absmax_scale(rows, spec.top) if spec.scale == "absmax" else search_scale(rows, spec)
    return round_group_scale(
        scale.view(matrix.shape[0], -1), rows.view(matrix.shape[0], -1, rows.shape[-1]), grid, spec.group_scale
    )


def round_group_scale(scale: Tensor, groups: Tensor, grid: Grid, kind: str) -> Tensor:
    """Scales of groups in the format they are stored in.

    `e4m3`: 8-bit floats under one float32 scale for a whole weight or token, which maps the largest of them to 448 (NVFP4).
    `e8m0`: powers of two; the largest magnitude of a group keeps its exponent, as the OCP specification has it, and may be cut off
    (MXFP4).

    Args:
        scale: float32 (..., g) of the groups; groups: float32 (..., g, n), their values.
    Returns:
        float32 (..., g).
    """
    if kind == "float32":
        return scale
    largest = groups.abs().amax(-1)
    if kind == "e4m3":
        known = torch.where(largest == 0, 0.0, scale)
        whole = (known.amax() if scale.ndim == 2 else known.amax(-1, keepdim=True)) / 448
        whole = torch.where(whole == 0, 1.0, whole)
        return (scale / whole).clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float() * whole
    exponent = torch.frexp(largest).exponent - torch.frexp(largest.new_tensor(float(grid.top))).exponent
    power = torch.where(largest > 0, torch.exp2(exponent.clamp(-126, 127).float()), 1.0)
    return torch.where(largest.isfinite(), power, torch.nan)


def _groups(matrix: Tensor, group: int) -> Tensor:
    """Rows that share a scale: the matrix itself, or its runs of `group` (the last one padded with zeros)."""
    if not group:
        return matrix
    return F.pad(matrix, (0, -matrix.shape[-1] % group)).reshape(-1, group)


def spread(scale: Tensor, count: int, group: int) -> Tensor:
    """Scales (..., g) repeated over the values they serve: (..., 1) as it is, else (..., count)."""
    return scale.unsqueeze(-1).expand(*scale.shape, group).flatten(-2)[..., :count] if group else scale


@dataclass
class QuantizedWeight:
    """A weight matrix as stored.

    levels: float32 integers (O, K), multipliers applied. multiplier: uint8 (O, ceil(K / subgroup)), or None where there are none.
    scale: float32 (O, 1), or of groups.
    """

    levels: Tensor
    multiplier: Tensor | None
    scale: Tensor
    spec: WeightSpec

    def codes(self) -> Tensor:
        """uint8 (O, K), one code a value."""
        levels = self.levels
        if self.multiplier is not None:
            levels = levels / spread(self.multiplier.float(), levels.shape[-1], self.spec.subgroup)
        return levels_to_codes(levels, get_grid(self.spec.grid))

    def dequantize(self) -> Tensor:
        """float32 (O, K)."""
        return self.levels * spread(self.scale, self.levels.shape[-1], self.spec.group)


def quantize_weight(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> QuantizedWeight:
    """Nearest codes, and best multipliers, of a weight matrix (O, K) under given scales."""
    units = matrix.float() / spread(scale, matrix.shape[-1], spec.group)
    return QuantizedWeight(*round_units(units, spec), scale, spec)


def round_units(units: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
    """`levels` and `multiplier` of a QuantizedWeight, of finite weights in units of their scales: float32 (O, K)."""
    grid = get_grid(spec.grid)
    if spec.max_multiple:
        return round_with_best_multiples(units, grid, spec.max_multiple, spec.subgroup)
    if spec.max_shift:
        levels, shift = round_with_shifts(units, grid, spec.max_shift, spec.subgroup)
        return levels, 1 << shift
    return round_to_grid(units, grid), None


def decode_weight(codes: Tensor, multiplier: Tensor | None, spec: WeightSpec) -> Tensor:
    """Integers (float32, multipliers applied) of codes (O, K) and multipliers (O, ceil(K / subgroup))."""
    levels = decode(codes, get_grid(spec.grid))
    return levels if multiplier is None else levels * spread(multiplier.float(), levels.shape[-1], spec.subgroup)


@dataclass
class FixedScale:
    """A calibrated scale and zero point of an input: value = scale * (level - zero).

    scale: float32 (), or (r,), one for each row; zero: integers of any dtype, shaped alike, 0 for signed grids. (T,) in the layers,
    one entry a calibrated timestep.
    """

    scale: Tensor
    zero: Tensor

    def at(self, entry: int | Tensor) -> "FixedScale":
        """The entry of one timestep; or, int64 (r,), of the timestep of each row."""
        return FixedScale(self.scale[entry], self.zero[entry])

    def split(self, size: int) -> Iterator["FixedScale"]:
        """For every `size` rows what serves them; without end where one entry serves all."""
        if not self.scale.ndim:
            return itertools.repeat(self)
        return map(FixedScale, self.scale.split(size), self.zero.split(size))


def quantize_activation(x: Tensor, spec: ActivationSpec, fixed: FixedScale | None = None) -> tuple[Tensor, Tensor]:
    """Integers and scales of an input.

    Args:
        x: any float dtype (r, p, c): r tokens or images with a scale each, p pixels, c channels.
        fixed: the calibrated scale, where the spec has no dynamic ones.
    Returns:
        float32 integers (r, p, c) with the zero point already taken off, and float32 scales (r, 1, 1), or (r, p, c) where the spec
        has channel groups: x is about integers * scale. Rows with a NaN or an infinity have scale NaN.
    """
    if x.numel() == 0:
        return x.float(), torch.ones(len(x), 1, 1, device=x.device)
    parts = [_quantize_rows(part.float(), spec, own) for part, own in _parts(x, fixed)]
    integers, scales = zip(*parts, strict=True)
    return (integers[0], scales[0]) if len(parts) == 1 else (torch.cat(integers), torch.cat(scales))


def round_activation(x: Tensor, spec: ActivationSpec, fixed: FixedScale | None = None) -> Tensor:
    """What an input is rounded to: integers times scales of `quantize_activation`, to the last bit, in fewer passes over memory.

    Returns:
        float32, shaped as x.
    """
    rounded = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        for (part, own), out in zip(_parts(x, fixed), rounded.split(_rows_together(x)), strict=True):
            torch.mul(*_quantize_rows(part.float(), spec, own), out=out)
    return rounded


def _parts(x: Tensor, fixed: FixedScale | None) -> Iterator[tuple[Tensor, FixedScale | None]]:
    """Rows that are handled together, with their calibrated scales."""
    size = _rows_together(x)
    return zip(x.split(size), itertools.repeat(None) if fixed is None else fixed.split(size), strict=False)


def _rows_together(x: Tensor) -> int:
    return max(1, CACHED_VALUES // x[0].numel())


def _quantize_rows(values: Tensor, spec: ActivationSpec, fixed: FixedScale | None) -> tuple[Tensor, Tensor]:
    grid, (rows, pixels, channels) = get_grid(spec.grid), values.shape
    flat = F.pad(values, (0, -channels % spec.group)).reshape(-1, spec.group) if spec.group else values.reshape(rows, -1)
    shape, zero = (rows, pixels if spec.group else 1, -1), None
    if fixed is not None:
        scale = torch.where(flat.abs().amax(-1).isfinite(), fixed.scale, torch.nan)
        zero = fixed.zero.float().reshape(-1, 1, 1) if spec.zero_point else None
    elif spec.zero_point:
        scale, zero = minmax_scale(flat, spec.top)
        zero = spread(zero.view(shape), channels, spec.group)
    else:
        scale = absmax_scale(flat, spec.top)
    scale = scale.view(shape)
    if spec.group_scale != "float32":
        scale = round_group_scale(scale, flat.view(*scale.shape, spec.group), grid, spec.group_scale)
    scale = spread(scale, channels, spec.group)
    units = (values * scale.reciprocal()).nan_to_num(0.0, 0.0, 0.0)
    integers = _round_activation(units if zero is None else units + zero, grid, spec)
    return integers if zero is None else integers - zero, scale


def _round_activation(units: Tensor, grid: Grid, spec: ActivationSpec) -> Tensor:
    if not spec.two_stage:
        return round_to_grid(units, grid)
    stage1 = units.round().clamp_(0 if spec.zero_point else -spec.top, spec.top)
    if spec.max_multiple:
        return round_with_multiples(stage1, grid, spec.max_multiple, spec.subgroup)[0]
    return round_with_shifts(stage1, grid, spec.max_shift, spec.subgroup, spec.rounding == "truncate")[0]


class _StraightThrough(torch.autograd.Function):
    """Rounded values forward, the gradient of the unrounded ones backward."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` as a value, `exact` as far as gradients are concerned (Bengio et al. 2013)."""
    return _StraightThrough.apply(exact, rounded)  # type: ignore[no-any-return]


class _LearnedScale(torch.autograd.Function):
    """`round_activation` under calibrated scales; its gradients are those of LSQ.

    Only x is kept, which a float layer would keep too; the backward pass rounds it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, spec: ActivationSpec) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.spec = spec
        return round_activation(x, spec, FixedScale(scale, zero))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        zero = zero.to(scale.dtype)  # a packed layer's are bytes, and of those no difference is negative
        spec, size = ctx.spec, _rows_together(x)
        bottom = -spec.top if spec.two_stage and not spec.zero_point else get_grid(spec.grid).bottom
        of_x, of_scale = torch.empty_like(x), torch.empty_like(scale)
        parts = (tensor.split(size) for tensor in (x, gradient, scale, zero, of_x, of_scale))
        for values, above, step, offset, to_x, to_scale in zip(*parts, strict=True):
            found = torch.mul(*_quantize_rows(values.float(), spec, FixedScale(step, offset)))
            units = values.float() * step.reciprocal().view(-1, 1, 1)
            inside = (units >= (bottom - offset).view(-1, 1, 1)) & (units <= (spec.top - offset).view(-1, 1, 1))
            torch.mul(above, inside, out=to_x)
            slope = (found - values * inside).mul_(above)
            to_scale.copy_(slope.sum((1, 2)) / step)
        return of_x, of_scale, None, None


def round_learned(x: Tensor, scale: Tensor, zero: Tensor, spec: ActivationSpec) -> Tensor:
    """`round_activation` whose scales can be learned (LSQ, Esser et al. 2020, eq. 3).

    The gradient of x passes where x lies on the grid's range and stops where it is cut off. That of a scale is level - x / scale
    inside the range, the level itself outside.

    Args:
        x: any float dtype (r, p, c).
        scale: float32 (r,). zero: integers of any dtype (r,), 0 for signed grids.
        spec: without channel groups.
    Returns:
        float32, shaped as x; the bits of `round_activation`.
    """
    return _LearnedScale.apply(x, scale, zero, spec)  # type: ignore[no-any-return]
