"""What healing moves, and in which units: input scales, learned as LSQ has it (Esser et al. 2020), steps of rounded weights, norms.

Scales are learned by their logarithms: they stay positive, and one rate suits all.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.layers import FakeQuant, input_to_rows, rows_to_input, scale_input, weight_to_matrix
from halfbyte.quantizers import round_learned, straight_through

SCALE_RATE = 0.25  # relative change of a scale where a weight moves by one quantization step
NORM_RATE = 0.1  # relative change of a norm's gain, likewise


def learned_input(layer: Any, x: Tensor, log_scale: Tensor) -> Tensor:
    """`FakeQuant.rounded_input` under calibrated scales times exp(log_scale).

    Args:
        layer: a trainable quantized layer with calibrated input scales.
        log_scale: float32, one for all of x, or (r,), one for each row of x as `input_to_rows` has them.
    """
    x = x if layer.input_scale is None else scale_input(layer, x, layer.input_scale)
    rows, entry = input_to_rows(layer, x), layer.entry(layer.activation_scale, x)
    with torch.autocast(x.device.type, enabled=False):
        scale = layer.activation_scale[entry] * log_scale.exp()
        count = x.numel() // len(x) * layer.spec.activation.top
        scale = straight_through(scale / math.sqrt(count), scale)  # LSQ's factor of the gradient (section 2.2)
    zero = torch.zeros_like(scale) if layer.activation_zero is None else layer.activation_zero[entry]
    rounded = round_learned(rows, scale.expand(len(rows)), zero.expand(len(rows)), layer.spec.activation)
    return rows_to_input(layer, rounded, x.shape).to(x.dtype)


def weight_step(layer: FakeQuant) -> Tensor:
    """How far apart the values are that a weight can take, from the error that rounding leaves: float32 (O, 1)."""
    matrix = weight_to_matrix(layer, layer.weight.detach().float())  # type: ignore[arg-type]
    noise = (layer.quantized_weight().dequantize() - matrix).square().mean(1, keepdim=True)
    return torch.where(noise > 0, (12 * noise).sqrt(), layer.weight_scale.amax(1, keepdim=True))


def norm_parameters(model: nn.Module) -> dict[str, float]:
    """Gains and offsets of the normalisations that have one for every channel, by name, with the root mean square of the gains.

    Normalisations of any library are told by their class's name.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        gain = module._parameters.get("weight")
        if "Norm" in type(module).__name__ and gain is not None and gain.ndim == 1:
            size = float(gain.detach().float().square().mean().sqrt())
            found |= {f"{name}.{key}": size for key, value in module._parameters.items() if value is not None}
    return found
