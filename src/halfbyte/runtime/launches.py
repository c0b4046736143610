"""Launches of the GPU engine's kernels: a whole packed linear layer or convolution, with the tiles that suit its size.

    linear    quantize, then: up to FEW_ROWS rows a product that decodes in registers; else decode, product
    conv2d    range, quantize (with padding), decode, product

Weights stay 4-bit in memory. For more than FEW_ROWS rows the codes are decoded once a call into bytes that live until it ends, as
decoding them again for every tile of rows would cost more than the product.

Kernels are compiled for grids, for tiles out of a short list and for whether sizes are multiples of 16, never for a number of
rows. Which of the tiles is fastest is measured once for each layer shape and power of two of rows (HALFBYTE_AUTOTUNE=0: the first
that fits), but not while a CUDA graph is captured. Nothing else here waits for the GPU. Floating-point contraction is off:
results are those of the reference backend to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.runtime import triton_kernels as kernels
from halfbyte.runtime.tuning import Tiles, blocks_of, card, choose, few_tiles, power_of_two, tiles_for

FEW_ROWS = 64
CHUNKS, RANGE_BLOCK = 128, 4096  # programs that look for the range of one large image, and the values each takes at a time
EXACT = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class InputGrid:
    """How an input is rounded (`recipe.ActivationSpec`), as numbers that a kernel is compiled for."""

    bottom: int  # of the table
    top: int
    mantissa: int  # bits; -1 for tables of all integers
    signed: bool
    largest: int  # integer the largest magnitude maps to
    max_shift: int
    subgroup: int  # 1 where values are rounded once
    truncate: bool
    max_multiple: int

    def constants(self) -> dict[str, Any]:
        return {
            "BOTTOM": self.bottom,
            "TOP": self.top,
            "MANTISSA": self.mantissa,
            "SIGNED": self.signed,
            "LARGEST": self.largest,
            "MAX_SHIFT": self.max_shift,
            "SUBGROUP": self.subgroup,
            "TRUNCATE": self.truncate,
            "MAX_MULTIPLE": self.max_multiple,
        }


@dataclass(frozen=True)
class WeightGrid:
    """How codes become integers."""

    bits: int
    table: int  # magnitudes of the codes 0 to 7 of sign and magnitude, a byte each, the lowest first; 0: two's complement
    subgroup: int  # 0: no multipliers
    multiples: bool  # multipliers are whole numbers, not powers of two

    def constants(self) -> dict[str, Any]:
        return {"BITS": self.bits, "TABLE": self.table, "SUBGROUP": self.subgroup, "MULTIPLES": self.multiples}


@dataclass(frozen=True)
class Weights:
    """Of a layer: codes uint8 (N, ceil(K / 2)) or (N, K), multipliers as nibbles (N, ...), scale float32 (N, 1), bias (N,)."""

    codes: Tensor
    multipliers: Tensor | None
    scale: Tensor
    bias: Tensor | None
    grid: WeightGrid

    def even_first(self, channels: int) -> bool:
        """Whether codes are decoded by words, and both operands have the even places of each eight along K first."""
        words = self.grid.bits == 4 and self.grid.table in (0, kernels.COUNTING.value) and self.grid.subgroup % 8 == 0
        return words and channels % 8 == 0

    def arguments(self, even_first: bool) -> tuple[tuple[Tensor, Tensor], tuple[int, int], dict[str, Any]]:
        """Codes and multipliers; what is from one row to the next, of both; and the constants of kernels that decode."""
        codes = self.codes.view(torch.int32) if even_first else self.codes
        multipliers, pitch = (codes, 0) if self.multipliers is None else (self.multipliers, self.multipliers.shape[1])
        return (codes, multipliers), (codes.shape[1], pitch), {"EVEN_FIRST": even_first, **self.grid.constants()}

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.scale if self.bias is None else self.bias


@dataclass(frozen=True)
class Stored:
    """A quantized input: int8 (r, h, w, c) with padding, float32 scales (r,) and int32 zeros (r,); unsigned levels less 128."""

    levels: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(
    x: Tensor, grid: InputGrid, fixed: tuple[Tensor | None, Tensor | None] = (None, None),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0), clear: Tensor | None = None, images: bool = True, even_first: bool = False,
) -> Stored:  # fmt: skip
    """Integers of an input, as the matrix units take them.

    Args:
        x: contiguous (r, h, w, c), one scale for each r.
        fixed: scale float32 (1,) and zero uint8 (1,), where they were calibrated.
        padding: rows above and below, columns left and right, of zeros.
        clear: int32, set to zero on the way.
        images: whether r counts images; else tokens, of one pixel each.
        even_first: whether the even places of each eight channels are stored before the odd ones.
    """
    (count, height, width, channels), (top, bottom, left, right) = x.shape, padding
    shape = (count, height + top + bottom, width + left + right, channels)
    stored = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales, zeros = x.new_empty(count, dtype=torch.float32), x.new_empty(count, dtype=torch.int32)
    ranges, size = scales, height * width * channels
    chunks = CHUNKS if size > 4 * RANGE_BLOCK else 1
    if images:
        ranges = x.new_empty((count, 3, chunks), dtype=torch.float32)
        kernels.range_kernel[(count, chunks)](
            x, ranges, height * width, channels, CHUNKS=chunks, BLOCK=RANGE_BLOCK, num_warps=8, **EXACT
        )
    block_c = max(32, grid.subgroup, min(8192, power_of_two(channels)))
    block_m = max(1, 4096 // block_c) if images else 1
    blocks = blocks_of(shape[1] * shape[2], block_m)
    scale, zero = fixed
    kernels.quantize_kernel[(count * blocks,)](
        x, ranges, scales if scale is None else scale, scales if zero is None else zero, stored, scales, zeros,
        zeros if clear is None else clear, blocks, 0 if clear is None else clear.numel(), channels,
        height, width, shape[1], shape[2], TOP_PAD=top, LEFT_PAD=left, IMAGES=images, FIXED=scale is not None,
        CHUNKS=chunks, BLOCK_M=block_m, BLOCK_C=block_c, WHOLE=channels <= block_c, EVEN_FIRST=even_first,
        num_warps=max(1, min(8, block_m * block_c // 512)), **grid.constants(), **EXACT,
    )  # fmt: skip
    return Stored(stored, scales, zeros)


def decode(weights: Weights, count: int, sums: bool, even_first: bool = False) -> tuple[Tensor, Tensor]:
    """Integers of codes: int8 (N, K) and, where asked for, their sums over K, int32 (N,)."""
    codes, grid = weights.codes, weights.grid
    whole = grid.bits == 8
    levels = codes.view(torch.int8) if whole else codes.new_empty((len(codes), count), dtype=torch.int8)
    total = codes.new_empty(len(codes), dtype=torch.int32)
    if sums or not whole:
        stored, pitches, constants = weights.arguments(even_first)
        kernels.decode_kernel[(blocks_of(len(codes), 4),)](
            *stored, levels, total, len(codes), count, *pitches,
            SUMS=sums, BLOCK_N=4, BLOCK_K=1024, num_warps=4, **constants, **EXACT,
        )  # fmt: skip
    return levels, total


def linear(
    x: Tensor, weights: Weights, grid: InputGrid, fixed: tuple[Tensor | None, Tensor | None] = (None, None), gelu: int = 0
) -> Tensor:
    """A packed linear layer on rows x (m, k), contiguous; (m, n) in the dtype of x.

    Args:
        gelu: 1: the GELU of the result, 2: its approximation by tanh.
    """
    rows = len(x)
    if rows <= FEW_ROWS:
        return _few_rows(x, weights, grid, fixed, gelu)
    stored = quantize(x[:, None, None], grid, fixed, images=False, even_first=weights.even_first(x.shape[1]))
    y = x.new_empty((rows, len(weights.codes)))
    _product(stored, y, weights, grid, gelu, {"IMAGES": False, "TAPS": 1, "KERNEL_W": 1})
    return y


def _few_rows(x: Tensor, weights: Weights, grid: InputGrid, fixed: tuple[Tensor | None, Tensor | None], gelu: int) -> Tensor:
    (rows, count), outputs, limits = x.shape, len(weights.codes), card(x.device)
    candidates = few_tiles(rows)
    sums = rows * outputs
    partial = x.new_empty(sums + blocks_of(outputs, min(one.n for one in candidates)), dtype=torch.int32)  # and a counter a tile
    even_first = weights.even_first(count)
    stored = quantize(x[:, None, None], grid, fixed, clear=partial, images=False, even_first=even_first)
    y, (operands, pitches, constants) = x.new_empty((rows, outputs)), weights.arguments(even_first)

    def launch(tiles: Tiles, partial: Tensor) -> None:
        across, steps = blocks_of(outputs, tiles.n), blocks_of(count, tiles.k)
        split = max(1, min(steps, 2 * limits.processors // across))
        kernels.few_rows_kernel[(1, across, split)](
            stored.levels, stored.scales, stored.zeros, *operands, *weights.ends(), y, partial, partial[sums:],
            rows, outputs, count, *pitches, SIGNED=grid.signed, BIAS=weights.bias is not None, GELU=gelu, SPLIT=split > 1,
            **constants, **tiles.constants(), **EXACT,
        )  # fmt: skip

    key = "few", x.device, candidates[0].m, x.dtype, outputs, count, grid, weights.grid
    launch(choose(key, candidates, x.device, lambda tiles: launch(tiles, torch.zeros_like(partial))), partial)
    return y


def conv2d(
    x: Tensor, sizes: Sequence[int], weights: Weights, grid: InputGrid, fixed: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """A packed convolution, without groups, on images x (b, h, w, c), contiguous; (b, h', w', n) in the dtype of x.

    Args:
        sizes: kernel, stride, dilation (h, w each), padding (top, bottom, left, right), and the output's height and width.
    """
    kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, bottom, left, right, out_height, out_width = sizes
    stored = quantize(x, grid, fixed, (top, bottom, left, right), even_first=weights.even_first(x.shape[-1]))
    y = x.new_empty((x.shape[0], out_height, out_width, len(weights.codes)))
    place = {"STRIDE_H": stride_h, "STRIDE_W": stride_w, "DILATION_H": dilation_h, "DILATION_W": dilation_w}
    _product(stored, y, weights, grid, 0, {"IMAGES": True, "TAPS": kernel_h * kernel_w, "KERNEL_W": kernel_w, **place})
    return y


def _product(stored: Stored, y: Tensor, weights: Weights, grid: InputGrid, gelu: int, place: dict[str, Any]) -> None:
    """Decode the weights and multiply."""
    _, height, width, channels = stored.levels.shape
    outputs, limits = y.shape[-1], card(y.device)
    rows = y.numel() // outputs
    levels, sums = decode(weights, place["TAPS"] * channels, not grid.signed, weights.even_first(channels))
    out_height, out_width = y.shape[1:3] if place["IMAGES"] else (1, 1)
    constants = {"STRIDE_H": 1, "STRIDE_W": 1, "DILATION_H": 1, "DILATION_W": 1} | place

    def launch(tiles: Tiles) -> None:
        kernels.product_kernel[(blocks_of(rows, tiles.m) * blocks_of(outputs, tiles.n),)](
            stored.levels, stored.scales, stored.zeros, levels, sums, *weights.ends(), y,
            rows, outputs, channels, height, width, out_height, out_width,
            SIGNED=grid.signed, BIAS=weights.bias is not None, GELU=gelu, EVEN=channels % tiles.k == 0, TOGETHER=8,
            **constants, **tiles.constants(), **EXACT,
        )  # fmt: skip

    key = "product", y.device, power_of_two(rows), y.dtype, outputs, channels, grid.signed, *constants.values()
    launch(choose(key, tiles_for(rows, outputs, channels, limits), y.device, launch))
