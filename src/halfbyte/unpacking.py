"""Packed layers as ordinary float ones.

The weights are the very numbers that the packed layers multiply with. What is lost is the rounding of the inputs: such a model is
as good as its 4-bit weights, or better than the packed one, and as large as the float one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError
from halfbyte.layers import TRANSPOSED, adopt, matrix_to_weight
from halfbyte.runtime.between import hand_back
from halfbyte.runtime.intercept import release_attention
from halfbyte.runtime.layers import PACKED, Packed

OURS = ("spec", "plan", "timestep", "channels_last")  # attributes that a plain layer does not have


@torch.no_grad()
def float_layer(layer: Any, dtype: torch.dtype) -> nn.Module:
    """The plain torch layer with the weights that a packed one multiplies with, smoothing folded in.

    Raises:
        ModelError: when the layer has several sets of weights, which one float layer cannot hold.
    """
    if layer.spec.weight.sets > 1:
        raise ModelError(
            f"its layers hold {layer.spec.weight.sets} sets of weights, chosen by timestep; "
            "a float model has one and would lose the others"
        )
    made = adopt(next(kind for kind, packed in PACKED.items() if isinstance(layer, packed)), layer)
    for name in OURS:
        vars(made).pop(name, None)
    weight = matrix_to_weight(layer, layer.levels() * layer.weight_scale)
    if layer.input_scale is not None:
        weight = weight * _over_inputs(layer, layer.input_scale, weight)
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made  # type: ignore[no-any-return]


def _over_inputs(layer: Any, scale: Tensor, weight: Tensor) -> Tensor:
    """Factors of the input channels (C,) in the shape of the weight they belong to."""
    ones = (1,) * (weight.ndim - 2)
    if isinstance(layer, TRANSPOSED):
        return scale.view(-1, 1, *ones)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).view(weight.shape[0], -1, *ones)


def unpack_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the packed layers of a model by float ones, in place.

    Raises:
        ModelError: when it holds no packed layer, or one that a float layer cannot stand for; nothing is changed then.
    """
    found = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, Packed)]
    if not found:
        raise ModelError(f"this {type(model).__name__} has no packed layers; there is nothing to export")
    made = {layer: float_layer(layer, dtype) for layer in packed_layers(model).values()}
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[layer])
    release_attention(model)
    hand_back(model)
