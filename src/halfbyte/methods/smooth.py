"""Smoothing: input channels with outliers are divided by a factor, and the weights that read them multiplied by it.

    x W^T = (x / s) (W * s)^T

In float nothing changes; quantized, difficulty moves from the input, whose scale is ruled by its largest channel, to the weights,
which have room for it. The strength a says how much: s = max|x|^a / max|W|^(1-a) per input channel.

The division must happen before the input is rounded. Two places can hold it:

- `input_scale` of a layer (1 / s, multiplied onto its input): works everywhere, costs one multiplication a value.
- an affine norm right before (`fold_into_norm`): costs nothing, and is exact because gain and bias are linear. A SiLU or GELU
  between norm and layer (GroupNorm, SiLU, convolution in a UNet's residual blocks) is not linear in s, so nothing is folded there;
  nor into norms whose output has readers beyond the given layers. That is for the caller to know.

Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", arXiv 2211.10438.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, ModelError, NonFiniteError, RecipeError
from halfbyte.layers import TRANSPOSED, Quantizable
from halfbyte.quantizers import quantize_activation, quantize_weight, weight_scale
from halfbyte.recipe import LayerSpec

STRENGTHS = 20  # steps of the search from 0 to 1
FAINT = 2.0**-24  # a channel this far below the largest one is treated as dead: no float32 sum of both would notice it
AFFINE_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def smooth_factors(input_absmax: Tensor, weight_absmax: Tensor, strength: float) -> Tensor:
    """Factors s of the input channels: the input is divided by them, the weights are multiplied.

    Their geometric mean is 1, so that neither side grows as a whole. Dead channels (no input or no weight) keep 1.

    Args:
        input_absmax: float (C,), largest |x| of each channel over the calibration inputs.
        weight_absmax: float (C,), largest |W| that reads each channel; see `weight_absmax`.
        strength: a, 0 (level the weights) to 1 (level the inputs).
    Returns:
        float32 (C,), positive.
    Raises:
        RecipeError: when strength is not 0 to 1.
        CalibrationError: when the two differ in shape.
        NonFiniteError: when one holds a NaN or an infinity.
    """
    if not 0 <= strength <= 1:
        raise RecipeError(f"smoothing strength must be 0 to 1, got {strength}")
    if input_absmax.shape != weight_absmax.shape or input_absmax.ndim != 1:
        raise CalibrationError(
            f"smoothing needs one input and one weight maximum a channel, got {tuple(input_absmax.shape)} and "
            f"{tuple(weight_absmax.shape)}; were the statistics taken at another layer?"
        )
    for side, maxima in (("input", input_absmax), ("weight", weight_absmax)):
        if not maxima.isfinite().all():
            raise NonFiniteError(f"the {side} maxima for smoothing hold {int((~maxima.isfinite()).sum())} NaN or infinite values")
    inputs, weights = input_absmax.double(), weight_absmax.double()
    alive = _audible(inputs) & _audible(weights)
    log_factors = torch.zeros_like(inputs)
    wanted = strength * inputs[alive].log() - (1 - strength) * weights[alive].log()
    log_factors[alive] = wanted - wanted.sum() / max(1, wanted.numel())
    return log_factors.exp().float()


def _audible(maxima: Tensor) -> Tensor:
    loudest = maxima.max() if maxima.numel() else maxima.sum()
    return (maxima > 0) & (maxima >= loudest * FAINT)


def weight_absmax(layers: Sequence[Quantizable]) -> Tensor:
    """Largest |weight| that reads each input channel, over all layers that share the input (such as q, k and v).

    Returns:
        float32 (C,).
    Raises:
        ModelError: when there are no layers, or they differ in input channels.
    """
    if not layers:
        raise ModelError("no layers were given whose weights could be looked at")
    by_channel = [_by_input_channel(layer, layer.weight.detach()).float().abs().movedim(2, 1).flatten(2) for layer in layers]
    maxima = [weights.amax(2).flatten() for weights in by_channel]
    if len({len(found) for found in maxima}) > 1:
        raise ModelError(f"layers that share an input must read equally many channels, got {[len(found) for found in maxima]}")
    return torch.stack(maxima).amax(0)


def search_strength(matrix: Tensor, factors: Callable[[float], Tensor], rows: Tensor, spec: LayerSpec) -> float:
    """The strength that leaves the least error of a layer's output.

    Args:
        matrix: weights float32 (O, K). rows: what they are multiplied with, float32 (G, n, K).
        factors: strength -> factors of the input channels, float32 (C,).
    """
    exact, errors = _product(rows, matrix), {}
    for strength in (step / STRENGTHS for step in range(STRENGTHS + 1)):
        along = factors(strength)
        along = along.view(len(rows), -1).repeat(1, rows.shape[-1] * len(rows) // len(along))  # K runs over taps, then channels
        spread = along.repeat_interleave(len(matrix) // len(rows), 0)
        scaled = matrix * spread
        weight = quantize_weight(scaled, weight_scale(scaled, spec.weight), spec.weight).dequantize()
        inputs = rows / along[:, None]
        if spec.activation is not None:
            integers, scale = quantize_activation(inputs.flatten(0, 1)[:, None], spec.activation)
            inputs = (integers * scale)[:, 0].view_as(inputs)
        errors[strength] = float((_product(inputs, weight) - exact).square().sum())
    return min(errors, key=errors.__getitem__)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows @ matrix.view(len(rows), -1, matrix.shape[-1]).transpose(1, 2)


@torch.no_grad()
def scale_inputs(layer: Quantizable, factors: Tensor) -> Tensor:
    """Multiply the weights of a float layer by s, in place, and return 1 / s, the `input_scale` that undoes it.

    Args:
        factors: float32 (C,), of `smooth_factors`.
    Returns:
        float32 (C,).
    Raises:
        ModelError: when the layer is quantized already or has other input channels.
    """
    _check_consumer(layer, factors)
    _multiply(layer, factors)
    return factors.reciprocal()


@torch.no_grad()
def fold_into_norm(norm: nn.Module, consumers: Sequence[Quantizable], factors: Tensor) -> None:
    """Divide the output of an affine norm by s and multiply the weights that read it by s, in place: outputs stay the same.

    Args:
        norm: LayerNorm over the last axis, GroupNorm or RMSNorm; its output must reach the consumers, and only them, unchanged.
        consumers: float layers, before their scales are found.
        factors: float32 (C,), of `smooth_factors`.
    Raises:
        ModelError: when the norm has no gain to fold into, or a layer is quantized already or has other input channels. Nothing
            is changed then.
    """
    kind = type(norm).__name__
    if not isinstance(norm, AFFINE_NORMS) or norm.weight is None:
        raise ModelError(f"{kind} has no gain and bias to fold smoothing into; use input_scale of the layers behind it")
    if norm.weight.shape != factors.shape:
        raise ModelError(f"{kind} has a gain of {tuple(norm.weight.shape)}, but there are {tuple(factors.shape)} factors")
    for layer in consumers:
        _check_consumer(layer, factors)
    for parameter in norm.parameters(recurse=False):  # gain, and bias where there is one
        parameter.div_(factors)
    for layer in {id(layer.weight): layer for layer in consumers}.values():  # a weight that two layers share, once
        _multiply(layer, factors)


def _check_consumer(layer: Any, factors: Tensor) -> None:
    kind = type(layer).__name__
    if hasattr(layer, "weight_scale"):
        raise ModelError(f"{kind} has its weight scales already; smooth the float layers before they are quantized")
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if factors.shape != (channels,):
        raise ModelError(f"{kind} reads {channels} channels, but there are {tuple(factors.shape)} factors")


def _by_input_channel(layer: Any, weight: Tensor) -> Tensor:
    """A view of a weight as (groups, outputs, channels of the group, *taps), whatever the kind of layer."""
    grouped: Tensor = weight.unflatten(0, (getattr(layer, "groups", 1), -1))
    return grouped.transpose(1, 2) if isinstance(layer, TRANSPOSED) else grouped


def _multiply(layer: Any, factors: Tensor) -> None:
    weight = _by_input_channel(layer, layer.weight)
    weight.mul_(factors.view(len(weight), 1, -1, *(1,) * (weight.ndim - 3)))
