"""What becomes of every tensor of a checkpoint, worked out on a model without weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import checkpoint
from halfbyte.api import LOADING_ERRORS, at_most, class_of, plugin_of
from halfbyte.conversion import Result, decide_by, switch_on_options
from halfbyte.errors import CorruptError, HalfbyteError, ModelError, UnstreamableError
from halfbyte.layers import TRANSPOSED, matrix_shape, module_kind, swap
from halfbyte.recipe import LayerSpec, Recipe
from halfbyte.runtime.layers import PACKED, packed_shapes
from halfbyte.streaming.source import Stored, open_component
from halfbyte.subgroups import CACHED_VALUES

PART_VALUES = 1 << 23  # weights in a part: what a worker has in memory at a time
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """A piece of work: rows of a layer to quantize, or bytes of a tensor to copy."""

    source: Stored
    name: str  # of the layer, or of the tensor that is copied
    first: int  # row of the layer, or byte of the tensor
    last: int
    layer: Any = None  # the packed layer, without weights; None: a copy
    checked: bool = False  # of a copy: whether NaN and infinities are refused

    @property
    def values(self) -> int:
        """Weights or, of a copy, bytes; for progress."""
        return self.last - self.first if self.layer is None else (self.last - self.first) * matrix_shape(self.layer)[1]


@dataclass
class Plan:
    """One component: where it comes from, its model without weights, and the parts in the order they are worked on."""

    folder: Path
    model: Any
    result: Result
    outputs: dict[str, Tensor]  # on the meta device, in the order the library saves them
    sources: dict[str, Stored]
    parts: list[Part]
    unused: list[str] = field(default_factory=list)  # tensors of the checkpoint that the class does not have

    @property
    def output_bytes(self) -> int:
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.outputs.values())

    @property
    def input_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.sources.values())


def check_data_free(recipe: Recipe) -> None:
    """Raises ModelError for recipes that need calibration or have no packed form."""
    if recipe.needs_calibration:
        raise ModelError(f"recipe {recipe.name!r} needs calibration, and so the whole model; quantize it in memory")
    hindrance = recipe.simulated_only()
    if hindrance:
        raise ModelError(f"recipe {recipe.name!r} cannot be packed: {hindrance}; it exists for comparison (simulate=True)")


def make_plan(folder: Path, recipe: Recipe) -> Plan:
    """Plan a component folder.

    Raises:
        ModelError: when it is no float model of diffusers or transformers, or cannot be read tensor by tensor.
        CorruptError: when its shards do not fit its config.
    """
    check_data_free(recipe)
    sources = open_component(folder)
    with at_most(4 * len(sources) + 1000):
        model = empty_model(folder)
    names = _names(model.state_dict(keep_vars=True))
    found = {key: next((sources[name] for name in group if name in sources), None) for key, group in names.items()}
    _check(folder, model, found)

    def convert(_: str, layer: Any, spec: LayerSpec) -> nn.Module:
        return PACKED[module_kind(layer)].empty(layer, spec)  # type: ignore[index, no-any-return]

    quantizable = [name for name, layer in model.named_modules() if module_kind(layer) is not None]
    reports = swap(model, decide_by(model, recipe), convert)
    for report in reports:
        _check_float(folder, report.name, report.spec, found.get(f"{report.name}.weight"))
    notes = switch_on_options(model, recipe)
    plugin_of(model).attach(model, recipe)
    outputs, parts = _outputs(model, sources), []
    packed = {report.name: model.get_submodule(report.name) for report in reports if report.spec is not None}
    for key, tensor in outputs.items():
        owner, _, leaf = key.rpartition(".")
        if owner in packed and leaf == "weight_codes":
            parts += _layer_parts(owner, packed[owner], found[f"{owner}.weight"])
        elif owner not in packed or leaf == "bias":
            parts += _copy_parts(key, found[key], tensor, owner in quantizable)
    known = {name for group in names.values() for name in group}
    return Plan(folder, model, Result(model, recipe, reports, notes=notes), outputs, sources, parts, sorted(set(sources) - known))


def empty_model(folder: Path) -> Any:
    """The model of a component's config, its parameters on the meta device.

    Raises:
        ModelError: when the class is unknown, cannot be built, or the model is quantized already.
    """
    from accelerate import init_empty_weights

    if "quantization_config" in checkpoint.read_json(folder / checkpoint.CONFIG):
        raise ModelError(f"{folder} is quantized already; start from the float model")
    kind = class_of(folder)
    try:
        if hasattr(kind, "load_config"):  # diffusers
            with init_empty_weights():
                model = kind.from_config(kind.load_config(str(folder)))
            model.register_to_config(_name_or_path=str(folder))
        else:
            config = kind.config_class.from_pretrained(str(folder))
            with init_empty_weights():
                model = kind(config)
            model.tie_weights()
    except HalfbyteError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"the config of {folder} does not build a {kind.__name__}: {error}") from error
    return model.eval()


def _names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For every name of a tensor all the names it goes by, itself first."""
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(id(tensor), []).append(key)
    return {key: [key, *(name for name in groups[id(tensor)] if name != key)] for key, tensor in state.items()}


def _check(folder: Path, model: nn.Module, found: Mapping[str, Stored | None]) -> None:
    for key, tensor in model.state_dict().items():
        stored = found[key]
        if stored is None:
            raise UnstreamableError(
                f"{folder} cannot be read tensor by tensor: its shards have no {key}, which a {type(model).__name__} of today has"
            )
        if stored.shape != tuple(tensor.shape):
            raise CorruptError(f"{folder}: {key} has the shape {stored.shape}; its config asks for {tuple(tensor.shape)}")


def _check_float(folder: Path, name: str, spec: LayerSpec | None, stored: Stored | None) -> None:
    if spec is not None and stored is not None and stored.dtype not in FLOATS:
        raise ModelError(f"{folder}: {name}.weight is {stored.dtype}, rounded by somebody else; start from the bf16 or float model")


def _outputs(model: nn.Module, sources: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors to write, in the dtype they have in the checkpoint; of several names one, as the checkpoint has it."""
    state, made, seen = model.state_dict(keep_vars=True), {}, set()
    for key, group in _names(state).items():
        if id(state[key]) not in seen:
            seen.add(id(state[key]))
            kept = next((name for name in group if name in sources), key)
            dtype = sources[kept].dtype if kept in sources else state[key].dtype
            made[kept] = torch.empty(state[key].shape, dtype=dtype, device="meta")
    return made


def _layer_parts(name: str, layer: Any, source: Stored | None) -> list[Part]:
    """Rows are cut where the search in memory cuts them, so that both see the same blocks."""
    assert source is not None  # `_check` has seen it
    rows, count = matrix_shape(layer)
    block = max(1, CACHED_VALUES // max(1, count))
    step = rows if isinstance(layer, TRANSPOSED) else max(1, PART_VALUES // (block * count)) * block
    return [Part(source, name, first, min(rows, first + step), layer) for first in range(0, rows, step)]


def _copy_parts(key: str, source: Stored | None, tensor: Tensor, checked: bool) -> list[Part]:
    assert source is not None  # `_check` has seen it
    size, step = tensor.numel() * tensor.dtype.itemsize, PART_VALUES * 4
    return [Part(source, key, first, min(size, first + step), None, checked) for first in range(0, size, step)]


def row_bytes(layer: Any) -> dict[str, int]:
    """Bytes of a row of each stored tensor of a packed layer."""
    shapes = packed_shapes(layer, layer.spec)
    return {name: math.prod(shape[1:]) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
