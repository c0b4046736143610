"""Rounding where each subgroup of neighbours has a multiplier of its own: a power of two (a shift), or a small whole number.

Levels and multipliers are integers, so products with them stay exact. Plain functions on rows of values; nothing here knows specs.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import Grid, round_to_grid

CACHED_VALUES = 1 << 17  # values handled together where many passes follow each other: their temporaries stay in the L2 cache


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


def round_with_best_multiples(units: Tensor, grid: Grid, max_multiple: int, subgroup: int) -> tuple[Tensor, Tensor]:
    """Round each subgroup to `level * multiple` with whichever integer leaves the least squared error, the smallest of equals.

    All are tried, so what was rounded once rounds to itself. As `round_with_multiples`, but of any finite values.
    """
    return _by_subgroups(units, subgroup, partial(_round_best_multiple, grid, max_multiple))


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
    columns, largest = columns_of(groups)
    reaching = (largest / grid.top).ceil_().clamp_(1, max_multiple)
    less = (reaching - 1).clamp_(min=1)
    levels, lower = (round_to_grid(columns / multiple, grid).mul_(multiple) for multiple in (reaching, less))
    better = sum_columns((lower - columns).square_()) < sum_columns((levels - columns).square_())
    out.copy_(torch.where(better, lower, levels).t())
    multiples.copy_(torch.where(better, less, reaching))


def _round_best_multiple(grid: Grid, max_multiple: int, groups: Tensor, out: Tensor, multiples: Tensor) -> None:
    columns = groups.t().contiguous()
    levels = round_to_grid(columns, grid)
    least = sum_columns((levels - columns).square_())
    best = torch.ones_like(least)
    for multiple in range(2, max_multiple + 1):
        found = round_to_grid(columns / multiple, grid).mul_(multiple)
        error = sum_columns((found - columns).square_())
        better = error < least
        torch.where(better, found, levels, out=levels)
        best.masked_fill_(better, multiple)
        torch.minimum(error, least, out=least)
    out.copy_(levels.t())
    multiples.copy_(best)


def flag(largest: Tensor, grid: Grid, max_shift: int) -> Tensor:
    """The smallest shift at which a group's largest magnitude is no longer, in bits, than the grid's top level."""
    length = exponent(largest)  # of a positive integer: its bit length
    return (length - grid.top.bit_length()).clamp_(0, max_shift).float()


def exponent(values: Tensor) -> Tensor:
    """int32 e with 2**(e - 1) <= value < 2**e, of values >= 0; subnormal numbers and 0 have some e below -100."""
    if values.dtype != torch.float32:
        return torch.frexp(values).exponent
    return (values.contiguous().view(torch.int32) >> 23) - 126  # a fifth of the time of frexp


def power_of_two(exponent: Tensor) -> Tensor:
    """float32 2**e of small whole numbers (a tenth of the time of exp2)."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def columns_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (g, n) as contiguous columns (n, g), which torch adds up and compares many at a time; and their largest magnitudes."""
    columns = groups.t().contiguous()
    return columns, columns.abs().amax(0)


def sum_columns(columns: Tensor) -> Tensor:
    """The sum over the first axis, in pairs: the same for a column whatever stands beside it."""
    while len(columns) > 1:
        half = len(columns) // 2
        pairs = columns[:half] + columns[half : 2 * half]
        columns = pairs if len(columns) == 2 * half else torch.cat([pairs, columns[2 * half :]])
    return columns[0]


def _round_best(grid: Grid, max_shift: int, groups: Tensor, out: Tensor, shifts: Tensor) -> None:
    """A larger shift can only help groups that saturate: below the top, a grid holds every level of the next coarser one."""
    columns, largest = columns_of(groups)
    shift = flag(largest, grid, max_shift)
    levels = _round_shifted(columns, shift, grid)
    full = saturated(largest, shift, grid, max_shift)
    if len(full):
        exact, low = columns[:, full], levels[:, full]
        high = _round_shifted(exact, shift[full] + 1, grid)
        better = sum_columns((high - exact).square_()) < sum_columns((low - exact).square_())
        levels[:, full] = torch.where(better, high, low)
        shift[full] += better
    out.copy_(levels.t())
    shifts.copy_(shift)


def saturated(largest: Tensor, shift: Tensor, grid: Grid, max_shift: int) -> Tensor:
    """Indices of the groups whose largest magnitude lies above the top level and which have a larger shift to go to."""
    return ((largest > grid.top * power_of_two(shift)) & (shift < max_shift)).nonzero().squeeze(1)


def _cut(grid: Grid, max_shift: int, groups: Tensor, out: Tensor, shifts: Tensor) -> None:
    shift = flag(groups.abs().amax(-1, keepdim=True), grid, max_shift)
    kept = (groups.abs() * torch.exp2(-shift)).floor_().clamp_(max=grid.top) * torch.exp2(shift)
    out.copy_(kept.copysign(groups).add_(0.0))
    shifts.copy_(shift.squeeze(-1))


def _round_shifted(groups: Tensor, shift: Tensor, grid: Grid) -> Tensor:
    return round_to_grid(groups * power_of_two(-shift), grid).mul_(power_of_two(shift))
