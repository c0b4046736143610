"""Packed models for tools that know nothing of halfbyte: ordinary float ones (`unpacking.py`), or in ComfyUI's layout."""

import os
from pathlib import Path

import torch
from torch import nn

from halfbyte import api, checkpoint, comfyui
from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError
from halfbyte.unpacking import unpack_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("diffusers", "comfyui")


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its short name. Raises ModelError, which lists them."""
    if name not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def unpack(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A packed model as a float one, in place, all of it of one type; its library no longer treats it as quantized.

    Raises:
        ModelError: when it holds no packed layer, or one that a float layer cannot stand for; nothing is changed then.
    """
    unpack_layers(model, dtype)
    plugin = api.plugin_of(model)
    if plugin is not None:
        plugin.detach(model)
    return model.to(dtype)


def export(path: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str = "bf16") -> Path:
    """Write a packed pipeline or component as a float one, in a new folder of the same layout.

    Args:
        dtype: bf16, fp16 or fp32.
    Raises:
        CheckpointError, ModelError: see `load` and `unpack`.
    """
    kind = dtype_of(dtype)
    model = api.load(path)
    parts = [model] if isinstance(model, nn.Module) else [one for one in model.components.values() if isinstance(one, nn.Module)]
    packed = [part for part in parts if packed_layers(part)]
    if not packed:
        raise ModelError(f"{path} has no packed layers; there is nothing to export")
    for part in packed:
        unpack(part, kind)
    return checkpoint.write_folder(output, model.save_pretrained)


def export_by_layout(
    path: str | os.PathLike[str], output: str | os.PathLike[str], layout: str, dtype: str | None, recipe: str | None
) -> list[str]:
    """What `halfbyte export` does; gives what it has to say.

    Raises:
        ModelError: for a layout that is not known or holds nothing of ours exactly, and as `export` and `comfyui.export` say.
    """
    if layout == "diffusers" and recipe is None:
        return [f"Written to {export(path, output, dtype or 'bf16')}"]
    if layout == "diffusers":
        raise ModelError(
            "--recipe is for --layout comfyui; halfbyte quantize writes a quantized model, and this one its weights as floats"
        )
    if layout == "gguf":
        raise ModelError(
            "layout gguf would round every scale: its blocks of 32 values have 16-bit scales, and the scales here are float32; "
            "--layout diffusers writes the weights as floats, which GGUF's own tools convert"
        )
    if layout not in LAYOUTS:
        raise ModelError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    made = comfyui.export(path, output, None if dtype is None else dtype_of(dtype), recipe)
    return [*made.lines(), f"Written to {made.path}"]
