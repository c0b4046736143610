"""Weights to what is stored of them: by the C++ engine where it takes them, else by the plain torch of quantizers.py.

Both give the same bits, on every instruction set, so a checkpoint does not depend on the machine that made it.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte import quantizers
from halfbyte.formats import get_grid
from halfbyte.layers import FakeQuant, Quantizable, check_finite, weight_to_matrix
from halfbyte.metrics import SignalToNoise, sqnr
from halfbyte.quantizers import quantize_weight, search_factors
from halfbyte.recipe import WeightSpec
from halfbyte.runtime import engine
from halfbyte.runtime.backends import backend
from halfbyte.runtime.layers import PACKED, packed_tensors


def takes(matrix: Tensor, spec: WeightSpec) -> bool:
    """Whether the engine finds the scales of a weight matrix and rounds it: what `_rounds` says, and squared errors."""
    return _rounds(matrix, spec) and (spec.norm == 2 or spec.scale == "absmax")


def _rounds(matrix: Tensor, spec: WeightSpec) -> bool:
    """Whether the engine rounds a weight matrix under given scales: on the CPU, one scale a row, a grid that can be packed."""
    if matrix.device.type != "cpu" or backend().name != "cpu":
        return False
    fits = matrix.dtype in engine.DTYPES and matrix.numel() > 0 and not spec.group
    return fits and engine.knows(get_grid(spec.grid).name)


def weight_scale(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """`quantizers.weight_scale` of a matrix (O, K) of any float dtype, which is not copied to float32 where the engine runs."""
    if not takes(matrix, spec):
        return quantizers.weight_scale(matrix.float(), spec)
    factors = search_factors(spec) if spec.scale == "search" else [1.0]
    return engine.search_scales(matrix.contiguous(), engine.weight_format(spec), factors)


def pack_rows(matrix: Tensor, spec: WeightSpec, name: str) -> tuple[dict[str, Tensor], SignalToNoise]:
    """Scales, codes and multipliers of a weight as they are stored, and how much rounding changed. Rows can be made apart.

    Args:
        matrix: any float dtype (O, K).
        name: of the weight, for the error.
    Returns:
        The tensors of `packed_tensors`; the energies of the weight and of the error.
    Raises:
        NonFiniteError: when it holds a NaN or an infinity.
    """
    matrix = matrix.contiguous()
    scale = weight_scale(matrix, spec)
    if not scale.isfinite().all():  # that of a row with such a value is NaN; looking at every weight would take as long as rounding
        check_finite(name, matrix)
    return round_rows(matrix, scale, spec)


def round_rows(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> tuple[dict[str, Tensor], SignalToNoise]:
    """What `pack_rows` gives, for a finite weight (O, K) of any float dtype, under given scales, float32 (O, 1)."""
    matrix, scale, quality = matrix.contiguous(), scale.contiguous(), SignalToNoise()
    if not _rounds(matrix, spec):
        exact = matrix.float()
        weight = quantize_weight(exact, scale, spec)
        quality.add(exact, weight.dequantize())
        return packed_tensors(weight), quality
    grid, (rows, count) = get_grid(spec.grid), matrix.shape
    made = {"weight_codes": _bytes(rows, (count + 1) // 2 if grid.bits == 4 else count), "weight_scale": scale}
    if spec.has_multipliers:
        made["weight_multiplier"] = _bytes(rows, (-(-count // spec.subgroup) + 1) // 2)
    stored = scale, made["weight_codes"], made.get("weight_multiplier")
    return made, SignalToNoise(*engine.round_weights(matrix, engine.weight_format(spec), *stored))


def weight_quality(layer: Quantizable, made: FakeQuant) -> float:
    """SQNR in dB of a float layer's weight in the trainable layer that takes its place."""
    exact = weight_to_matrix(layer, layer.weight.detach())
    if made.weight is layer.weight and _rounds(exact, made.spec.weight):
        return round_rows(exact, made.weight_scale, made.spec.weight)[1].decibel
    return sqnr(exact.float(), made.quantized_weight().dequantize())


def pack_layer(layer: FakeQuant) -> Any:
    """The packed twin of a trainable layer: the same codes, the same results up to float rounding."""
    kind, spec = next(kind for kind in PACKED if isinstance(layer, kind)), layer.spec.weight
    made = PACKED[kind].empty(layer, layer.spec)  # type: ignore[arg-type]
    matrices = (weight_to_matrix(layer, layer.float_weight(chosen).detach()) for chosen in range(spec.sets))  # type: ignore[arg-type]
    made.store([round_rows(matrix, layer.weight_scale, spec)[0] for matrix in matrices])
    made.input_scale, made.activation_scale, made.weight_choice = layer.input_scale, layer.activation_scale, layer.weight_choice
    made.activation_zero = None if layer.activation_zero is None else layer.activation_zero.to(torch.uint8)
    return made


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)
