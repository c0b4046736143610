"""Scale searches and rounding as plain functions on rows of values; nothing here knows modules.

Three steps, each usable alone: find a scale (`absmax_scale`, `minmax_scale`, `search_scale`), choose shifts where the grid carries
them (`round_with_shifts`), and look at a whole weight or activation through its spec (`quantize_weight`, `quantize_activation`).
Both the trainable and the packed layers call these same functions, which is why they agree to the last code.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import Grid, decode, get_grid, levels_to_codes, round_to_grid
from halfbyte.recipe import ActivationSpec, WeightSpec

SEARCH_POINTS = 40
CACHED_VALUES = 1 << 17  # values handled together where many passes follow each other: their temporaries stay in the L2 cache


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


def round_with_shifts(units: Tensor, grid: Grid, max_shift: int, subgroup: int, truncate: bool = False) -> tuple[Tensor, Tensor]:
    """Round each subgroup to `level << shift` with a shift of its own (leading-zero suppression, QuaRTZ stage 2).

    The shift is the paper's FLAG, the smallest at which the largest magnitude has no more bits than the table's top, or one more
    where that lowers the squared error (31 on a table that ends at 7: FLAG 2 saturates at 28, shift 3 reaches 32). Truncation
    always takes FLAG and drops the low bits.

    Args:
        units: float32 (..., n) in units of the scale, finite.
        subgroup: neighbours along the last axis that share a shift; the last subgroup may be shorter.
    Returns:
        float32 integers (..., n), already shifted, and uint8 shifts (..., ceil(n / subgroup)).
    """
    return _by_subgroups(units, subgroup, partial(_cut if truncate else _round_best, grid, max_shift))


def round_with_multiples(units: Tensor, grid: Grid, max_multiple: int, subgroup: int) -> tuple[Tensor, Tensor]:
    """Round each subgroup to `level * multiple` with a small integer of its own: leading-zero suppression in finer steps.

    A shift fits a subgroup within a factor of two, a multiple within one step of the table. It is the smallest with which the
    table's top reaches the largest magnitude, or one less where that lowers the squared error. Products stay exact in integers.

    Args:
        units: whole numbers in float32 (..., n), in units of the scale.
        subgroup: neighbours along the last axis that share a multiple; the last subgroup may be shorter.
    Returns:
        float32 integers (..., n), already multiplied, and uint8 multiples (..., ceil(n / subgroup)), 1 to `max_multiple`.
    """
    return _by_subgroups(units, subgroup, partial(_round_multiple, grid, max_multiple))


def _by_subgroups(units: Tensor, subgroup: int, round_part: Callable[[Tensor, Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
    """`round_part` on groups (g, subgroup) of neighbours, into levels of their shape and one number (uint8) a group."""
    count = units.shape[-1]
    tail = -count % subgroup
    groups = (F.pad(units, (0, tail)) if tail else units).unflatten(-1, (-1, subgroup))
    levels = torch.empty(groups.shape, dtype=groups.dtype, device=groups.device)  # contiguous, whatever the input is
    numbers = torch.empty(groups.shape[:-1], dtype=torch.uint8, device=groups.device)
    size = max(1, CACHED_VALUES // subgroup)
    parts = groups.reshape(-1, subgroup).split(size), levels.view(-1, subgroup).split(size), numbers.view(-1).split(size)
    for exact, out, number in zip(*parts, strict=True):
        round_part(exact, out, number)
    return levels.flatten(-2)[..., :count], numbers


def _round_multiple(grid: Grid, max_multiple: int, groups: Tensor, out: Tensor, multiples: Tensor) -> None:
    columns, largest = _columns(groups)
    reaching = (largest / grid.top).ceil_().clamp_(1, max_multiple)
    less = (reaching - 1).clamp_(min=1)
    levels, lower = (round_to_grid(columns / multiple, grid).mul_(multiple) for multiple in (reaching, less))
    better = _sum_columns((lower - columns).square_()) < _sum_columns((levels - columns).square_())
    out.copy_(torch.where(better, lower, levels).t())
    multiples.copy_(torch.where(better, less, reaching))


def _flag(largest: Tensor, grid: Grid, max_shift: int) -> Tensor:
    """The smallest shift at which a group's largest magnitude is no longer, in bits, than the grid's top level."""
    length = _exponent(largest)  # of a positive integer: its bit length
    return (length - grid.top.bit_length()).clamp_(0, max_shift).float()


def _exponent(values: Tensor) -> Tensor:
    """int32 e with 2**(e - 1) <= value < 2**e, of values >= 0; subnormal numbers and 0 have some e below -100."""
    if values.dtype != torch.float32:
        return torch.frexp(values).exponent
    return (values.contiguous().view(torch.int32) >> 23) - 126  # a fifth of the time of frexp


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 2**e of small whole numbers (a tenth of the time of exp2)."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _columns(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (g, n) as contiguous columns (n, g), which torch adds up and compares many at a time; and their largest magnitudes."""
    columns = groups.t().contiguous()
    return columns, columns.abs().amax(0)


def _sum_columns(columns: Tensor) -> Tensor:
    """The sum over the first axis, in pairs: the same for a column whatever stands beside it."""
    while len(columns) > 1:
        half = len(columns) // 2
        pairs = columns[:half] + columns[half : 2 * half]
        columns = pairs if len(columns) == 2 * half else torch.cat([pairs, columns[2 * half :]])
    return columns[0]


def _round_best(grid: Grid, max_shift: int, groups: Tensor, out: Tensor, shifts: Tensor) -> None:
    """A larger shift can only help groups that saturate: below the top, a grid holds every level of the next coarser one."""
    columns, largest = _columns(groups)
    shift = _flag(largest, grid, max_shift)
    levels = _round_shifted(columns, shift, grid)
    full = _saturated(largest, shift, grid, max_shift)
    if len(full):
        exact, low = columns[:, full], levels[:, full]
        high = _round_shifted(exact, shift[full] + 1, grid)
        better = _sum_columns((high - exact).square_()) < _sum_columns((low - exact).square_())
        levels[:, full] = torch.where(better, high, low)
        shift[full] += better
    out.copy_(levels.t())
    shifts.copy_(shift)


def _saturated(largest: Tensor, shift: Tensor, grid: Grid, max_shift: int) -> Tensor:
    """Indices of the groups whose largest magnitude lies above the top level and which have a larger shift to go to."""
    return ((largest > grid.top * _power_of_two(shift)) & (shift < max_shift)).nonzero().squeeze(1)


def _cut(grid: Grid, max_shift: int, groups: Tensor, out: Tensor, shifts: Tensor) -> None:
    flag = _flag(groups.abs().amax(-1, keepdim=True), grid, max_shift)
    kept = (groups.abs() * torch.exp2(-flag)).floor_().clamp_(max=grid.top) * torch.exp2(flag)
    out.copy_(kept.copysign(groups).add_(0.0))
    shifts.copy_(flag.squeeze(-1))


def _round_shifted(groups: Tensor, shift: Tensor, grid: Grid) -> Tensor:
    return round_to_grid(groups * _power_of_two(-shift), grid).mul_(_power_of_two(shift))


def round_units(units: Tensor, grid: Grid, max_shift: int, subgroup: int) -> Tensor:
    """Nearest representable integers (float32), with shifts where `max_shift` is not 0."""
    return round_with_shifts(units, grid, max_shift, subgroup)[0] if max_shift else round_to_grid(units, grid)


def search_factors(max_shift: int) -> list[float]:
    """What absmax scales are multiplied with in a search: float32 values."""
    lowest, points = (0.5, SEARCH_POINTS // 2) if max_shift else (0.3, SEARCH_POINTS)
    return torch.linspace(1.0, lowest, points, dtype=torch.float32, device="cpu").tolist()


def search_scale(rows: Tensor, grid: Grid, max_shift: int = 0, subgroup: int = 16, norm: float = 2.0) -> Tensor:
    """Scale of each row that leaves the least sum of |error|**norm, among shrunken absmax scales.

    Clipping a few large values buys finer steps for the rest. A grid with shifts repeats itself every factor of two, so one octave
    is searched; other grids are searched down to 0.3 of the absmax scale (Lp shrink search).

    Args:
        rows: float32 (r, n).
    Returns:
        float32 (r,).
    """
    factors = search_factors(max_shift)
    step = max(1, CACHED_VALUES // max(1, rows.shape[-1]))
    found = [_search_part(part, grid, max_shift, subgroup, norm, factors) for part in rows.split(step)]
    return torch.cat(found) if found else rows.new_ones(0)


def _search_part(rows: Tensor, grid: Grid, max_shift: int, subgroup: int, norm: float, factors: list[float]) -> Tensor:
    widest = absmax_scale(rows, grid.top << max_shift)
    loss_of = _loss(rows, grid, max_shift, subgroup, norm)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in factors:
        scale = widest * factor
        loss = loss_of(scale)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def _loss(rows: Tensor, grid: Grid, max_shift: int, subgroup: int, norm: float) -> Callable[[Tensor], Tensor]:
    """The sum of |error|**norm of each row (r, n) as a function of its scale (r,).

    Only the errors are computed, not the rounded values (`round_with_shifts`). Every operation is one of float32 and every sum in
    a fixed order, in subgroups first: the C++ engine (csrc/weights.h) finds the same bits.
    """
    groups = F.pad(rows, (0, -rows.shape[-1] % subgroup)).reshape(-1, subgroup)
    columns, largest = _columns(groups)
    width = -(-rows.shape[-1] // subgroup)

    def errors(units: Tensor, step: Tensor) -> Tensor:
        found = round_to_grid(units, grid).sub_(units).mul_(step)
        return _sum_columns(found.square_() if norm == 2 else found.abs_().pow_(norm))

    def loss(scale: Tensor) -> Tensor:
        each = scale[:, None].expand(-1, width).reshape(-1)
        if not max_shift:
            return _sum_columns(errors(columns / each, each).view(len(rows), width).t())
        peak = largest / each
        shift = _flag(peak, grid, max_shift)
        step = each * _power_of_two(shift)
        units = columns / step
        found, full = errors(units, step), _saturated(peak, shift, grid, max_shift)
        if len(full):
            found[full] = torch.minimum(found[full], errors(units[:, full] * 0.5, step[full] * 2))
        return _sum_columns(found.view(len(rows), width).t())

    return loss


def weight_scale(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """Scales of a weight matrix by its spec.

    Args:
        matrix: float32 (O, K).
    Returns:
        float32 (O, 1), or (O, ceil(K / group)) where the spec has group scales.
    """
    grid, rows = get_grid(spec.grid), _groups(matrix, spec.group)
    if spec.scale == "absmax":
        scale = absmax_scale(rows, grid.top << spec.max_shift)
    else:
        scale = search_scale(rows, grid, spec.max_shift, spec.subgroup, spec.norm)
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
    """A weight matrix as stored: `levels` (float32 integers, shifts applied), `shift` (uint8 or None), `scale` (O, 1 or groups)."""

    levels: Tensor
    shift: Tensor | None
    scale: Tensor
    spec: WeightSpec

    def codes(self) -> Tensor:
        """uint8 (O, K), one code a value."""
        levels = self.levels
        if self.shift is not None:
            levels = levels * _power_of_two(-spread(self.shift.to(torch.int32), levels.shape[-1], self.spec.subgroup))
        return levels_to_codes(levels, get_grid(self.spec.grid))

    def dequantize(self) -> Tensor:
        """float32 (O, K)."""
        return self.levels * spread(self.scale, self.levels.shape[-1], self.spec.group)


def quantize_weight(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> QuantizedWeight:
    """Nearest codes and shifts of a weight matrix (O, K) under given scales."""
    units = matrix.float() / spread(scale, matrix.shape[-1], spec.group)
    grid = get_grid(spec.grid)
    if spec.max_shift:
        levels, shift = round_with_shifts(units, grid, spec.max_shift, spec.subgroup)
        return QuantizedWeight(levels, shift, scale, spec)
    return QuantizedWeight(round_to_grid(units, grid), None, scale, spec)


def decode_weight(codes: Tensor, shift: Tensor | None, spec: WeightSpec) -> Tensor:
    """Integers (float32, shifts applied) of codes (O, K) and shifts (O, ceil(K / subgroup))."""
    levels = decode(codes, get_grid(spec.grid))
    if shift is None:
        return levels
    return levels * torch.exp2(spread(shift.float(), levels.shape[-1], spec.subgroup))


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
