"""The tensors of ComfyUI's file for a model: their sizes first, each made only when it is written."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.comfyui.layout import INT8, MARK, TENSORS, Matrix, Sizes, fits, format_of, loss, mark, sizes
from halfbyte.comfyui.names import Place, layout_of, placer
from halfbyte.errors import ModelError
from halfbyte.layers import FakeQuant, matrix_shape, matrix_to_weight, weight_to_matrix
from halfbyte.quantizers import weight_scale
from halfbyte.runtime.layers import Packed

Layer = Any  # a Packed or a FakeQuant
NAMED = 3  # layers that an error names


@dataclass
class Contents:
    """What a file is to hold."""

    pieces: dict[str, Tensor] = field(default_factory=dict)  # by name, on the meta device
    makers: list[Callable[[], dict[str, Tensor]]] = field(default_factory=list)  # each gives some of them
    layers: Counter[str] = field(default_factory=Counter)  # quantized layers by the format they got; "float" where none takes them
    floats: list[str] = field(default_factory=list)  # names of those
    rounded: int = 0  # of those, how many were rounded to another dtype than float32

    def add(self, shapes: Sizes, make: Callable[[], dict[str, Tensor]]) -> None:
        self.pieces |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
        self.makers.append(make)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one layer after another."""
        for make in self.makers:
            yield from make().items()


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """Packed and simulated layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (Packed, FakeQuant))}


def check_lossless(model: nn.Module) -> None:
    """Raises ModelError when some layer holds what ComfyUI's formats cannot; says what, and in how many layers."""
    lost: dict[str, list[str]] = {}
    for name, layer in quantized_layers(model).items():
        reason = loss(layer.spec, layer.input_scale is not None)
        if reason:
            lost.setdefault(reason, []).append(name)
    if lost:
        reason, names = next(iter(lost.items()))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ModelError(
            f"ComfyUI's layout would lose, of {', '.join(names[:NAMED])}{more}, {reason}; "
            "--layout diffusers writes the weights as floats"
        )


def joined_layers(model: Any) -> dict[str, list[Layer]]:
    """Quantized layers by the name of the weight they become in ComfyUI, in the order of its rows."""
    place = placer(model)
    found: dict[str, list[tuple[int, Layer]]] = {}
    for name, layer in quantized_layers(model).items():
        at = place(f"{name}.weight")
        found.setdefault(at.name, []).append((at.part, layer))
    return {name: [layer for _, layer in sorted(parts, key=lambda entry: entry[0])] for name, parts in found.items()}


@torch.no_grad()
def share_scales(model: nn.Module) -> None:
    """Simulated layers that ComfyUI joins get group scales under one float32, as the joined weight would have had."""
    for layers in joined_layers(model).values():
        spec = layers[0].spec.weight
        if len(layers) < 2 or spec.group_scale != "e4m3" or any(layer.spec.weight != spec for layer in layers):
            continue
        matrices = [weight_to_matrix(layer, layer.weight.detach().float()) for layer in layers]
        scales = weight_scale(torch.cat(matrices), spec).split([len(matrix) for matrix in matrices])
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight_scale = scale.clone()


def contents_of(model: Any, dtype: torch.dtype | None) -> Contents:
    """Everything the file of a model holds.

    Args:
        dtype: of all that is no quantized layer in ComfyUI; None: float32 for the quantized weights among it, the rest as it is.
    Raises:
        ModelError: when something would be lost, or ComfyUI has no place for it.
    """
    check_lossless(model)
    place, layers, made = placer(model), quantized_layers(model), Contents()
    groups: dict[str, list[tuple[Place, str]]] = {}
    for key in _keys(model, layers):
        groups.setdefault(place(key).name, []).append((place(key), key))
    tensors = model.state_dict()
    for target, parts in groups.items():
        parts.sort(key=lambda entry: entry[0].part)
        keys, swapped = [key for _, key in parts], parts[0][0].swapped
        owners = [layers.get(key.rpartition(".")[0]) if key.endswith(".weight") else None for key in keys]
        kind = _common_format(model, keys, owners)
        if kind is not None:
            _add_quantized(made, target.removesuffix(".weight"), owners, kind, swapped)
        elif any(owner is not None for owner in owners):
            _add_dense(made, target, keys, owners, tensors, dtype, swapped)
        else:
            _add_plain(made, target, [tensors[key] for key in keys], dtype, swapped)
    return made


def _keys(model: nn.Module, layers: dict[str, Layer]) -> list[str]:
    """Names of the tensors that the float model would save; what is known under two names under the first."""
    keys, seen = [], set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = key.rpartition(".")
        if owner not in layers and id(tensor) not in seen:
            seen.add(id(tensor))
            keys.append(key)
        elif owner in layers and leaf == "bias":
            keys.append(key)
    return keys + [f"{name}.weight" for name in layers]


def _common_format(model: Any, keys: Sequence[str], owners: Sequence[Layer | None]) -> str | None:
    """The format that all parts of a weight share and their shape allows; None: they become floats."""
    linear: list[Layer] = [owner for owner in owners if isinstance(owner, nn.Linear)]
    kinds = {format_of(owner.spec.weight) for owner in linear}
    inputs = {owner.spec.activation is None for owner in linear}
    if len(linear) < len(owners) or len(kinds) > 1 or len(inputs) > 1:
        return None
    kind = kinds.pop()
    rows = sum(owner.out_features for owner in linear)
    read = any(re.search(pattern, key.removesuffix(".weight")) for pattern in layout_of(model).widths for key in keys)
    return kind if kind and fits(kind, rows, linear[0].in_features) and (kind == INT8 or not read) else None


def _matrix(layer: Layer) -> Matrix:
    if isinstance(layer, Packed):
        return Matrix(layer.levels(), layer.weight_scale, layer.spec.weight)
    weight = layer.quantized_weight()
    return Matrix(weight.levels, weight.scale, weight.spec)


def _add_quantized(made: Contents, name: str, layers: Sequence[Layer], kind: str, swapped: bool) -> None:
    rows, count = sum(matrix_shape(layer)[0] for layer in layers), matrix_shape(layers[0])[1]
    note = mark(kind, layers[0].spec.activation is None)

    def make() -> dict[str, Tensor]:
        matrices = [_matrix(layer) for layer in layers]
        levels, scale = (_rows([getattr(one, field) for one in matrices], swapped) for field in ("levels", "scale"))
        tensors = TENSORS[kind](Matrix(levels, scale, matrices[0].spec))
        return {f"{name}.{leaf}": tensor for leaf, tensor in (tensors | {MARK: note}).items()}

    shapes = sizes(kind, rows, count) | {MARK: (tuple(note.shape), note.dtype)}
    made.add({f"{name}.{leaf}": entry for leaf, entry in shapes.items()}, make)
    made.layers[kind] += len(layers)


def _add_dense(
    made: Contents,
    target: str,
    keys: Sequence[str],
    owners: Sequence[Layer | None],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    swapped: bool,
) -> None:
    """A weight that is quantized here and not in ComfyUI: a convolution, or layers it joins that are unlike."""
    kind = dtype or torch.float32
    quantized = [key.removesuffix(".weight") for key, owner in zip(keys, owners, strict=True) if owner is not None]
    made.floats += quantized
    made.layers["float"] += len(quantized)
    made.rounded += 0 if kind == torch.float32 else len(quantized)

    def value(key: str, layer: Layer | None) -> Tensor:
        return tensors[key] if layer is None else matrix_to_weight(layer, _matrix(layer).values())

    def make() -> dict[str, Tensor]:
        parts = [value(key, owner).to(kind) for key, owner in zip(keys, owners, strict=True)]
        return {target: _rows(parts, swapped)}

    shapes = [
        tuple(tensors[key].shape) if owner is None else tuple(owner.weight.shape) for key, owner in zip(keys, owners, strict=True)
    ]
    made.add({target: ((sum(shape[0] for shape in shapes), *shapes[0][1:]), kind)}, make)


def _add_plain(made: Contents, target: str, parts: Sequence[Tensor], dtype: torch.dtype | None, swapped: bool) -> None:
    kind = dtype if dtype is not None and parts[0].is_floating_point() else parts[0].dtype
    shape = tuple(parts[0].shape) if len(parts) == 1 else (sum(len(part) for part in parts), *parts[0].shape[1:])
    made.add({target: (shape, kind)}, partial(_joined, target, parts, kind, swapped))


def _joined(target: str, parts: Sequence[Tensor], kind: torch.dtype, swapped: bool) -> dict[str, Tensor]:
    return {target: _rows([part.to(kind) for part in parts], swapped)}


def _rows(parts: Sequence[Tensor], swapped: bool) -> Tensor:
    """Parts one below another; with the halves of the whole traded where asked."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.unflatten(0, (2, -1)).flip(0).flatten(0, 1) if swapped else whole
