"""Packed layers and models with random codes: what they compute is noise, how long they take is not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.conversion import packed_layers, specs_of, switch_on_options
from halfbyte.layers import Quantizable, matrix_shape, module_kind
from halfbyte.recipe import LayerSpec, Recipe
from halfbyte.runtime.layers import PACKED, Packed, install


def fill(layer: Packed) -> None:
    """Give a packed layer random codes, allowed multipliers, and scales that keep outputs near the size of inputs."""
    inner: Any = layer
    rows, count = matrix_shape(inner)
    layer.weight_codes = torch.randint(0, 256, layer.weight_codes.shape, dtype=torch.uint8)
    layer.weight_scale = torch.full((rows, 1), 0.03 / max(count, 1) ** 0.5)
    if layer.weight_multiplier is not None:
        count = layer.spec.weight.max_multiple or layer.spec.weight.max_shift + 1
        low, high = (torch.randint(0, count, layer.weight_multiplier.shape, dtype=torch.uint8) for _ in "lh")
        layer.weight_multiplier = low | high << 4


def packed_twin(layer: Quantizable, spec: LayerSpec) -> Any:
    """A packed layer of the sizes of a float one, with random codes."""
    made = PACKED[module_kind(layer)].empty(layer, spec)  # type: ignore[index]
    fill(made)
    return made.eval().requires_grad_(False)


def packed_model(build: Callable[[], nn.Module], recipe: Recipe) -> nn.Module:
    """A model whose quantizable layers, by the recipe, are packed with random codes; the rest is random bfloat16.

    The float weights of the packed layers never exist: the model is built without memory.
    """
    with torch.device("meta"):
        model = build()
    install(model, specs_of(model, recipe))
    switch_on_options(model, recipe)
    model = materialize(model, torch.bfloat16)
    for layer in packed_layers(model).values():
        fill(layer)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def float_model(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model with random weights of one dtype."""
    with torch.device("meta"):
        model = build()
    return materialize(model, dtype)


def materialize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Random values for every parameter of a model that was built on the meta device; its buffers are random too."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_random(parameter, dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                float_kind = buffer.is_floating_point() and not isinstance(module, Packed)
                made = torch.randn(buffer.shape) if float_kind else torch.zeros(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = made.to(dtype) if float_kind else made
    return model.eval()


def _random(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights at the usual size for their fan-in; vectors (norms, biases) near 1 and 0 alike do no harm to timing."""
    if parameter.ndim < 2:
        return torch.full(parameter.shape, 0.5, dtype=dtype)
    made = torch.empty(parameter.shape, dtype=dtype).normal_(std=parameter[0].numel() ** -0.5)
    return made.to(memory_format=torch.channels_last) if parameter.ndim == 4 else made
