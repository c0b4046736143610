"""What stands between layers: GELU and group norms, in float32 operations of a fixed order.

    gelu(x) = x / (1 + 2**(-2 sqrt(2 / pi) (x + 0.044715 x**3) log2 e))          0.5 x (1 + tanh(..)), said with one power of two

Powers of two: a whole number and a fraction within half, whose power is six terms of its series. A group norm adds the values and
squares of 64 pixels in float32, channel by channel, such blocks in float64, and gives each channel a factor and an offset.

Results are torch's to a rounding of a 16-bit type, or to 1e-6. Nothing depends on the number of threads or the width of vectors,
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
SERIES = tuple(math.log(2) ** n / math.factorial(n) for n in (5, 4, 3, 2, 1, 0))  # of 2**x


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, by the engine where there is one: float (...), of the same type and layout."""
    if has_engine():
        return engine.gelu(x)  # type: ignore[no-any-return]
    return gelus(x.float()).to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """`F.group_norm` of small images whose channels are innermost in memory; of others it is torch's.

    Args:
        x: float (N, C, ...). weight, bias: float (C,).
    Returns:
        As x, in the same layout.
    """
    small = 0 < x.numel() < LARGE * x.shape[0] * x.shape[1]
    if not small or not x.movedim(1, -1).is_contiguous() or x.shape[1] % groups:
        return F.group_norm(x, groups, weight, bias, epsilon)
    if has_engine():
        return engine.group_norm(x, groups, weight, bias, epsilon)  # type: ignore[no-any-return]
    return normed(x, groups, weight, bias, epsilon)


def gelus(x: Tensor) -> Tensor:
    """GELU of float32 values in plain torch."""
    inner = x * x * 0.044715 + 1
    return x / (_power(x * (-2 * math.sqrt(2 / math.pi) * math.log2(math.e)) * inner) + 1)


def _power(x: Tensor) -> Tensor:
    """2**x; infinity from 128 on."""
    x = x.clamp(-125, 128)
    whole = x.round()
    fraction = x - whole
    power: Any = SERIES[0]
    for coefficient in SERIES[1:]:
        power = fraction * power + coefficient
    return torch.ldexp(power, whole - 1) * 2  # 2**128 itself is infinite


def normed(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """`group_norm` in plain torch."""
    pixels = x.movedim(1, -1)
    flat = pixels.flatten(1, -2).float() if x.ndim > 2 else pixels.unsqueeze(1).float()
    images, count, channels = flat.shape
    blocks = F.pad(flat, (0, 0, 0, -count % BLOCK)).view(images, -1, BLOCK, channels)
    sums = torch.zeros_like(blocks[:, :, 0])
    squares = torch.zeros_like(sums)
    for pixel in blocks.unbind(2):
        sums, squares = sums + pixel, squares + pixel * pixel
    size = count * (channels // groups)
    mean = _in_order(sums, groups) / size
    variance = (_in_order(squares, groups) / size - mean * mean).clamp(min=0)
    gain, middle = (one.float().repeat_interleave(channels // groups, 1) for one in (1 / (variance + epsilon).sqrt(), mean))
    gain = gain if weight is None else gain * weight.float()
    offset = (0 if bias is None else bias.float()) - middle * gain
    found: Tensor = flat * gain.unsqueeze(1) + offset.unsqueeze(1)
    return found.view(pixels.shape).movedim(-1, 1).to(x.dtype)


def _in_order(sums: Tensor, groups: int) -> Tensor:
    """Sums of blocks (N, B, C) over blocks and the channels of a group, one after another: float64 (N, groups)."""
    parts = sums.double().unflatten(-1, (groups, -1)).transpose(1, 2).flatten(2)
    found: Tensor = parts.cumsum(-1)[..., -1]
    return found
