"""The GPU engine's kernels (Triton): inputs to integers, 4-bit codes to integers, their exact product, scales and bias.

    range_kernel       what the values of an image lie between, in CHUNKS parts
    quantize_kernel    floats to int8 integers, with one scale and zero point a row (a token or an image)
    decode_kernel      codes and multipliers to int8 (N, K), and the sum of every row
    product_kernel     y = scale_x[m] * scale_w[n] * sum_k X[m, k] * W[n, k] + bias[n], int8 x int8; linear layers, convolutions
    few_rows_kernel    the same for few rows, with codes decoded in registers and K split among programs

Matrix units multiply signed bytes, and levels of unsigned grids reach 255. Those are stored as level - 128; what is missing,
(128 - zero) * sum_k W[n, k], is added to the sum. Signed levels are stored as they are, with zero 128 to leave nothing to add.
Where codes count (int4, lzs4) and K is a multiple of 8, four are decoded at once, as bytes of a word: EVEN_FIRST. Both operands
then have the even places of each eight along K before the odd ones; a sum does not mind. Images are stored with their padding
around them (the level of zero), so that the product needs no masks.

Sums are exact int32, so neither tiles nor the order of additions change a bit. `launches.py` calls these kernels. Without a GPU
they run in Triton's interpreter (TRITON_INTERPRET=1, set before this module is imported).
"""

import triton
import triton.language as tl

TOPS: tl.constexpr = tl.constexpr(0x80808080 - (1 << 32))  # the top bit of each byte
COUNTING: tl.constexpr = tl.constexpr(0x0706050403020100)  # the table of the magnitudes 0 to 7
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest scale whose reciprocal is finite
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # bits of float32 infinity; NaN is above
HALVES: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves float32 no room for fractions
TWELVE_PLACES: tl.constexpr = tl.constexpr(3072.0)  # 1.5 * 2**11: adding it leaves room for 12 binary places


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
def _multiplied(whole, multiple, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr):
    """Whole numbers to levels times a multiple of at most 16.

    A quotient by way of a reciprocal is a few units of its last place off, which a tie must not be. Ties lie at halves, all other
    quotients 1/32 and more from them: to 12 binary places ties are exact, and nothing crosses one.
    """
    quotient = whole * tl.div_rn(tl.full(multiple.shape, 1.0, tl.float32), multiple)
    return _nearest((quotient + TWELVE_PLACES) - TWELVE_PLACES, BOTTOM, TOP, MANTISSA) * multiple


@triton.jit
def _better(whole, levels, others):
    """Of two roundings of subgroups (m, g, s), the first unless the other's squared error is less."""
    worse = tl.sum((levels - whole) * (levels - whole), 2, keep_dims=True)
    return tl.where(tl.sum((others - whole) * (others - whole), 2, keep_dims=True) < worse, others, levels)


@triton.jit
def _round_subgroups(
    whole, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr,
    MAX_SHIFT: tl.constexpr, TRUNCATE: tl.constexpr, MAX_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """`quantizers.round_with_shifts` or `round_with_multiples` of whole numbers (m, g, s)."""
    widest = tl.max(tl.abs(whole), 2, keep_dims=True)
    top = tl.full(widest.shape, TOP, tl.float32)
    if MAX_MULTIPLE > 0:
        reaching = tl.minimum(tl.maximum(tl.ceil(tl.div_rn(widest, top)), 1.0), MAX_MULTIPLE)
        levels = _multiplied(whole, reaching, BOTTOM, TOP, MANTISSA)
        return _better(whole, levels, _multiplied(whole, tl.maximum(reaching - 1.0, 1.0), BOTTOM, TOP, MANTISSA))
    length = ((widest.to(tl.int32, bitcast=True) >> 23) & 255) - 126  # of the integer, in bits
    flag = tl.minimum(tl.maximum(length - (((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126), 0), MAX_SHIFT)
    if TRUNCATE:
        magnitude = tl.minimum(tl.floor(tl.abs(whole) * _power(-flag)), TOP) * _power(flag)
        return tl.where(whole < 0, -magnitude, magnitude)
    more = tl.minimum(flag + 1, MAX_SHIFT)
    low, high = _shifted(whole, flag, BOTTOM, TOP, MANTISSA), _shifted(whole, more, BOTTOM, TOP, MANTISSA)
    return _better(whole, low, high)


@triton.jit
def _encode(
    values, counted, scale, zero, BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr,
    LARGEST: tl.constexpr, MAX_SHIFT: tl.constexpr, SUBGROUP: tl.constexpr, TRUNCATE: tl.constexpr, MAX_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """`quantizers._quantize_rows`: float32 (m, c) to the integers that are stored, float32; scale and zero (m, 1) or (1, 1).

    counted (1, c): not past the end of the row, where a subgroup's error must not see the zero point.
    """
    units = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    units = tl.where((units.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITE, units, 0.0)
    if not SIGNED:
        units = tl.where(counted, units + zero, 0.0)
    if MAX_SHIFT + MAX_MULTIPLE == 0:
        levels = _nearest(units, BOTTOM, TOP, MANTISSA)
    else:
        ROWS: tl.constexpr = values.shape[0]
        COLUMNS: tl.constexpr = values.shape[1]
        whole = tl.reshape(_nearest(units, -LARGEST if SIGNED else 0, LARGEST, -1), (ROWS, COLUMNS // SUBGROUP, SUBGROUP))
        levels = _round_subgroups(whole, BOTTOM, TOP, MANTISSA, MAX_SHIFT, TRUNCATE, MAX_MULTIPLE)
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


@triton.jit(do_not_specialize=["pixels"])
def range_kernel(x, ranges, pixels, channels, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Low, high and bits of the largest magnitude of each of CHUNKS stretches of an image; ranges float32 (images, 3, CHUNKS)."""
    image, chunk, values = tl.program_id(0).to(tl.int64), tl.program_id(1), pixels * channels
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
def _range_of_image(ranges, image, CHUNKS: tl.constexpr):
    part = ranges + image * 3 * CHUNKS + tl.arange(0, CHUNKS)[None, :]
    low, high = tl.min(tl.load(part), 1, keep_dims=True), tl.max(tl.load(part + CHUNKS), 1, keep_dims=True)
    return low, high, tl.max(tl.load(part + 2 * CHUNKS).to(tl.int32, bitcast=True), 1, keep_dims=True)


@triton.jit
def _reorder(levels, EVEN_FIRST: tl.constexpr):
    if EVEN_FIRST:
        ROWS: tl.constexpr = levels.shape[0]
        COLUMNS: tl.constexpr = levels.shape[1]
        return tl.reshape(tl.permute(tl.reshape(levels, (ROWS, COLUMNS // 8, 4, 2)), (0, 1, 3, 2)), (ROWS, COLUMNS))
    return levels


@triton.jit(do_not_specialize=["blocks", "cleared", "height", "width", "stored_height", "stored_width"])
def quantize_kernel(
    x, ranges, fixed_scale, fixed_zero, stored, scales, zeros, clear, blocks, cleared, channels,
    height, width, stored_height, stored_width, TOP_PAD: tl.constexpr, LEFT_PAD: tl.constexpr,
    IMAGES: tl.constexpr, FIXED: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, EVEN_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BOTTOM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr, LARGEST: tl.constexpr,
    MAX_SHIFT: tl.constexpr, SUBGROUP: tl.constexpr, TRUNCATE: tl.constexpr, MAX_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Scale, zero point and stored integers of a token, or of BLOCK_M pixels of an image and of the padding around it.

    Also clears `cleared` integers, which the kernel after this one adds to. WHOLE: a token is read once, as it fits a block.
    """
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    for start in range(tl.program_id(0) * BLOCK_C, cleared, tl.num_programs(0) * BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        tl.store(clear + at, tl.zeros((BLOCK_C,), tl.int32), mask=at < cleared)
    pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row, column = pixel // stored_width - TOP_PAD, pixel % stored_width - LEFT_PAD
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = x + ((image.to(tl.int64) * height + row) * width + column) * channels
    target = stored + (image.to(tl.int64) * stored_height * stored_width + pixel) * channels
    at = tl.arange(0, BLOCK_C)[None, :]
    low, high, bits = tl.full((1, 1), 0.0, tl.float32), tl.full((1, 1), 0.0, tl.float32), tl.full((1, 1), 0, tl.int32)
    if IMAGES:
        low, high, bits = _range_of_image(ranges, image, CHUNKS)
    elif WHOLE:
        values = tl.load(source + at, mask=inside & (at < channels), other=0.0).to(tl.float32)
        low, high, bits = _widen(values, low, high, bits)
    else:
        for start in range(0, channels, BLOCK_C):
            values = tl.load(source + start + at, mask=inside & (start + at < channels), other=0.0).to(tl.float32)
            low, high, bits = _widen(values, low, high, bits)
    scale, zero = _scale(low, high, bits, SIGNED, LARGEST)
    if FIXED:
        scale = tl.where(bits < INFINITE, tl.load(fixed_scale), float("nan"))
        if not SIGNED:
            zero = tl.full((1, 1), 0.0, tl.float32) + tl.load(fixed_zero).to(tl.float32)
    one = tl.zeros((1, 1), tl.int32)
    tl.store(scales + image + one, scale, mask=block + one == 0)
    tl.store(zeros + image + one, zero.to(tl.int32), mask=block + one == 0)
    there = pixel < stored_height * stored_width
    border = tl.zeros((1, 1), tl.float32) if SIGNED else zero - 128  # on the grid or not
    if WHOLE:
        if IMAGES:
            values = tl.load(source + at, mask=inside & (at < channels), other=0.0).to(tl.float32)
        levels = _encode(
            values, at < channels, scale, zero, BOTTOM, TOP, MANTISSA, SIGNED, LARGEST, MAX_SHIFT, SUBGROUP, TRUNCATE, MAX_MULTIPLE
        )
        levels = _reorder(tl.where(inside, levels, border).to(tl.int8), EVEN_FIRST)
        tl.store(target + at, levels, mask=there & (at < channels))
    else:
        for start in range(0, channels, BLOCK_C):
            values = tl.load(source + start + at, mask=inside & (start + at < channels), other=0.0).to(tl.float32)
            counted = start + at < channels
            levels = _encode(
                values, counted, scale, zero, BOTTOM, TOP, MANTISSA, SIGNED, LARGEST, MAX_SHIFT, SUBGROUP, TRUNCATE, MAX_MULTIPLE
            )
            levels = _reorder(tl.where(inside, levels, border).to(tl.int8), EVEN_FIRST)
            tl.store(target + start + at, levels, mask=there & (start + at < channels))


@triton.jit
def _level(code, TABLE: tl.constexpr):
    """The integer (int32) that a 4-bit code stands for; TABLE has a byte for each magnitude, 0 means two's complement."""
    if TABLE == 0:
        return (code << 28) >> 28
    magnitude = code & 7
    if TABLE != COUNTING:
        magnitude = (tl.full(code.shape, TABLE, tl.int64) >> (magnitude * 8)).to(tl.int32) & 255
    return tl.where((code & 8) != 0, -magnitude, magnitude)


@triton.jit
def _four(nibbles, own, TABLE: tl.constexpr, SUBGROUP: tl.constexpr, MULTIPLES: tl.constexpr):
    """The integers, in the bytes of a word, of the codes in the bytes of a word. With 128 added no byte borrows from the next."""
    if TABLE == 0:
        found = (((nibbles ^ 0x08080808) | TOPS) - 0x08080808) ^ TOPS
    else:
        magnitude = nibbles & 0x07070707
        negative = magnitude & (((nibbles >> 3) & 0x01010101) * 7)
        found = (magnitude - 2 * negative + TOPS) ^ TOPS
    if MULTIPLES:  # products of even bytes and of odd ones apart, in 16 bits: their low bytes are those of the whole
        even, odd = (found & 0x00FF00FF) * (own + 1), ((found >> 8) & 0x00FF00FF) * (own + 1)
        found = (even & 0x00FF00FF) | ((odd & 0x00FF00FF) << 8)
    elif SUBGROUP > 0:
        found = (found << own) & (((255 << own) & 255) * 0x01010101)
    return found


@triton.jit
def _bytes(word):
    """(..., 2, 2) int8: the bytes of words."""
    first, last = tl.join(word.to(tl.int8), (word >> 16).to(tl.int8)), tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.join(first, last)


@triton.jit
def _multipliers(
    multipliers, n, start, outputs, pitch, SUBGROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, EACH: tl.constexpr
):
    """The nibbles of BLOCK_K weights from K = start, one for every EACH of them: int32 (BLOCK_N, BLOCK_K // EACH)."""
    GROUPS: tl.constexpr = BLOCK_K // SUBGROUP if SUBGROUP < BLOCK_K else 1
    group = start // SUBGROUP + tl.arange(0, GROUPS)[None, :]
    place = multipliers + n.to(tl.int64) * pitch + group // 2
    found = (tl.load(place, mask=(n < outputs) & (group // 2 < pitch), other=0).to(tl.int32) >> (4 * (group % 2))) & 15
    return tl.reshape(tl.broadcast_to(found[:, :, None], (BLOCK_N, GROUPS, BLOCK_K // EACH // GROUPS)), (BLOCK_N, BLOCK_K // EACH))


@triton.jit
def _weights(
    codes, multipliers, n, start, outputs, code_pitch, multiplier_pitch,
    BITS: tl.constexpr, TABLE: tl.constexpr, SUBGROUP: tl.constexpr, MULTIPLES: tl.constexpr, EVEN_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integers int8 (BLOCK_N, BLOCK_K) of the codes of rows n (BLOCK_N, 1), from K = start, a multiple of BLOCK_K.

    Codes are bytes, or words where EVEN_FIRST; code_pitch counts the same.
    """
    EACH: tl.constexpr = 1 if BITS == 8 else 8 if EVEN_FIRST else 2
    at = start // EACH + tl.arange(0, BLOCK_K // EACH)[None, :]
    found = tl.load(codes + n.to(tl.int64) * code_pitch + at, mask=(n < outputs) & (at < code_pitch), other=0)
    if BITS == 8:
        levels = found.to(tl.int8, bitcast=True)
    elif EVEN_FIRST:
        own = found
        if SUBGROUP > 0:
            own = _multipliers(multipliers, n, start, outputs, multiplier_pitch, SUBGROUP, BLOCK_K, BLOCK_N, 8)
        even = _bytes(_four(found & 0x0F0F0F0F, own, TABLE, SUBGROUP, MULTIPLES))
        odd = _bytes(_four((found >> 4) & 0x0F0F0F0F, own, TABLE, SUBGROUP, MULTIPLES))
        levels = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 4, 2, 3)), (BLOCK_N, BLOCK_K))
    else:
        both = found.to(tl.int32)
        levels = tl.reshape(tl.join(_level(both & 15, TABLE), _level(both >> 4, TABLE)), (BLOCK_N, BLOCK_K))
        if SUBGROUP > 0:
            own = _multipliers(multipliers, n, start, outputs, multiplier_pitch, SUBGROUP, BLOCK_K, BLOCK_N, 1)
            levels = levels * (own + 1) if MULTIPLES else levels << own
        levels = levels.to(tl.int8)
    return levels


@triton.jit(do_not_specialize=["multiplier_pitch"])
def decode_kernel(
    codes, multipliers, levels, sums, outputs, count, code_pitch, multiplier_pitch,
    BITS: tl.constexpr, TABLE: tl.constexpr, SUBGROUP: tl.constexpr, MULTIPLES: tl.constexpr, EVEN_FIRST: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integers (N, K) int8 of 4-bit codes, and with SUMS their sums over K, int32 (N,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    total = tl.zeros((BLOCK_N, 1), tl.int32)
    for start in range(0, count, BLOCK_K):
        found = _weights(
            codes, multipliers, n, start, outputs, code_pitch, multiplier_pitch, BITS, TABLE, SUBGROUP, MULTIPLES, EVEN_FIRST,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if BITS == 4:
            k = start + tl.arange(0, BLOCK_K)[None, :]
            tl.store(levels + n.to(tl.int64) * count + k, found, mask=(n < outputs) & (k < count))
        if SUMS:
            total += tl.sum(found.to(tl.int32), 1, keep_dims=True)
    if SUMS:
        tl.store(sums + n, total, mask=n < outputs)


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """x * Phi(x), or its approximation by tanh (Hendrycks and Gimpel 2016), float32."""
    if TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(a)) = 1 / (1 + exp(-2 a))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _finish(total, m, n, image, rows, scales, weight_scale, bias, y, outputs, BIAS: tl.constexpr, GELU: tl.constexpr):
    """Scale int32 sums (m, n), add the bias, take the GELU (1; 2: by tanh) of what would have been stored, store."""
    scale = tl.load(scales + image, mask=m < rows, other=0.0) * tl.load(weight_scale + n, mask=n < outputs, other=0.0)
    result = total.to(tl.float32) * scale
    if BIAS:
        result = result + tl.load(bias + n, mask=n < outputs, other=0.0)
    result = result.to(y.dtype.element_ty)
    if GELU > 0:
        result = _gelu(result.to(tl.float32), GELU == 2).to(y.dtype.element_ty)
    tl.store(y + m.to(tl.int64) * outputs + n, result, mask=(m < rows) & (n < outputs))


@triton.jit(do_not_specialize=["rows", "multiplier_pitch"])
def few_rows_kernel(
    stored, scales, zeros, codes, multipliers, weight_scale, bias, y, partial, counters, rows, outputs, count,
    code_pitch, multiplier_pitch,
    BITS: tl.constexpr, TABLE: tl.constexpr, SUBGROUP: tl.constexpr, MULTIPLES: tl.constexpr, EVEN_FIRST: tl.constexpr,
    SIGNED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A product whose codes are decoded in registers. Programs that share a tile each add a part of K; the last one finishes it."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    weight_sum = tl.zeros((BLOCK_N, 1), tl.int32)
    for start in range(tl.program_id(2) * BLOCK_K, count, tl.num_programs(2) * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(stored + m.to(tl.int64) * count + k, mask=(m < rows) & (k < count), other=0)
        b = _weights(
            codes, multipliers, n, start, outputs, code_pitch, multiplier_pitch, BITS, TABLE, SUBGROUP, MULTIPLES, EVEN_FIRST,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
        if not SIGNED:
            weight_sum += tl.sum(b.to(tl.int32), 1, keep_dims=True)
    if not SIGNED:
        total += (128 - tl.load(zeros + m, mask=m < rows, other=0)) * tl.trans(weight_sum)
    n = tl.trans(n)
    if SPLIT:
        place, inside = partial + m * outputs + n, (m < rows) & (n < outputs)
        tl.atomic_add(place, total, mask=inside, sem="relaxed")
        tl.debug_barrier()  # all of this program's additions, then the count: whoever counts last sees everybody's
        before = tl.atomic_add(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1, sem="acq_rel")
        if before == tl.num_programs(2) - 1:
            total = tl.load(place, mask=inside, other=0, cache_modifier=".cg")
            _finish(total, m, n, m, rows, scales, weight_scale, bias, y, outputs, BIAS, GELU)
    else:
        _finish(total, m, n, m, rows, scales, weight_scale, bias, y, outputs, BIAS, GELU)


@triton.jit
def _tile(rows, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Which rows and columns a program has: TOGETHER bands of rows share columns that are near in time, for the L2 cache."""
    program, down, across = tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    first = program // (TOGETHER * across) * TOGETHER
    band = tl.minimum(down - first, TOGETHER)
    inner = program % (TOGETHER * across)
    m = (first + inner % band) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return m, inner // band * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit(do_not_specialize=["rows", "height", "width", "out_height", "out_width"])
def product_kernel(
    stored, scales, zeros, levels, sums, weight_scale, bias, y, rows, outputs, channels, height, width, out_height, out_width,
    IMAGES: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SIGNED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Rows are tokens, or output pixels of padded images of (height, width); K runs over taps, then channels.

    Rows and columns beyond the last repeat it, so that nothing is masked but the store. EVEN: BLOCK_K divides the channels.
    """
    m, n = _tile(rows, outputs, BLOCK_M, BLOCK_N, TOGETHER)
    near, column = tl.minimum(m, rows - 1), tl.minimum(n, outputs - 1)
    image, first = near, near.to(tl.int64)
    if IMAGES:
        image, pixel = near // (out_height * out_width), near % (out_height * out_width)
        first = (image.to(tl.int64) * height + pixel // out_width * STRIDE_H) * width + pixel % out_width * STRIDE_W
    k = tl.arange(0, BLOCK_K)
    line = stored + first * channels + k[None, :]
    weights = levels + column.to(tl.int64) * (TAPS * channels) + k[:, None]
    steps = tl.cdiv(channels, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(TAPS * steps):
        tap, start = step // steps, step % steps * BLOCK_K
        if TAPS == 1:
            tap, start = 0, step * BLOCK_K
        away = (tap // KERNEL_W * DILATION_H * width + tap % KERNEL_W * DILATION_W) * channels + start
        if EVEN:
            a, b = tl.load(line + away), tl.load(weights + tap * channels + start)
        else:
            a = tl.load(line + away, mask=start + k[None, :] < channels, other=0)
            b = tl.load(weights + tap * channels + start, mask=start + k[:, None] < channels, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    if not SIGNED:
        total += (128 - tl.load(zeros + image)) * tl.load(sums + column)
    _finish(total, m, n, image, rows, scales, weight_scale, bias, y, outputs, BIAS, GELU)
