"""The CPU backend: which packed layers the C++ engine takes, and how a layer is handed to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import get_grid
from halfbyte.layers import TRANSPOSED, matrix_shape
from halfbyte.packing import check_rows
from halfbyte.quantizers import FixedScale
from halfbyte.recipe import ActivationSpec, LayerSpec
from halfbyte.runtime import engine
from halfbyte.runtime.geometry import Geometry, geometry_of

FLOAT_INPUT = "its input stays in float"


@dataclass(frozen=True)
class Plan(Geometry):
    """How the engine runs one layer."""

    format: tuple[int, ...]  # of the input: grid code, max_shift, subgroup, top, truncate, max_multiple
    weights: tuple[int, ...]  # `engine.weight_format`


def hindrance_of(spec: LayerSpec) -> str | None:
    """Why the engine takes no layer of this spec; None where it does."""
    return FLOAT_INPUT if spec.activation is None else None


def plan_for(layer: Any, spec: LayerSpec) -> Plan | str:
    """How the engine runs a packed layer, or why it cannot and the reference backend does."""
    if engine.MISSING:
        return "the C++ engine cannot run"
    if isinstance(layer, TRANSPOSED):
        return "the C++ engine has no transposed convolutions"
    if spec.activation is None:
        return FLOAT_INPUT
    if matrix_shape(layer)[1] > engine.longest_k():
        return f"its dot products are longer than {engine.longest_k()}"
    found = geometry_of(layer)
    return Plan(found.sizes, found.grow, found.grow_mode, _input_format(spec.activation), engine.weight_format(spec.weight))


def _input_format(spec: ActivationSpec) -> tuple[int, ...]:
    code, truncate = engine.grid_code(get_grid(spec.grid).name), int(spec.rounding == "truncate")
    return code, spec.max_shift, spec.subgroup, spec.top, truncate, spec.max_multiple


def make_tiles(layer: Any) -> Tensor:
    """A layer's codes and multipliers in the order the engine reads them: uint8 (bytes,), or (sets, bytes).

    Raises:
        CorruptError: when they have the wrong sizes. PackedError: when the engine cannot use them.
    """
    weight, (_, count) = layer.spec.weight, matrix_shape(layer)
    codes, multipliers = layer.weight_codes, layer.weight_multiplier
    check_rows(codes, count, get_grid(weight.grid).bits)
    if multipliers is not None:
        check_rows(multipliers, -(-count // weight.subgroup), 4)
    return reorder(engine.pack, codes, multipliers, layer)


def reorder(pack: Callable[..., Tensor], codes: Tensor, multipliers: Tensor | None, layer: Any) -> Tensor:
    """The codes of a layer, or of each of its sets, through `pack` (the engine's, or the operator that is traced)."""
    weight = layer.spec.weight
    arguments = layer.plan.sizes, layer.plan.weights
    if weight.sets == 1:
        return pack(codes, multipliers, *arguments)
    return torch.stack([pack(codes[i], None if multipliers is None else multipliers[i], *arguments) for i in range(weight.sets)])


def from_tiles(layer: Any, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of `make_tiles`: `weight_codes` and `weight_multiplier`, bit for bit."""
    shapes = layer.stored_shapes()
    codes = torch.empty(shapes["weight_codes"][0], dtype=torch.uint8)
    multipliers = torch.empty(shapes["weight_multiplier"][0], dtype=torch.uint8) if "weight_multiplier" in shapes else None
    if layer.spec.weight.sets == 1:
        engine.unpack(tiles, codes, multipliers)
    else:
        for i, one in enumerate(tiles):
            engine.unpack(one, codes[i], None if multipliers is None else multipliers[i])
    return codes, multipliers


def forward(
    layer: Any, plan: Plan, x: Tensor, chosen: int = 0, fixed: FixedScale | None = None, norm: tuple[Any, ...] | None = None
) -> Tensor:
    """A whole packed layer: float input to float output, in the engine.

    Args:
        chosen: which set of weights, where there are several. fixed: the calibrated scale of the input, where it has one.
        norm: of a convolution's input, as `engine.norm_conv2d` takes it.
    Raises:
        PackedError: when the input does not have the layer's number of channels, or is smaller than its kernel.
    """
    plan.check(layer, x)
    tiles = layer.tiles() if layer.spec.weight.sets == 1 else layer.tiles()[chosen]
    calibrated = (None, None) if fixed is None else (fixed.scale, fixed.zero)
    weights = tiles, layer._buffers["weight_scale"], layer._parameters.get("bias"), plan.format, *calibrated
    if isinstance(layer, nn.Linear):
        return engine.linear(x, *weights)  # type: ignore[no-any-return]
    run = engine.conv2d if norm is None else engine.norm_conv2d
    return plan.over_images(layer, x, lambda images, last: run(images, *(norm or ()), plan.sizes, last, *weights))


def takes(x: Tensor) -> bool:
    """Whether the engine takes an input; the reference backend runs the others."""
    return x.device.type == "cpu" and x.dtype in engine.DTYPES
