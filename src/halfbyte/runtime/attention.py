"""Attention in integers: both of its products, and the softmax between them, in 8 bits.

    O = softmax(scale * Q K^T) V

Q K^T sums over the channels of a head, so queries and keys have a scale for each token; P V sums over tokens, so values have one
for each channel. Both sums are exact. Softmax does not change where all keys change alike: what keys have in common (the middle of
each channel's range) is taken off first, as it would take most of their codes (SageAttention, arXiv 2410.02367, takes off the mean;
the middle of a range does not depend on the order of a sum).

Keys pass in blocks of 64. With scores s in units of log2, a block has the exponent e = ceil(max s), and its weights are the codes
round(255 * 2**(s - e)), in whole numbers: s - e in steps of 1 / 2048, cut, and a cubic in 16 bits (csrc/kernels.h). Sums over
blocks are kept in units of 2**max(e), and changes of that unit lose nothing. So no maximum of all keys is needed, and weights that
are small beside the largest of all keep their digits where their own block has no larger one (one scale for 4096 keys loses up to
20 dB). The sum of the codes is what the sum of the weighted values is divided by.

All else between the exact sums is float32 in a fixed order, without fused operations, so that the C++ engine (csrc/attention.cpp)
gives the same bits on every instruction set. Here is the same in torch.
"""

import math

import torch
from torch import Tensor

from halfbyte.quantizers import absmax_scale
from halfbyte.runtime import engine
from halfbyte.runtime.backends import has_engine
from halfbyte.runtime.ops import FLOAT32_EXACT

BLOCK = 64  # keys that share an exponent
TOP = 127  # of queries, keys and values
STEPS = 2048  # of a score, to a factor of 2
LEAST = -10 * STEPS  # below it all codes are 0
FARTHEST = 2.0**60  # bound of scores, in steps, which keeps differences finite
LOWEST = -126.0  # exponent of the least power of two that is no subnormal
CUBIC = (2549, 7384, 22704, 32640)  # of 128 * 255 * 2**x, 0 <= x < 1


def factor_of(scale: float | None, channels: int) -> float:
    """Steps of log2 that 1 is as a score: of the scale, or 1 / sqrt(channels) where it is None; rounded to float32."""
    chosen = 1 / math.sqrt(channels) if scale is None else scale
    return float(torch.tensor(chosen * math.log2(math.e) * STEPS, dtype=torch.float32))


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Integer attention, by the engine where it can: on the CPU.

    Args:
        query: float (..., L, d). key: float (..., S, d). value: float (..., S, e).
        scale: of the scores; 1 / sqrt(d) by default.
        bias: float, broadcast to (..., L, S), added to the scaled scores; keys with -inf or a NaN are not seen.
    Returns:
        As the query's dtype, (..., L, e). Rows of a query with a NaN or an infinity are NaN, and all rows of a head with one among
        its keys or values.
    """
    if not key.shape[-2] or not query.numel() or not value.numel():
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    factor = factor_of(scale, query.shape[-1])
    if bias is not None:
        bias = bias.float().expand(*bias.shape[:-1], key.shape[-2]) * (math.log2(math.e) * STEPS)
    if _engine_takes(query, key, value):
        return engine.attention(query, key, value, factor, bias)  # type: ignore[no-any-return]
    return reference(query, key, value, factor, bias)


def _engine_takes(*heads: Tensor) -> bool:
    alike = all(one.device.type == "cpu" and one.dtype in engine.DTYPES and one.ndim == 4 for one in heads)
    return alike and len({one.shape[:2] for one in heads}) == 1 and has_engine()


def reference(query: Tensor, key: Tensor, value: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """Integer attention in plain torch; see `attention`, and `factor_of` for the factor. bias: in steps."""
    dtype, query, key, value = query.dtype, query.float(), key.float(), value.float()
    key = key - (key.amax(-2, keepdim=True) + key.amin(-2, keepdim=True)) * 0.5
    good = (key.isfinite().flatten(-2).all(-1) & value.isfinite().flatten(-2).all(-1))[..., None, None]
    good = good & query.isfinite().all(-1, keepdim=True)
    q, q_scale = _round_rows(query)
    k, k_scale = _round_rows(key)
    v, v_scale = (one.transpose(-1, -2) for one in _round_rows(value.transpose(-1, -2)))
    rows = q_scale * factor
    acc, total, exponent = query.new_zeros(()), query.new_zeros(()), None
    for start in range(0, key.shape[-2], BLOCK):
        part = slice(start, start + BLOCK)
        scores = _exact(q, k[..., part, :].transpose(-1, -2)) * k_scale[..., part, :].transpose(-1, -2) * rows
        if bias is not None:
            scores = (scores + bias[..., part]).nan_to_num(-FARTHEST)
        scores = scores.clamp(-FARTHEST, FARTHEST)
        own = (scores.amax(-1, keepdim=True) / STEPS).ceil()
        codes = _power_codes(scores - own * STEPS)
        if bias is not None:
            codes = codes * (bias[..., part] > -math.inf)
        now = own if exponent is None else torch.maximum(exponent, own)
        keep = torch.zeros_like(now) if exponent is None else _power_of_two(exponent - now)
        weight, exponent = _power_of_two(own - now), now
        acc = acc * keep + (codes @ v[..., part, :]) * weight
        total = total * keep + codes.sum(-1, keepdim=True) * weight
    y = acc * (1 / total) * v_scale
    return torch.where(good, y, math.nan).to(dtype)


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers as x, and the scale of each row (..., 1)."""
    scale = absmax_scale(x, TOP).unsqueeze(-1)
    return (x * (1 / scale)).round().clamp(-TOP, TOP).nan_to_num(0.0), scale.nan_to_num(1.0)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """A product of whole numbers, rounded to float32 once."""
    exact = a.shape[-1] * TOP**2 < FLOAT32_EXACT
    return a @ b if exact else (a.double() @ b.double()).float()


def _power_codes(x: Tensor) -> Tensor:
    """round(255 * 2**(x / 2048)) of x <= 0, float32."""
    steps = x.clamp(min=LEAST).to(torch.int64)
    whole, fraction = steps >> 11, (steps & 2047) << 5
    power = torch.full_like(steps, CUBIC[0])
    for coefficient in CUBIC[1:]:
        power = (fraction * power >> 16) + coefficient
    return ((power >> 6 - whole) + 1 >> 1).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent of whole numbers up to 0; 2**-126 stands for all that is less."""
    return torch.ldexp(torch.ones_like(exponent), exponent.clamp(min=LOWEST))
