"""Sizes of a layer's operation as plain numbers, which engines take and compiled graphs can hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.errors import PackedError


@dataclass(frozen=True)
class Geometry:
    """A linear layer or convolution; a linear layer is a 1x1 convolution, a Conv1d one of height 1."""

    sizes: tuple[int, ...]  # inputs, outputs, kernel, stride, dilation (h, w each), padding (top, bottom, left, right), groups
    grow: tuple[int, ...]  # F.pad's argument where the padding is not with zeros; else empty
    grow_mode: str

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output of an image, after `grow`."""
        kernel, stride, dilation, ends = self.sizes[2:4], self.sizes[4:6], self.sizes[6:8], self.sizes[8:12]
        return output_size((height, width), kernel, stride, dilation, ends)

    def over_images(self, layer: Any, x: Tensor, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """Give a convolution's input to `run` as images (B, C, H, W), padded where zeros will not do, and give back its output.

        Args:
            run: called with the images, and whether the output shall be channels-last.
        """
        images = F.pad(x, self.grow, mode=self.grow_mode) if self.grow else x
        spatial, single = len(layer.kernel_size), x.ndim == len(layer.kernel_size) + 1
        images = images.unsqueeze(0) if single else images
        images = images.unsqueeze(2) if spatial == 1 else images
        y = run(images, spatial == 2 and layer.makes_channels_last(x))
        y = y.squeeze(2) if spatial == 1 else y
        return y.squeeze(0) if single else y

    def check(self, layer: Any, x: Tensor) -> None:
        """Raises PackedError when an input has another number of axes or channels than the layer."""
        linear = isinstance(layer, nn.Linear)
        axis = -1 if linear else -1 - len(layer.kernel_size)
        fits = x.ndim >= 1 if linear else x.ndim in (-axis, 1 - axis)
        if not fits or x.shape[axis] != self.sizes[0]:
            raise PackedError(f"{layer} takes {self.sizes[0]} channels; got an input of shape {tuple(x.shape)}")


def output_size(image: Any, kernel: Any, stride: Any, dilation: Any, ends: Any) -> tuple[int, int]:
    """Height and width of a convolution's output.

    Raises:
        PackedError: when the kernel does not fit.
    """
    height, width = (
        (image[axis] + ends[2 * axis] + ends[2 * axis + 1] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    if height < 1 or width < 1:
        raise PackedError(f"a kernel of {kernel[0]}x{kernel[1]} does not fit into an image of {image[0]}x{image[1]}")
    return height, width


def geometry_of(layer: Any) -> Geometry:
    """Of a Linear, Conv1d or Conv2d layer, packed or not."""
    if isinstance(layer, nn.Linear):
        return Geometry((layer.in_features, layer.out_features, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1), (), "")
    before, after = _padding(layer)
    zeros = layer.padding_mode == "zeros"
    one = (1,) * (2 - len(layer.kernel_size))
    shape = (*one, *layer.kernel_size, *one, *layer.stride, *one, *layer.dilation)
    none = (0,) * len(one)
    ends = zip((*none, *before), (*none, *after), strict=True) if zeros else ((0, 0), (0, 0))
    sizes = (layer.in_channels, layer.out_channels, *shape, *(end for pair in ends for end in pair), layer.groups)
    grow = () if zeros else tuple(end for pair in zip(reversed(before), reversed(after), strict=True) for end in pair)
    return Geometry(sizes, grow, layer.padding_mode)


def _padding(layer: Any) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis; 'same' puts the odd one after, as torch does."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        total = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [each // 2 for each in total], [each - each // 2 for each in total]
    return list(layer.padding), list(layer.padding)
