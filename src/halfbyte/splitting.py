"""Layers that read a concatenation, cut at its borders: one layer for each part, summed, each with scales of its own.

The parts of a concatenation, such as the skip connections of a UNet, can differ in range by much: one scale rounds away the quieter
part. Two scales along K cannot be one integer product, but a layer over [a, b] is the sum of a layer over a and one over b,

    W [a, b] + bias = (W_a a + bias) + W_b b

and each of these is an ordinary layer: calibrated, rounded, packed and run like any other. In float nothing changes but the order
of a sum. Which layers read a concatenation is traced (`tracing.find_concatenations`).

Source: Li et al., "Q-Diffusion", arXiv 2302.04304, section 4.2 (split shortcut quantization).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.layers import FORWARD_HOOKS, QuantizedLayer, adopt

SPLITTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Split(nn.Module):
    """The sum of layers over the parts of an input; `parts` are ordinary layers, of which the first has the bias.

    Args:
        sizes: channels that each part reads. axis: of the channels in the input.
    """

    def __init__(self, parts: Sequence[nn.Module], sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.parts, self.sizes, self.axis = nn.ModuleList(parts), list(sizes), axis

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.split(self.sizes, self.axis)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # and so shall be what the layers see
            first, *others = (piece.contiguous(memory_format=torch.channels_last) for piece in (first, *others))
        total: Tensor = self.parts[0](first)
        for part, piece in zip(self.parts[1:], others, strict=True):
            total = total + part(piece)
        return total

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def hindrance(layer: nn.Module | None, sizes: Sequence[int]) -> str | None:
    """Why a layer cannot be split into parts of the given sizes; None: it can."""
    if not isinstance(layer, SPLITTABLE):
        return f"it is a {type(layer).__name__}, not a Linear, Conv1d or Conv2d"
    if getattr(layer, "groups", 1) > 1:
        return "it is a convolution with groups"
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if len(sizes) < 2 or min(sizes) < 1 or sum(sizes) != channels:
        return f"its {channels} channels are not the sum of {list(sizes)}"
    return None


def split_layers(model: nn.Module, splits: Mapping[str, Sequence[int]]) -> None:
    """Put a `Split` in place of the named float layers, in place; shared layers are replaced wherever they are.

    Args:
        splits: channels of each part, by the name of the layer.
    Raises:
        ModelError: when a name is no layer that can be split so. Nothing is changed then.
    """
    everywhere = dict(model.named_modules(remove_duplicate=False))
    for name, sizes in splits.items():
        why = hindrance(everywhere.get(name), sizes)
        if why:
            raise ModelError(f"layer {name!r} cannot be split into {list(sizes)}: {why}")
    made = {everywhere[name]: _split(everywhere[name], sizes) for name, sizes in splits.items()}
    _put(model, made)


def join_layers(model: nn.Module) -> None:
    """Undo `split_layers` where the parts are float layers still."""
    made: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Split) and not any(isinstance(part, QuantizedLayer) for part in module.parts):
            first: Any = module.parts[0]
            whole = adopt(type(first), first)
            with torch.no_grad():
                weight = torch.cat([part.weight for part in module.parts], 1)  # type: ignore[misc]
            whole.weight, whole.bias = nn.Parameter(weight, first.weight.requires_grad), first.bias
            _set_channels(whole, sum(module.sizes))
            for hooks in FORWARD_HOOKS:
                getattr(whole, hooks).update(getattr(module, hooks))
            made[module] = whole
    _put(model, made)


def splits_of(model: nn.Module) -> dict[str, list[int]]:
    """What `split_layers` would make this model of an unsplit one with."""
    return {name: module.sizes for name, module in model.named_modules() if isinstance(module, Split)}


def owner_of(model: nn.Module, name: str) -> str:
    """The name of the layer that a part of a split belongs to; any other name as it is."""
    owner = name.rpartition(".parts.")[0]
    return owner if owner and isinstance(model.get_submodule(owner), Split) else name


def _split(layer: Any, sizes: Sequence[int]) -> Split:
    parts: list[nn.Module] = []
    for index, weight in enumerate(layer.weight.detach().split(list(sizes), 1)):
        part = adopt(type(layer), layer)
        part.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format), layer.weight.requires_grad)
        part.bias = None if index else layer.bias
        _set_channels(part, sizes[index])
        parts.append(part)
    made = Split(parts, sizes, -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size))
    for hooks in FORWARD_HOOKS:  # they expect the whole input
        getattr(made, hooks).update(getattr(layer, hooks))
        for part in parts:
            getattr(part, hooks).clear()
    return made


def _set_channels(layer: Any, channels: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = channels
    else:
        layer.in_channels = channels


def _put(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module])
