"""Signal-to-quantization-noise ratio."""

import math
from dataclasses import dataclass

from torch import Tensor

from halfbyte.errors import HalfbyteError


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio over everything: 10 log10(sum ref^2 / sum (ref - other)^2).

    Args:
        reference, other: tensors of one shape, of any floating dtype; summed in float64.
    Returns:
        dB. inf where they are equal, -inf where only the reference is all zero, nan where a value is.
    Raises:
        HalfbyteError: when the shapes differ.
    """
    ratio = SignalToNoise()
    ratio.add(reference, other)
    return ratio.decibel


@dataclass
class SignalToNoise:
    """`sqnr` over as many pairs of tensors as are added."""

    signal: float = 0.0  # energy of the references
    noise: float = 0.0  # energy of the differences to them

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Raises HalfbyteError when the shapes differ."""
        check_shapes(reference, other)
        for left, right in zip(reference.detach().flatten().split(2**20), other.detach().flatten().split(2**20), strict=True):
            left, right = left.cpu().double(), right.cpu().double()
            self.signal += left.square().sum().item()
            self.noise += (left - right).square().sum().item()

    @property
    def decibel(self) -> float:
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return -math.inf if ratio == 0 else 10 * math.log10(ratio)


def check_shapes(reference: Tensor, other: Tensor) -> None:
    """Raises HalfbyteError when the shapes differ."""
    if reference.shape != other.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise HalfbyteError(f"shapes {shapes} differ; both must come from the same noise")
