"""The reference backend: packed layers in plain torch, in exact integer arithmetic.

    y[m, n] = scale_x[m] * scale_w[n] * sum_k X[m, k] * W[n, k]  +  bias[n]

X and W are integers of at most 8 bits (the zero point of X is already taken off). The sum is computed by float matrix products, and
is exact all the same: every operand is a whole number that even bfloat16 holds, and every partial sum stays below 2**24 in float32,
or below 2**53 in float64, which is used where the bound of float32 could be exceeded.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import get_grid
from halfbyte.layers import apply_layer, input_to_rows, matrix_to_weight, rows_to_input
from halfbyte.quantizers import FixedScale, quantize_activation
from halfbyte.recipe import ActivationSpec, largest_multiplier

FLOAT32_EXACT = 2**24  # whole numbers up to here, and so all partial sums, are exact in float32


def integer_product(layer: Any, integers: Tensor, levels: Tensor, largest_input: int) -> Tensor:
    """The layer's operation on whole numbers, without bias, exact.

    Args:
        layer: gives the kind, stride, padding and groups of the operation.
        integers: float32 whole numbers, shaped as the layer's input.
        levels: float32 whole numbers (O, K).
        largest_input: bound of |integers|.
    Returns:
        Whole numbers, float32 or float64, shaped as the layer's output.
    """
    bound = float(levels.abs().sum(1).max()) * largest_input
    exact = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    weight = matrix_to_weight(layer, levels.to(exact))
    # Winograd convolutions (NNPACK's, cuDNN's) are not exact, nor are results that autocast makes bfloat16
    plain = torch.backends.cudnn.flags(enabled=False) if integers.is_cuda else torch.backends.nnpack.flags(enabled=False)
    with plain, torch.autocast(integers.device.type, enabled=False):
        return apply_layer(layer, integers.to(exact), weight, None)


def quantized_forward(
    layer: Any,
    x: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    spec: ActivationSpec | None,
    fixed: FixedScale | None = None,
) -> Tensor:
    """A whole packed layer: quantize the input, multiply, scale, add the bias.

    Args:
        x: the float input, any float dtype.
        levels: float32 whole numbers (O, K); weight_scale: float32 (O, 1).
        spec: how to quantize the input; None multiplies the float input with the decoded weight.
        fixed: the calibrated scale of the input, where its scale is not dynamic.
    Returns:
        The output in the dtype of x.
    """
    if spec is None:
        weight = matrix_to_weight(layer, levels * weight_scale).to(x.dtype)
        return apply_layer(layer, x, weight, None if bias is None else bias.to(x.dtype))
    integers, scale = quantize_activation(input_to_rows(layer, x), spec, fixed)
    grid = get_grid(spec.grid)
    largest = max(spec.top, max(grid.top, -grid.bottom) * largest_multiplier(spec))  # a peak of 105 can round up to 112
    total = integer_product(layer, rows_to_input(layer, integers, x.shape), levels, largest)
    if isinstance(layer, nn.Linear):
        both = scale.view(*x.shape[:-1], 1) * weight_scale.view(-1)
    else:
        spatial = (1,) * len(layer.kernel_size)
        both = scale.view(-1, 1, *spatial) * weight_scale.view(1, -1, *spatial)
        both = both if x.ndim == total.ndim and total.ndim == both.ndim else both[0]
    y = total.float() * both
    if bias is not None:
        y = y + (bias.float() if isinstance(layer, nn.Linear) else bias.float().view(-1, *spatial))
    return y.to(x.dtype)
