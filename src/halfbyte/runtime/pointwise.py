"""What stands between layers: GELU, GEGLU, group norms and the SiLU after them, in float32 operations of a fixed order.

    gelu(x) = x / (1 + 2**(-2 sqrt(2 / pi) (x + 0.044715 x**3) log2 e))          0.5 x (1 + tanh(..)), said with one power of two
    silu(x) = x / (1 + 2**(-x log2 e))
    geglu(x, gate) = x (max(gate, 0) - |gate| Q(|gate|))                         exact GELU; Q: the normal distribution's tail

Powers of two: a whole number and a fraction within half, whose power is a polynomial, to a relative error of 3e-6. The tail:
2**(-x**2 / 2 log2 e) times a polynomial in 1 / (1 + 0.3125 x), to one of 6e-6. A group norm adds the values and squares of 64
pixels in float32, channel by channel, such blocks in float64, and gives each channel a factor and an offset. What is added to a
channel before the norm changes these alone.

Results are torch's to a rounding of a 16-bit type, or to 1e-5. Nothing depends on the number of threads or the width of vectors,
so the C++ engine (csrc/pointwise.h) gives the same bits on every instruction set. Here is the same in torch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.runtime import engine
from halfbyte.runtime.backends import has_engine

LARGE = 1024  # pixels, from which torch adds up images with channels innermost as fast; below, it reads them group by group
BLOCK = 64  # pixels that are summed in float32
TAIL = (0.12479637, 0.12226773, 0.12996215, 0.02572432, 0.1692493, -0.0720028)  # of Q
SERIES = (0.009582853, 0.055906426, 0.24024099, 0.6931242, 1.0)  # of 2**x


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, by the engine where there is one: float (...), of the same type and layout."""
    if has_engine():
        return engine.gelu(x)  # type: ignore[no-any-return]
    return gelus(x.float()).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Half of the channels times the exact GELU of the other half, by the engine where there is one.

    Args:
        x: float (..., 2 C): values, then gates.
    Returns:
        (..., C), of the same type.
    """
    if has_engine():
        return engine.geglu(x)  # type: ignore[no-any-return]
    values, gates = x.float().chunk(2, dim=-1)
    return (values * exact_gelus(gates)).to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float, silu: bool = False) -> Tensor:
    """`F.group_norm` of images whose channels are innermost in memory; of others, and of large ones without SiLU, it is torch's.

    Args:
        x: float (N, C, ...). weight, bias: float (C,). silu: whether SiLU follows.
    Returns:
        As x, in the same layout.
    """
    small = 0 < x.numel() < LARGE * x.shape[0] * x.shape[1]
    if not (small or (silu and x.numel())) or not x.movedim(1, -1).is_contiguous() or x.shape[1] % groups:
        found = F.group_norm(x, groups, weight, bias, epsilon)
        return F.silu(found) if silu else found
    if has_engine():
        return engine.group_norm(x, groups, weight, bias, epsilon, silu)  # type: ignore[no-any-return]
    return normed(x, groups, weight, bias, epsilon, silu)


def gelus(x: Tensor) -> Tensor:
    """GELU of float32 values in plain torch."""
    inner = x * x * 0.044715 + 1
    return x / (_power(x * (-2 * math.sqrt(2 / math.pi) * math.log2(math.e)) * inner) + 1)


def exact_gelus(x: Tensor) -> Tensor:
    """GELU by the error function of float32 values in plain torch."""
    part = 1 / (x.abs() * 0.3125 + 1)
    tail: Any = TAIL[-1]
    for coefficient in TAIL[-2::-1]:
        tail = part * tail + coefficient
    tail = tail * part * _power(x * x * (-0.5 * math.log2(math.e)))
    return torch.where(x > 0, x, 0) - x.abs() * tail  # type: ignore[no-any-return]


def _power(x: Tensor) -> Tensor:
    """2**x; infinity from 128 on."""
    x = x.clamp(-125, 128)
    whole = x.round()
    fraction = x - whole
    power: Any = SERIES[0]
    for coefficient in SERIES[1:]:
        power = fraction * power + coefficient
    return torch.ldexp(power, whole - 1) * 2  # 2**128 itself is infinite


def normed(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """`group_norm` in plain torch; of x + shift where there is one, (N, C)."""
    pixels = x.movedim(1, -1)
    flat = pixels.flatten(1, -2).float() if x.ndim > 2 else pixels.unsqueeze(1).float()
    images, count, channels = flat.shape
    blocks = F.pad(flat, (0, 0, 0, -count % BLOCK)).view(images, -1, BLOCK, channels)
    sums = torch.zeros_like(blocks[:, :, 0])
    squares = torch.zeros_like(sums)
    for pixel in blocks.unbind(2):
        sums, squares = sums + pixel, squares + pixel * pixel
    size = count * (channels // groups)
    more = more_squares = None  # that a shift adds to each channel's sum, and to that of its squares
    if shift is not None:
        more = shift.double() * count
        more_squares = (2 * sums.double().cumsum(1)[:, -1] + more) * shift.double()
    mean = _in_order(sums, groups, more) / size
    variance = (_in_order(squares, groups, more_squares) / size - mean * mean).clamp(min=0)
    gain, middle = (one.float().repeat_interleave(channels // groups, 1) for one in (1 / (variance + epsilon).sqrt(), mean))
    gain = gain if weight is None else gain * weight.float()
    offset = (0 if bias is None else bias.float()) - (middle if shift is None else middle - shift.float()) * gain
    found: Tensor = flat * gain.unsqueeze(1) + offset.unsqueeze(1)
    if silu:
        found = found / (_power(found * -math.log2(math.e)) + 1)
    return found.view(pixels.shape).movedim(-1, 1).to(x.dtype)


def _in_order(sums: Tensor, groups: int, more: Tensor | None) -> Tensor:
    """Sums of blocks (N, B, C) over blocks and channels of a group, then `more` (N, C), one after another: float64 (N, groups)."""
    parts = sums.double().unflatten(-1, (groups, -1)).transpose(1, 2).flatten(2)
    if more is not None:
        parts = torch.cat([parts, more.unflatten(-1, (groups, -1))], -1)
    found: Tensor = parts.cumsum(-1)[..., -1]
    return found
