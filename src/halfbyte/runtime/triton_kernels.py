"""The GPU engine's kernels (Triton): inputs to integers, 4-bit codes to integers, their exact product, scales and bias.

    quantize        x (r, p, c) floats   -> int8 (r, p, c), one scale and zero point a row
    decode          codes, shifts        -> int8 (N, K), and the sum of every row
    linear, conv2d  int8 x weights       -> y = scale_x[m] * scale_w[n] * sum_k X[m, k] * W[n, k] + bias[n]

Matrix units multiply signed bytes, and levels of unsigned grids reach 255. Those are stored as level - 128; what is missing,
(128 - zero) * sum_k W[n, k], is added to the sum. Signed levels are stored as they are, with zero 128 to leave nothing to add.

Weights stay 4-bit in memory. A few rows of input (up to FEW_ROWS) multiply codes decoded in registers, K split among programs;
for more rows the codes are decoded once a call into bytes that live until it ends, as decoding them again for every tile of rows
would cost more than the product. Every sum is an exact int32, so no order of additions changes a bit.

Without a GPU the same kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before this module is imported).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 64
CHUNKS = 32  # programs that look for the range of one image
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest scale whose reciprocal is finite
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # bits of float32 infinity; NaN is above
HALVES: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves float32 no room for fractions


@dataclass(frozen=True)
class InputGrid:
    """How an input is rounded (`recipe.ActivationSpec`), as numbers that a kernel is compiled for."""

    bottom: int  # of the table
    top: int
    mantissa: int  # bits; -1 for tables of all integers
    signed: bool
    largest: int  # integer the largest magnitude maps to
    max_shift: int
    subgroup: int  # 1 where there are no shifts
    truncate: bool


@dataclass(frozen=True)
class WeightGrid:
    """How codes become integers."""

    bits: int
    mantissa: int  # of sign and magnitude; 2 stands for the integers 0..7; -1: two's complement
    subgroup: int  # 0: no shifts


@triton.jit
def _power(exponent):
    """2**exponent, float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(units, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr):
    """`formats.round_to_grid`: the nearest level, ties to even magnitude indices."""
    clamped = tl.minimum(tl.maximum(units, BOTTOM), TOP)
    if MANTISSA < 0:
        return (clamped + HALVES) - HALVES
    bits = clamped.to(tl.int32, bitcast=True)
    binade = (bits & INFINITE).to(tl.float32, bitcast=True)
    if MANTISSA > 0:
        coarse = tl.maximum(binade, 1 << MANTISSA) * (HALVES / (1 << MANTISSA))
        return (clamped + coarse) - coarse
    fraction, exponent = bits & 0x7FFFFF, ((bits >> 23) & 255) - 127  # powers of two: index exponent + 1
    up = (fraction > 0x400000) | ((fraction == 0x400000) & (exponent % 2 == 0))
    magnitude = tl.where(exponent >= 0, tl.where(up, 2 * binade, binade), tl.where((exponent == -1) & (fraction > 0), 1.0, 0.0))
    return tl.where(clamped < 0, -magnitude, magnitude)


@triton.jit
def _shifted(units, shift, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr):
    return _nearest(units * _power(-shift), BOTTOM, TOP, MANTISSA) * _power(shift)


@triton.jit
def _encode(
    values, scale, zero, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr,
    LARGEST: tl.constexpr, MAX_SHIFT: tl.constexpr, SUBGROUP: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    """`quantizers._quantize_rows`: float32 (m, c) to the integers that are stored, float32; scale and zero (m, 1)."""
    units = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    units = tl.where((units.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITE, units, 0.0)
    if not SIGNED:
        units = units + zero
    if MAX_SHIFT == 0:
        levels = _nearest(units, BOTTOM, TOP, MANTISSA)
    else:
        ROWS: tl.constexpr = values.shape[0]
        COLUMNS: tl.constexpr = values.shape[1]
        whole = tl.reshape(_nearest(units, -LARGEST if SIGNED else 0, LARGEST, -1), (ROWS, COLUMNS // SUBGROUP, SUBGROUP))
        widest = tl.max(tl.abs(whole), 2, keep_dims=True)
        length = ((widest.to(tl.int32, bitcast=True) >> 23) & 255) - 126  # of the integer, in bits
        top = tl.full(widest.shape, TOP, tl.float32)
        flag = tl.minimum(tl.maximum(length - (((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126), 0), MAX_SHIFT)
        if TRUNCATE:
            magnitude = tl.minimum(tl.floor(tl.abs(whole) * _power(-flag)), TOP) * _power(flag)
            levels = tl.where(whole < 0, -magnitude, magnitude)
        else:
            more = tl.minimum(flag + 1, MAX_SHIFT)
            low, high = _shifted(whole, flag, BOTTOM, TOP, MANTISSA), _shifted(whole, more, BOTTOM, TOP, MANTISSA)
            worse = tl.sum((low - whole) * (low - whole), 2, keep_dims=True)
            levels = tl.where(tl.sum((high - whole) * (high - whole), 2, keep_dims=True) < worse, high, low)
        levels = tl.reshape(levels, (ROWS, COLUMNS))
    return levels if SIGNED else levels - 128


@triton.jit
def _scale(low, high, bits, SIGNED: tl.constexpr, LARGEST: tl.constexpr):
    """`quantizers.absmax_scale` or `minmax_scale`, from the range of a row and the bits of its largest magnitude."""
    whole = tl.full(low.shape, LARGEST, tl.float32)
    if SIGNED:
        scale, zero = tl.div_rn(bits.to(tl.float32, bitcast=True), whole), tl.full(low.shape, 128.0, tl.float32)
    else:
        scale = tl.div_rn(tl.maximum(high, 0.0) - tl.minimum(low, 0.0), whole)
    finite = (bits < INFINITE) & (scale.to(tl.int32, bitcast=True) < INFINITE)
    scale = tl.where(finite, tl.where(scale < TINY, 1.0, scale), float("nan"))
    if not SIGNED:
        zero = tl.where(finite, (tl.div_rn(-tl.minimum(low, 0.0), scale) + HALVES) - HALVES, 0.0)
    return scale, zero


@triton.jit
def _widen(values, low, high, bits):
    """A range and the bits of the largest magnitude, (m, 1) each, with values (m, c) taken in."""
    low = tl.minimum(low, tl.min(values, 1, keep_dims=True))
    high = tl.maximum(high, tl.max(values, 1, keep_dims=True))
    return low, high, tl.maximum(bits, tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True))


@triton.jit
def _range_kernel(x, ranges, values, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Low, high and bits of the largest magnitude of each of CHUNKS stretches of an image; ranges float32 (images, 3, CHUNKS)."""
    image, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = tl.full((1, 1), 0.0, tl.float32), tl.full((1, 1), 0.0, tl.float32)
    bits = tl.full((1, 1), 0, tl.int32)
    for start in range(chunk * BLOCK, values, CHUNKS * BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        low, high, bits = _widen(tl.load(x + image * values + at, mask=at < values, other=0.0).to(tl.float32), low, high, bits)
    place = ranges + image * 3 * CHUNKS + chunk + tl.zeros((1, 1), tl.int32)
    tl.store(place, low)
    tl.store(place + CHUNKS, high)
    tl.store(place + 2 * CHUNKS, bits.to(tl.float32, bitcast=True))


@triton.jit
def _quantize_kernel(
    x, ranges, fixed_scale, fixed_zero, stored, scales, zeros, rows, pixels, channels,
    RANGES: tl.constexpr, FIXED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr, LARGEST: tl.constexpr,
    MAX_SHIFT: tl.constexpr, SUBGROUP: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    """Scales, zeros and stored integers of BLOCK_M pixels (or tokens, which are images of one pixel)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    inside, image = row < rows, row // pixels
    line = x + row.to(tl.int64) * channels
    low, high = tl.full((BLOCK_M, 1), 0.0, tl.float32), tl.full((BLOCK_M, 1), 0.0, tl.float32)
    bits = tl.full((BLOCK_M, 1), 0, tl.int32)
    if RANGES:
        part = ranges + image * 3 * CHUNKS + tl.arange(0, CHUNKS)[None, :]
        low = tl.min(tl.load(part, mask=inside, other=0.0), 1, keep_dims=True)
        high = tl.max(tl.load(part + CHUNKS, mask=inside, other=0.0), 1, keep_dims=True)
        largest = tl.load(part + 2 * CHUNKS, mask=inside, other=0.0)
        bits = tl.max(largest.to(tl.int32, bitcast=True), 1, keep_dims=True)
    else:
        for start in range(0, channels, BLOCK_C):
            at = start + tl.arange(0, BLOCK_C)[None, :]
            values = tl.load(line + at, mask=inside & (at < channels), other=0.0).to(tl.float32)
            low, high, bits = _widen(values, low, high, bits)
    scale, zero = _scale(low, high, bits, SIGNED, LARGEST)
    if FIXED:
        scale = tl.where(bits < INFINITE, tl.load(fixed_scale), float("nan"))
        if not SIGNED:
            zero = tl.full((BLOCK_M, 1), 0.0, tl.float32) + tl.load(fixed_zero).to(tl.float32)
    tl.store(scales + image, scale, mask=inside)
    tl.store(zeros + image, zero.to(tl.int32), mask=inside)
    for start in range(0, channels, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)[None, :]
        mask = inside & (at < channels)
        values = tl.load(line + at, mask=mask, other=0.0).to(tl.float32)
        levels = _encode(values, scale, zero, BOTTOM, TOP, MANTISSA, SIGNED, LARGEST, MAX_SHIFT, SUBGROUP, TRUNCATE)
        tl.store(stored + row.to(tl.int64) * channels + at, levels.to(tl.int8), mask=mask)


@triton.jit
def _level(code, MANTISSA: tl.constexpr):
    """The integer (int32) that a 4-bit code of a signed table stands for."""
    if MANTISSA < 0:
        return (code ^ 8) - 8
    index = code & 7
    exponent, fraction = index >> MANTISSA, index & ((1 << MANTISSA) - 1)
    magnitude = tl.where(exponent == 0, fraction, (fraction | (1 << MANTISSA)) << tl.maximum(exponent - 1, 0))
    return tl.where(code > 7, -magnitude, magnitude)


@triton.jit
def _pairs(codes, shifts, n, byte, inside, code_pitch, shift_pitch, MANTISSA: tl.constexpr, SUBGROUP: tl.constexpr):
    """Both integers of bytes of codes, int8: K = 2 * byte and the next. n (n, 1) and byte (1, b)."""
    both = tl.load(codes + n.to(tl.int64) * code_pitch + byte, mask=inside, other=0).to(tl.int32)
    first, second = _level(both & 15, MANTISSA), _level(both >> 4, MANTISSA)
    if SUBGROUP > 0:
        group = 2 * byte // SUBGROUP
        shift = tl.load(shifts + n.to(tl.int64) * shift_pitch + group // 2, mask=inside, other=0).to(tl.int32)
        shift = (shift >> (4 * (group % 2))) & 15
        first, second = first << shift, second << shift
    return first.to(tl.int8), second.to(tl.int8)


@triton.jit
def _decode_kernel(
    codes, shifts, levels, sums, outputs, count, code_pitch, shift_pitch,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, SUBGROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Integers (N, K) int8 of codes, and their sums over K, int32 (N,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    total, line = tl.zeros((BLOCK_N, 1), tl.int32), levels + n.to(tl.int64) * count
    for start in range(0, code_pitch, BLOCK_B):
        byte = start + tl.arange(0, BLOCK_B)[None, :]
        inside = (n < outputs) & (byte < code_pitch)
        if BITS == 4:
            first, second = _pairs(codes, shifts, n, byte, inside, code_pitch, shift_pitch, MANTISSA, SUBGROUP)
            tl.store(line + 2 * byte, first, mask=inside)
            tl.store(line + 2 * byte + 1, second, mask=inside & (2 * byte + 1 < count))
            total += tl.sum(first.to(tl.int32) + second.to(tl.int32), 1, keep_dims=True)
        else:
            whole = tl.load(codes + n.to(tl.int64) * code_pitch + byte, mask=inside, other=0).to(tl.int8, bitcast=True)
            total += tl.sum(whole.to(tl.int32), 1, keep_dims=True)
    tl.store(sums + n, total, mask=n < outputs)


@triton.jit
def _finish(total, m, n, image, inside, scales, weight_scale, bias, y, outputs, BIAS: tl.constexpr):
    """Scale int32 sums (m, n), add the bias, store."""
    scale = tl.load(scales + image, mask=inside, other=0.0) * tl.load(weight_scale + n, mask=n < outputs, other=0.0)
    result = total.to(tl.float32) * scale
    if BIAS:
        result = result + tl.load(bias + n, mask=n < outputs, other=0.0)
    tl.store(y + m.to(tl.int64) * outputs + n, result.to(y.dtype.element_ty), mask=inside & (n < outputs))


@triton.jit
def _few_rows_kernel(
    stored, zeros, codes, shifts, partial, rows, outputs, count, code_pitch, shift_pitch,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, SUBGROUP: tl.constexpr, SIGNED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Adds to int32 sums (M, N) the part of K that falls to this program; codes are decoded in registers."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    weight_sum = tl.zeros((BLOCK_N, 1), tl.int32)
    line = stored + m.to(tl.int64) * count
    for start in range(tl.program_id(2) * BLOCK_B, code_pitch, SPLIT * BLOCK_B):
        byte = start + tl.arange(0, BLOCK_B)[None, :]
        inside = (n < outputs) & (byte < code_pitch)
        if BITS == 4:
            first, second = _pairs(codes, shifts, n, byte, inside, code_pitch, shift_pitch, MANTISSA, SUBGROUP)
            even = tl.load(line + 2 * byte, mask=(m < rows) & (2 * byte < count), other=0)
            odd = tl.load(line + 2 * byte + 1, mask=(m < rows) & (2 * byte + 1 < count), other=0)
            total = tl.dot(even, tl.trans(first), total, out_dtype=tl.int32)
            total = tl.dot(odd, tl.trans(second), total, out_dtype=tl.int32)
            if not SIGNED:
                weight_sum += tl.sum(first.to(tl.int32) + second.to(tl.int32), 1, keep_dims=True)
        else:
            whole = tl.load(codes + n.to(tl.int64) * code_pitch + byte, mask=inside, other=0).to(tl.int8, bitcast=True)
            total = tl.dot(
                tl.load(line + byte, mask=(m < rows) & (byte < count), other=0), tl.trans(whole), total, out_dtype=tl.int32
            )
            if not SIGNED:
                weight_sum += tl.sum(whole.to(tl.int32), 1, keep_dims=True)
    if not SIGNED:
        total += (128 - tl.load(zeros + m, mask=m < rows, other=0)) * tl.trans(weight_sum)
    column = tl.trans(n)
    tl.atomic_add(partial + m * outputs + column, total, mask=(m < rows) & (column < outputs))


@triton.jit
def _finish_kernel(partial, scales, weight_scale, bias, y, rows, outputs, BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    m = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.load(partial + m * outputs + n, mask=n < outputs, other=0)
    _finish(total, m, n, m, m < rows, scales, weight_scale, bias, y, outputs, BIAS)


@triton.jit
def _tile(rows, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Which rows and columns a program has: TOGETHER bands of rows share columns that are near in time, for the L2 cache."""
    program, down, across = tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    first = program // (TOGETHER * across) * TOGETHER
    band = tl.minimum(down - first, TOGETHER)
    inner = program % (TOGETHER * across)
    m = (first + inner % band) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return m, inner // band * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def _linear_kernel(
    stored, scales, zeros, levels, sums, weight_scale, bias, y, rows, outputs, count,
    SIGNED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    m, n = _tile(rows, outputs, BLOCK_M, BLOCK_N, TOGETHER)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    line, column = stored + m.to(tl.int64) * count, levels + n.to(tl.int64) * count
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(line + k[None, :], mask=(m < rows) & (k[None, :] < count), other=0)
        b = tl.load(column + k[:, None], mask=(n < outputs) & (k[:, None] < count), other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    if not SIGNED:
        missing = 128 - tl.load(zeros + m, mask=m < rows, other=0)
        total += missing * tl.load(sums + n, mask=n < outputs, other=0)
    _finish(total, m, n, m, m < rows, scales, weight_scale, bias, y, outputs, BIAS)


@triton.jit
def _conv_kernel(
    stored, scales, zeros, levels, sums, weight_scale, bias, y,
    rows, outputs, channels, height, width, out_height, out_width, top, left,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A convolution as a product whose rows are output pixels; taps outside the image read the level of zero."""
    m, n = _tile(rows, outputs, BLOCK_M, BLOCK_N, TOGETHER)
    image, pixel = m // (out_height * out_width), m % (out_height * out_width)
    zero = tl.load(zeros + image, mask=m < rows, other=128)
    border = tl.zeros((BLOCK_M, 1), tl.int8) if SIGNED else (zero - 128).to(tl.int8)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(KERNEL_H * KERNEL_W):
        row = pixel // out_width * STRIDE_H + tap // KERNEL_W * DILATION_H - top
        column = pixel % out_width * STRIDE_W + tap % KERNEL_W * DILATION_W - left
        seen = (m < rows) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        line = stored + ((image.to(tl.int64) * height + row) * width + column) * channels
        weights = levels + (n.to(tl.int64) * (KERNEL_H * KERNEL_W) + tap) * channels
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(line + k[None, :], mask=seen & (k[None, :] < channels), other=0)
            if not SIGNED:
                a = tl.where(seen, a, border)
            b = tl.load(weights + k[:, None], mask=(n < outputs) & (k[:, None] < channels), other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    if not SIGNED:
        total += (128 - zero) * tl.load(sums + n, mask=n < outputs, other=0)
    _finish(total, m, n, image, m < rows, scales, weight_scale, bias, y, outputs, BIAS)


def _input_constants(grid: InputGrid) -> dict[str, Any]:
    return {
        "BOTTOM": grid.bottom,
        "TOP": grid.top,
        "MANTISSA": grid.mantissa,
        "SIGNED": grid.signed,
        "LARGEST": grid.largest,
        "MAX_SHIFT": grid.max_shift,
        "SUBGROUP": grid.subgroup,
        "TRUNCATE": grid.truncate,
    }


def quantize(
    x: Tensor, grid: InputGrid, fixed_scale: Tensor | None = None, fixed_zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of an input, as the matrix units take them.

    Args:
        x: contiguous (r, p, c): r tokens (p = 1) or images with a scale each. fixed_scale: float32 (1,); fixed_zero: uint8 (1,).
    Returns:
        int8 (r, p, c), float32 scales (r,), int32 zeros (r,).
    """
    images, pixels, channels = x.shape
    stored = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales, zeros = x.new_empty(images, dtype=torch.float32), x.new_empty(images, dtype=torch.int32)
    ranges = scales
    if pixels > 1:
        ranges = x.new_empty((images, 3, CHUNKS), dtype=torch.float32)
        _range_kernel[(images, CHUNKS)](x, ranges, pixels * channels, CHUNKS=CHUNKS, BLOCK=1024)
    block_c = max(16, min(1024, triton.next_power_of_2(channels)))
    block_m = max(1, min(16, 2048 // block_c)) if pixels > 1 else 1
    rows = images * pixels
    _quantize_kernel[(triton.cdiv(rows, block_m),)](
        x, ranges, scales if fixed_scale is None else fixed_scale, scales if fixed_zero is None else fixed_zero,
        stored, scales, zeros, rows, pixels, channels,
        RANGES=pixels > 1, FIXED=fixed_scale is not None, CHUNKS=CHUNKS, BLOCK_M=block_m, BLOCK_C=block_c, **_input_constants(grid),
    )  # fmt: skip
    return stored, scales, zeros


def decode(codes: Tensor, shifts: Tensor | None, grid: WeightGrid, count: int) -> tuple[Tensor, Tensor]:
    """Integers of codes: int8 (N, K) and their sums, int32 (N,).

    Args:
        codes: uint8 (N, ceil(K / 2)) or (N, K). shifts: nibbles (N, ...), where the grid has them. count: K.
    """
    outputs, pitch = codes.shape
    levels = codes.view(torch.int8) if grid.bits == 8 else torch.empty((outputs, count), dtype=torch.int8, device=codes.device)
    sums = torch.empty(outputs, dtype=torch.int32, device=codes.device)
    _decode_kernel[(triton.cdiv(outputs, 16),)](
        codes, codes if shifts is None else shifts, levels, sums, outputs, count, pitch, 0 if shifts is None else shifts.shape[1],
        BITS=grid.bits, MANTISSA=grid.mantissa, SUBGROUP=grid.subgroup, BLOCK_N=16, BLOCK_B=256,
    )  # fmt: skip
    return levels, sums


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks a program works on, and how many warps and stages it gets."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages}


def tiles_for(rows: int, outputs: int) -> Tiles:
    """Tiles by the size of the output, from four: few kernels are compiled, however the number of rows varies."""
    if rows * outputs >= 1 << 22:
        return Tiles(128, 256, 128, 8, 3)
    if rows * outputs >= 1 << 20:
        return Tiles(128, 128, 128, 8, 3)
    if rows > 64:
        return Tiles(64, 128, 128, 4, 4)
    return Tiles(64, 64, 128, 4, 4)


def linear(
    x: Tensor, codes: Tensor, shifts: Tensor | None, weight_scale: Tensor, bias: Tensor | None,
    grids: tuple[InputGrid, WeightGrid], fixed_scale: Tensor | None = None, fixed_zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A packed linear layer on rows x (m, k), contiguous; (m, n) in the dtype of x."""
    (rows, count), outputs = x.shape, len(codes)
    input_grid, weight_grid = grids
    stored, scales, zeros = quantize(x[:, None], input_grid, fixed_scale, fixed_zero)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    ends = scales, weight_scale, weight_scale if bias is None else bias, y
    if rows <= FEW_ROWS:
        partial = torch.zeros((rows, outputs), dtype=torch.int32, device=x.device)
        block_m, block_n, block_b = 16 if rows <= 16 else 64, 64, 128
        split = min(16, triton.cdiv(codes.shape[1], 2 * block_b))
        _few_rows_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n), split)](
            stored, zeros, codes, codes if shifts is None else shifts, partial, rows, outputs, count,
            codes.shape[1], 0 if shifts is None else shifts.shape[1],
            BITS=weight_grid.bits, MANTISSA=weight_grid.mantissa, SUBGROUP=weight_grid.subgroup, SIGNED=input_grid.signed,
            SPLIT=split, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_B=block_b,
        )  # fmt: skip
        _finish_kernel[(rows, triton.cdiv(outputs, 512))](partial, *ends, rows, outputs, BIAS=bias is not None, BLOCK_N=512)
        return y
    levels, sums = decode(codes, shifts, weight_grid, count)
    tiles = tiles_for(rows, outputs)
    _linear_kernel[(triton.cdiv(rows, tiles.m) * triton.cdiv(outputs, tiles.n),)](
        stored, scales, zeros, levels, sums, *ends[1:], rows, outputs, count,
        SIGNED=input_grid.signed, BIAS=bias is not None, TOGETHER=8, **tiles.constants(),
    )  # fmt: skip
    return y


def conv2d(
    x: Tensor, sizes: tuple[int, ...], codes: Tensor, shifts: Tensor | None, weight_scale: Tensor, bias: Tensor | None,
    grids: tuple[InputGrid, WeightGrid], fixed_scale: Tensor | None = None, fixed_zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A packed convolution, without groups, on images x (b, h, w, c), contiguous; (b, h', w', n) in the dtype of x.

    Args:
        sizes: kernel, stride, dilation (h, w each), then what is padded on top and left, and the output's height and width.
    """
    (images, height, width, channels), outputs = x.shape, len(codes)
    kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left, out_height, out_width = sizes
    input_grid, weight_grid = grids
    stored, scales, zeros = quantize(x.view(images, -1, channels), input_grid, fixed_scale, fixed_zero)
    levels, sums = decode(codes, shifts, weight_grid, kernel_h * kernel_w * channels)
    y = torch.empty((images, out_height, out_width, outputs), dtype=x.dtype, device=x.device)
    rows = images * out_height * out_width
    tiles = tiles_for(rows, outputs)
    _conv_kernel[(triton.cdiv(rows, tiles.m) * triton.cdiv(outputs, tiles.n),)](
        stored, scales, zeros, levels, sums, weight_scale, weight_scale if bias is None else bias, y,
        rows, outputs, channels, height, width, out_height, out_width, top, left,
        KERNEL_H=kernel_h, KERNEL_W=kernel_w, STRIDE_H=stride_h, STRIDE_W=stride_w, DILATION_H=dilation_h, DILATION_W=dilation_w,
        SIGNED=input_grid.signed, BIAS=bias is not None, TOGETHER=8, **tiles.constants(),
    )  # fmt: skip
    return y
