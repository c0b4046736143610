"""Codes to bytes and back: the one place that knows the nibble order.

    codes    c0 c1 | c2 c3 | c4              one code a value, along the last axis
    bytes    c1c0  | c3c2  | 0c4             the earlier code in the low nibble; an odd tail is padded with code 0

So codes 0 1 2 3 4 5 6 7 pack to the bytes 10 32 54 76 (hex). The multipliers of subgroups are packed the same way, a nibble each:
the exponent of a power of two, or a multiple less one.
"""

import torch
from torch import Tensor

from halfbyte.errors import CorruptError


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte.

    Args:
        codes: uint8 (..., n), each below 16.
    Returns:
        uint8 (..., ceil(n / 2)), contiguous.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of each row.

    Args:
        packed: uint8 (..., ceil(count / 2)).
    Returns:
        uint8 (..., count).
    Raises:
        CorruptError: when the last axis does not hold exactly `count` codes.
    """
    check_rows(packed, count, 4)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes[..., :count]


def pack_multipliers(multiplier: Tensor, multiples: bool) -> Tensor:
    """Two multipliers a byte.

    Args:
        multiplier: uint8 (..., n): 1 to 16 where they are `multiples`, else powers of two.
    Returns:
        uint8 (..., ceil(n / 2)).
    """
    return pack_nibbles(multiplier - 1 if multiples else torch.frexp(multiplier.float()).exponent.sub(1).to(torch.uint8))


def unpack_multipliers(packed: Tensor, count: int, multiples: bool) -> Tensor:
    """The inverse of `pack_multipliers`: uint8 (..., count)."""
    nibbles = unpack_nibbles(packed, count)
    return nibbles + 1 if multiples else 1 << nibbles


def check_rows(packed: Tensor, count: int, bits: int) -> None:
    """Raises CorruptError when the last axis does not hold exactly `count` codes of 4 or 8 bits."""
    needed = (count + 1) // 2 if bits == 4 else count
    if packed.dtype != torch.uint8 or packed.shape[-1] != needed:
        raise CorruptError(f"{count} packed codes need uint8 rows of {needed} bytes; got {packed.dtype} rows of {packed.shape[-1]}")
