"""Number grids: every 4-bit format is a table of 16 small integers, decoded as

    value = scale * (level[code] << shift) + offset

A `Grid` is the table alone. The shift is an axis of its own (`recipe.WeightSpec.max_shift`): any table may carry one as long as
its largest level stays within 8 bits after the largest shift. Scales and offsets belong to tensors, not to grids.

One tie rule serves every grid: a value halfway between two neighbouring levels goes to the one whose magnitude index is even.
On contiguous integer grids that is IEEE round-half-to-even; on minifloat grids it is round-to-even-mantissa. Zero always encodes to
code 0: the negative zero of the sign-magnitude grids (code 8 of 16) decodes to 0 and is never produced.

The floats of 6 and 8 bits and the codebook nf4 exist for comparison: their levels do not fit 8-bit integers (`simulated_only`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import RecipeError, listed

Coding = Literal["twos-complement", "sign-magnitude", "unsigned", "codebook"]


@dataclass(frozen=True)
class Grid:
    """One number format. `magnitudes` are the levels >= 0 in ascending order; everything else is derived."""

    name: str
    magnitudes: tuple[int, ...] = field(repr=False)
    coding: Coding
    bits: int = 4
    codebook: tuple[float, ...] = field(default=(), repr=False)  # all levels in ascending order, where they are no integers

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The number each code stands for, by code: 2**bits integers, unless the grid is a codebook."""
        if self.coding == "codebook":
            return self.codebook
        if self.coding == "unsigned":
            return self.magnitudes
        if self.coding == "sign-magnitude":
            return self.magnitudes + tuple(-level for level in self.magnitudes)
        half = 1 << (self.bits - 1)
        return tuple(range(half)) + tuple(range(-half, 0))

    @property
    def signed(self) -> bool:
        return self.coding != "unsigned"

    @property
    def top(self) -> int:
        """Largest level; absmax scales map the largest magnitude onto it."""
        return self.magnitudes[-1]

    @property
    def bottom(self) -> int:
        """Smallest level: 0 when unsigned, else negative."""
        return int(min(self.levels))

    @property
    def contiguous(self) -> bool:
        """Whether the levels are all the integers from bottom to top, so that rounding alone encodes."""
        return self.top == len(self.magnitudes) - 1

    @cached_property
    def mantissa_bits(self) -> int | None:
        """Of a minifloat; None where the magnitudes are not those of one."""
        dense = next((index for index, level in enumerate(self.magnitudes) if level != index), len(self.magnitudes))
        bits, exponents = (dense - 1).bit_length() - 2, len(self.magnitudes)
        if bits < 0 or self.magnitudes != minifloat((exponents >> bits).bit_length() - 1, bits):
            return None
        return bits

    @property
    def largest_shift(self) -> int:
        """Largest shift whose top level still fits int8 (signed) or uint8 (unsigned).

        0 for wider grids, and for int4: with shifts its lone -8 makes rounding twice differ from rounding once. lzs4 is int4
        without the -8, and carries them.
        """
        if self.bits != 4 or self.coding in ("twos-complement", "codebook"):
            return 0
        return (self.reach // self.top).bit_length() - 1

    @property
    def reach(self) -> int:
        """The largest integer of the bytes that products are taken of: of int8 (signed), or of uint8."""
        return 127 if self.signed else 255

    @property
    def simulated_only(self) -> bool:
        """Whether there is no packed form: codes that are neither nibbles nor bytes, or levels beyond 8 bits."""
        return self.coding == "codebook" or self.bits not in (4, 8) or self.top > self.reach

    @property
    def decoded_dtype(self) -> torch.dtype:
        """int8 or uint8: what a decoded, shifted level fits in, unless the grid is for simulation only."""
        return torch.int8 if self.signed else torch.uint8


def minifloat(exponent_bits: int, mantissa_bits: int) -> tuple[int, ...]:
    """Magnitudes of a tiny float with subnormals, scaled so that the smallest positive one is 1 (no NaN, no infinity)."""
    subnormal = range(1 << mantissa_bits)
    normal = ((1 << mantissa_bits | m) << (e - 1) for e in range(1, 1 << exponent_bits) for m in subnormal)
    return (*subnormal, *normal)


def _normal_float() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of a normal distribution, 8 from 0 up and 8 up to 0, scaled to end at -1 and 1.

    Source: Dettmers et al. 2023 (QLoRA), appendix E. The outermost probability leaves half a step of both tables outside.
    """
    outermost, normal = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2, NormalDist()
    upper = [normal.inv_cdf(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    lower = [-normal.inv_cdf(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    return tuple(level / upper[0] for level in (*lower, 0.0, *reversed(upper)))


NORMAL_FLOAT = _normal_float()


def _minifloats(bits: int, exponents: Sequence[int]) -> list[Grid]:
    """The floats of a width, signed and unsigned, by exponent bits: where there is no sign its bit goes to the mantissa."""
    signed = [Grid(f"e{e}m{bits - 1 - e}", minifloat(e, bits - 1 - e), "sign-magnitude", bits) for e in exponents]
    return signed + [Grid(f"ue{e}m{bits - e}", minifloat(e, bits - e), "unsigned", bits) for e in exponents]


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("int4", tuple(range(8)), "twos-complement"),
        Grid("lzs4", tuple(range(8)), "sign-magnitude"),
        *_minifloats(4, (1, 2, 3)),
        *_minifloats(6, (1, 2, 3, 4)),
        *_minifloats(8, (2, 3, 4, 5)),
        Grid("nf4", (0, 1), "codebook", codebook=NORMAL_FLOAT),
        Grid("int8", tuple(range(128)), "twos-complement", bits=8),
        Grid("uint8", tuple(range(256)), "unsigned", bits=8),
    )
}
FLOAT32_EXPONENT = 0x7F800000
NO_FRACTION = 1.5 * 2.0**23  # added to a float32 it leaves no room for a fraction, which is rounded half to even; gives +0
ALIASES = {"uint4": "ue1m3"}


def get_grid(name: str) -> Grid:
    """The grid of that name.

    Raises:
        RecipeError: for an unknown name; the message lists the known ones.
    """
    grid = GRIDS.get(ALIASES.get(name, name))
    if grid is None:
        raise RecipeError(f"unknown grid {name!r}; the grids are {listed([*GRIDS, *ALIASES])}")
    return grid


def _constant(values: Sequence[float]) -> Tensor:
    """A float32 tensor on the CPU, whatever torch's default dtype and device are: it is cached for the whole process."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


@cache
def _boundaries(grid: Grid) -> Tensor:
    """Where the magnitude index steps up: `count(boundaries <= |x|)` is the index, ties included.

    A midpoint below an even index belongs to that index; below an odd one to the even index beneath, so there the boundary is
    the next float32 above the midpoint.
    """
    midpoints = _constant([(a + b) / 2 for a, b in zip(grid.magnitudes, grid.magnitudes[1:], strict=False)])
    above = torch.nextafter(midpoints, torch.full_like(midpoints, torch.inf))
    odd_index = torch.arange(1, len(grid.magnitudes), device="cpu") % 2 == 1
    return torch.where(odd_index, above, midpoints)


@cache
def _midpoints(grid: Grid) -> Tensor:
    """Between neighbouring levels of a codebook; a value on one goes to the level below."""
    return _constant([(a + b) / 2 for a, b in zip(grid.codebook, grid.codebook[1:], strict=False)])


@cache
def _level_table(grid: Grid) -> Tensor:
    return _constant(grid.levels)


@cache
def _magnitude_table(grid: Grid) -> Tensor:
    return _constant(grid.magnitudes)


def round_to_grid(units: Tensor, grid: Grid) -> Tensor:
    """The nearest level of every value, saturating at the ends; ties by the module's rule.

    Args:
        units: float32 of any shape, in units of the scale (already divided by it and by 2**shift). Must be finite.
    Returns:
        float32 integers of the same shape, never -0.
    """
    if grid.coding == "codebook":
        return _level_table(grid).to(units.device)[torch.bucketize(units.contiguous(), _midpoints(grid).to(units.device))]
    if grid.contiguous and units.dtype == torch.float32:
        return units.clamp(grid.bottom, grid.top).add_(NO_FRACTION).sub_(NO_FRACTION)  # ten times as fast as round()
    if grid.contiguous:
        return units.round().clamp_(grid.bottom, grid.top).add_(0.0)  # + 0.0 turns -0 into 0
    if grid.mantissa_bits and units.dtype == torch.float32:
        return _round_minifloat(units, grid.mantissa_bits, grid.bottom, grid.top)
    if not grid.signed:
        units = units.clamp(min=0)
    index = torch.bucketize(units.abs().contiguous(), _boundaries(grid).to(units.device), right=True)
    return _magnitude_table(grid).to(units.device)[index].copysign(units).add_(0.0)


def _round_minifloat(units: Tensor, mantissa_bits: int, bottom: int, top: int) -> Tensor:
    """Round to a float of few mantissa bits, thirty times as fast as a search in a table.

    Levels between 2**e and 2**(e + 1) are 2**(e - mantissa_bits) apart. Adding 1.5 * 2**(e - mantissa_bits + 23) leaves float32 no
    room for anything finer: the addition rounds, half to even, as the tie rule wants. Subtracting it again is exact, and gives +0.
    (With no mantissa bits even is not the even index, and a table is needed.)
    """
    clamped = units.clamp(bottom, top)
    binade = (clamped.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)  # 2**e
    coarse = binade.clamp_(min=2.0**mantissa_bits).mul_(1.5 * 2.0 ** (23 - mantissa_bits))
    return clamped.add_(coarse).sub_(coarse)


def levels_to_codes(levels: Tensor, grid: Grid) -> Tensor:
    """Codes (uint8) of values that are levels of the grid already; -128..127 and 0..255 for the 8-bit grids."""
    if grid.coding == "codebook":
        return torch.bucketize(levels.contiguous(), _midpoints(grid).to(levels.device)).to(torch.uint8)
    if grid.coding == "twos-complement":
        return (levels.to(torch.int16) & ((1 << grid.bits) - 1)).to(torch.uint8)
    magnitudes = levels.abs().contiguous()  # bucketize warns of copies
    if not grid.contiguous:
        magnitudes = torch.bucketize(magnitudes, _magnitude_table(grid).to(levels.device))
    codes = magnitudes.to(torch.uint8)
    return codes | (levels < 0).to(torch.uint8) << (grid.bits - 1) if grid.signed else codes


def encode(units: Tensor, grid: Grid) -> Tensor:
    """Codes (uint8, one a value) of the nearest levels; see `round_to_grid`."""
    return levels_to_codes(round_to_grid(units, grid), grid)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Levels (float32 integers) of codes (uint8)."""
    return _level_table(grid).to(codes.device)[codes.to(torch.int32)]
