"""What the diffusers and transformers plug-ins share: the stored config, and what happens before and after weights are loaded."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.checkpoint import LAYOUT_KEYS, METHOD, Layout, read_header, verify_hashes
from halfbyte.conversion import pack, packed_layers, simulate
from halfbyte.errors import CorruptError, ModelError, RecipeError, listed
from halfbyte.layers import FLOAT32_BUFFERS
from halfbyte.presets import DEFAULT, get_recipe
from halfbyte.recipe import LayerSpec, Recipe
from halfbyte.runtime.intercept import in_integers, replace_attention
from halfbyte.runtime.layers import Packed, install, packed_shapes
from halfbyte.splitting import split_layers, splits_of

SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float32: "F32"}


class Method(str, Enum):
    """The quant_method of both libraries; they ask for an enum."""

    HALFBYTE = METHOD


class LayoutConfig:
    """The `quantization_config` of a model: a recipe to apply, or the layout of layers that are packed already.

    Args:
        recipe: a preset's name, a Recipe or a mapping, applied while loading a float model.
        stored: the other entries of a saved config (docs/format.md); only loaders pass them.
    Raises:
        RecipeError, CorruptError, VersionError: for what cannot be understood.
    """

    quant_method: Any = Method.HALFBYTE

    def __init__(self, recipe: Any = DEFAULT, **stored: Any) -> None:
        self.quant_method = Method.HALFBYTE
        self.files: dict[str, str] = {}
        if "layers" in stored or "format_version" in stored:
            self.layout = Layout.from_dict({"recipe": recipe, **stored}, "config.json")
            self.files = dict(stored.get("files", {}))
            return
        unknown = set(stored) - {"quant_method"}
        if unknown:
            raise RecipeError(f"a halfbyte config has no key {listed(unknown)}; its keys are {listed(LAYOUT_KEYS)}")
        self.layout = Layout(get_recipe(recipe))

    @property
    def recipe(self) -> Recipe:
        return self.layout.recipe

    @property
    def layers(self) -> dict[str, LayerSpec]:
        """Specs of the packed layers by name; empty while the recipe is yet to be applied."""
        return self.layout.layers

    @classmethod
    def from_model(cls, model: nn.Module, recipe: Recipe) -> Any:
        """The config of a model whose layers are packed."""
        made = cls(recipe)
        layers = packed_layers(model)
        timed = [layer.timestep for layer in layers.values() if layer.timestep is not None and layer.spec.over_time]
        made.layout = Layout(
            recipe,
            {name: layer.spec for name, layer in layers.items()},
            [name for name, layer in layers.items() if layer.input_scale is not None],
            list(timed[0].calibrated) if timed else [],
            splits_of(model),
            in_integers(model),
        )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the layout once layers are packed, else the recipe alone."""
        return self.layout.to_dict() if self.layers else {"quant_method": METHOD, "recipe": self.recipe.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def before_loading(model: nn.Module, config: LayoutConfig, files: Sequence[str | Path], keep_in_float32: list[str] | None) -> None:
    """Check the shards against the config and put empty packed layers into a model that is still on the meta device.

    Args:
        files: the shards about to be loaded, as far as the library tells.
        keep_in_float32: the library's list of names it must not cast; ours are appended.
    Raises:
        CorruptError: when shards were altered, or a packed layer's tensor is missing, unknown or of the wrong shape or dtype.
    """
    paths = [Path(file) for file in files]
    if len({path.parent for path in paths}) > 1:
        raise CorruptError(f"the index of {paths[0].parent} lists shards outside one folder; the checkpoint is not to be trusted")
    if config.files and paths:
        verify_hashes(paths[0].parent, config.files)
    config.files = {}  # they describe those shards only, not what is saved from this model later
    layout = config.layout
    try:
        split_layers(model, layout.splits)
        if layout.attention:
            replace_attention(model, layout.attention)
    except ModelError as error:
        raise CorruptError(f"the checkpoint does not fit this {type(model).__name__}: {error}") from error
    install(model, layout.layers, layout.smoothed, layout.timesteps)
    if keep_in_float32 is not None:
        keep_in_float32.extend(FLOAT32_BUFFERS)
    pickled = next((path for path in paths if path.suffix != ".safetensors"), None)
    if pickled is not None:
        raise CorruptError(f"{pickled} is no safetensors file, and halfbyte opens no other; the checkpoint is not to be trusted")
    if not paths:
        return
    header, layers = read_header(paths), packed_layers(model)
    entries, smoothed = len(layout.timesteps), layout.smoothed
    shapes = {name: packed_shapes(layer, layer.spec, name in smoothed, entries) for name, layer in layers.items()}  # type: ignore[arg-type]
    for name, _, key in (full.rpartition(".") for full in header):
        if name in shapes and key not in (*shapes[name], "bias"):
            raise CorruptError(f"{paths[0].parent}: the shards hold {name}.{key}; the config asks for no such tensor")
    for name in layers:
        for key, (shape, dtype) in shapes[name].items():
            expected, found = (shape, SAFETENSORS_DTYPES[dtype]), header.get(f"{name}.{key}")
            if found != expected:
                came = f"is {found[1]} of shape {found[0]}" if found else "is missing"
                raise CorruptError(f"{paths[0].parent}: {name}.{key} {came}; the config asks for {expected[1]} of shape {shape}")


def after_loading(model: nn.Module) -> None:
    """Raises CorruptError when a packed layer was left without its values."""
    for name, layer in packed_layers(model).items():
        hollow = [key for key, tensor in layer.state_dict().items() if tensor.device.type == "meta"]
        if hollow:
            raise CorruptError(f"the checkpoint has no values for {name}.{hollow[0]}")


def quantize_loaded(model: nn.Module, recipe: Recipe) -> None:
    """Pack the layers of a float model that has just been loaded."""
    simulate(model, recipe)
    pack(model)


def refuse_calibration(recipe: Recipe) -> None:
    """Raises ModelError for recipes that cannot be applied while loading."""
    if recipe.needs_calibration:
        raise ModelError(
            f"recipe {recipe.name!r} needs calibration, which loading cannot do; use halfbyte.quantize(pipe, ...) instead"
        )


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, Packed) for module in model.modules())
