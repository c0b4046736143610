"""Runs as results.json holds them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from halfbyte.conversion import packed_layers, quantizable_layers, stored_bytes
from halfbyte.evaluate.images import ImageSet
from halfbyte.formats import get_grid
from halfbyte.layers import GridChoice, LayerReport
from halfbyte.metrics import Estimate
from halfbyte.recipe import LayerSpec, Recipe
from halfbyte.report.pictures import data_uri, grid_png

SMALL = 64  # pixels: images up to this size stand in a grid of 8 x 8,
LARGE = 256  # larger ones in a grid of 4 x 3, shrunk to this size


def float_row(denoiser: Any, found: Mapping[str, Estimate], seconds: float, images: ImageSet) -> dict[str, Any]:
    """The run of the float model."""
    plain = 2 * sum(layer.weight.numel() for layer in quantizable_layers(denoiser).values())
    dtype = str(next(denoiser.parameters()).dtype).removeprefix("torch.")
    return {
        "recipe": "float",
        "weights": dtype,
        "activations": dtype,
        "bits": 16.0,
        "bytes": plain,
        "bytes_bf16": plain,
        "sqnr": None,
        "sqnr_by_timestep": [],
        "figures": {name: estimate.to_dict() for name, estimate in found.items()},
        "published": [],
        "seconds_per_image": seconds,
        "layers": [],
        "images": picture(images),
    }


def quantized_row(
    name: str,
    recipe: Recipe,
    denoiser: Any,
    layers: Sequence[LayerReport],
    damage: Mapping[str, Any],
    found: Mapping[str, Estimate],
    seconds: float,
    images: ImageSet,
) -> dict[str, Any]:
    """The run of a quantized model, packed or simulated.

    Args:
        layers: what became of every layer.
        damage: as `Evaluation.damage` gives it.
    """
    packed = bool(packed_layers(denoiser))
    stored, plain = stored_bytes(denoiser) if packed else simulated_bytes(layers)
    activation = recipe.inner.activation
    return {
        "recipe": name,
        "weights": recipe.inner.weight.describe(),
        "activations": activation.describe() if activation else "float",
        "bits": 16 * stored / plain,
        "bytes": stored,
        "bytes_bf16": plain,
        "sqnr": damage["sqnr"],
        "sqnr_by_timestep": damage["sqnr_by_timestep"],
        "figures": {key: estimate.to_dict() for key, estimate in found.items()},
        "published": [],
        "seconds_per_image": seconds if packed else None,
        "layers": layer_rows(layers, damage),
        "images": picture(images),
    }


def simulated_bytes(layers: Sequence[LayerReport]) -> tuple[int, int]:
    """Bytes that simulated layers would need, and those of the same weights in bf16."""
    sizes = [(layer.bits, math.prod(layer.shape)) for layer in layers if layer.spec is not None]
    return round(sum(bits * count for bits, count in sizes) / 8), 2 * sum(count for _, count in sizes)


def layer_rows(layers: Sequence[LayerReport], damage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layer table of a result, as the report wants it.

    Args:
        damage: as `Evaluation.damage` gives it.
    """
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weight": layer.spec.weight.describe() if layer.spec else None,
            "activation": layer.spec.activation.describe() if layer.spec and layer.spec.activation else None,
            "bits": layer.bits,
            "reason": layer.reason,
            "weight_sqnr": layer.weight_sqnr,
            "output_sqnr": damage["layers"].get(layer.name),
            "choice": None if layer.choice is None or layer.spec is None else choice_row(layer.spec, layer.choice),
            "input_codes": damage["input_codes"].get(layer.name),
            "weight_codes": damage["weight_codes"].get(layer.name),
        }
        for layer in layers
    ]


def choice_row(spec: LayerSpec, choice: GridChoice) -> dict[str, Any]:
    """What a grid search found for a layer, as the report wants it."""
    grid = get_grid(spec.activation.grid) if spec.activation else None
    return {
        "weight_grid": spec.weight.grid,
        "input_grid": grid.name if grid else "float",
        "maxval": choice.input_scale * (grid.top - choice.input_zero) if grid else math.inf,
        "offset": -choice.input_scale * choice.input_zero,
        "low": choice.input_range[0],
        "high": choice.input_range[1],
        "weight_errors": choice.weight_errors,
        "input_errors": choice.input_errors,
    }


def picture(images: ImageSet) -> str:
    """The first images of a set as one picture."""
    first = images.read(0, 1)
    small = max(first.shape[2:]) <= SMALL
    shown = images.read(0, 64 if small else 12).float() / 255
    return data_uri(grid_png(shown if small else _shrunk(shown), 8 if small else 4))


def _shrunk(images: Tensor) -> Tensor:
    factor = max(images.shape[2:]) / LARGE
    if factor <= 1:
        return images
    return F.interpolate(images, (round(images.shape[2] / factor), round(images.shape[3] / factor)), mode="area")
