"""`halfbyte export --layout comfyui`: a file for each quantized component, for ComfyUI's own loaders."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfbyte import api, checkpoint, conversion
from halfbyte.calibration import DENOISERS
from halfbyte.comfyui.contents import Contents, contents_of, quantized_layers, share_scales
from halfbyte.errors import ModelError
from halfbyte.presets import get_recipe
from halfbyte.recipe import Recipe
from halfbyte.streaming.shards import Shards
from halfbyte.streaming.source import DTYPES, bytes_of

ONE_FILE = "1000TB"


@dataclass
class Exported:
    """What `export` wrote."""

    path: Path
    files: dict[str, Contents]  # by name

    def lines(self) -> list[str]:
        """In words, a line a fact."""
        said = []
        for name, made in self.files.items():
            said.append(f"{name}: {', '.join(f'{count} layers as {kind}' for kind, count in made.layers.items())}")
            if made.rounded:
                said.append(f"{name}: {made.rounded} layers have no quantized form in ComfyUI; their weights were rounded as asked")
        return said


def export(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
) -> Exported:
    """Write the quantized components of a model as a folder of .safetensors files, one each, as ComfyUI loads them.

    Every weight in them has the value that it has here, to the bit, but for what `dtype` rounds. Inputs are rounded by ComfyUI as
    its formats say; input scales of our own are not written (docs/comfyui.md).

    Args:
        path: a packed pipeline or component; with a recipe, a float one, whose denoiser is quantized for the file.
        dtype: of all weights that are no quantized layer in ComfyUI; None: float32 for those that are quantized here, others as is.
        recipe: for what cannot be packed and saved here, such as nvfp4-w4a4; one that needs no calibration.
    Raises:
        ModelError: when something would be lost (it says what), ComfyUI has no names for a component, or nothing is quantized.
        CheckpointError: when the folder exists or cannot be written; nothing is left behind then.
    """
    parts = _packed_parts(path) if recipe is None else _simulated(path, get_recipe(recipe))  # type: ignore[arg-type]
    made = {f"{name}.safetensors": contents_of(part, dtype) for name, part in parts.items()}

    def write(folder: Path) -> None:
        for name, contents in made.items():
            _write(folder, name, contents)

    return Exported(checkpoint.write_folder(output, write), made)


def _packed_parts(path: str | os.PathLike[str]) -> dict[str, nn.Module]:
    """The packed components of a saved model, by the name of their folder."""
    model = api.load(path)
    whole = {Path(path).name: model} if isinstance(model, nn.Module) else model.components
    parts = {name: part for name, part in whole.items() if isinstance(part, nn.Module) and quantized_layers(part)}
    if not parts:
        raise ModelError(f"{path} has no packed layers; quantize it first, or name a recipe to quantize it by (--recipe)")
    return parts


def _simulated(path: str | os.PathLike[str], recipe: Recipe) -> dict[str, nn.Module]:
    """The denoiser of a float pipeline, or a float component, quantized by a recipe and not packed."""
    lost = "quantized products of attention" if recipe.attention else "differences over time" if recipe.temporal else None
    if lost:
        raise ModelError(f"recipe {recipe.name!r} has {lost}, which ComfyUI's layout would lose")
    if recipe.needs_calibration:
        raise ModelError(f"recipe {recipe.name!r} calibrates; run halfbyte quantize with it first, and export what that wrote")
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        found = [folder / name for name in DENOISERS if (folder / name).is_dir()]
        if not found:
            raise ModelError(f"{folder} has no denoiser: none of the folders {', '.join(DENOISERS)}")
        folder = found[0]
    model = api.load(folder, dtype=_stored_dtype(folder))
    if quantized_layers(model):
        raise ModelError(f"{folder} is quantized already; leave out the recipe")
    conversion.simulate(model, recipe)
    share_scales(model)
    return {folder.name: model}


def _stored_dtype(folder: Path) -> torch.dtype:
    """The float dtype of most tensors of a component; float32 where there are none."""
    header = checkpoint.read_header(sorted(folder.glob("*.safetensors")))
    kinds = Counter(DTYPES[name] for _, name in header.values() if name in DTYPES and DTYPES[name].is_floating_point)
    return kinds.most_common(1)[0][0] if kinds else torch.float32


def _write(folder: Path, name: str, contents: Contents) -> None:
    """One file, a layer at a time."""
    shards = Shards(folder, contents.pieces, name.removesuffix(".safetensors") + "{suffix}.safetensors", ONE_FILE)
    shards.create()
    for key, tensor in contents.tensors():
        planned = contents.pieces[key]
        if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
            raise RuntimeError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, planned as {planned.dtype} {tuple(planned.shape)}")
        shards.write(key, 0, bytes_of(tensor.detach().contiguous()))
