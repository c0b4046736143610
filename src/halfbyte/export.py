"""Packed models as ordinary float ones, for tools that know nothing of halfbyte (`unpacking.py`)."""

import os
from pathlib import Path

import torch
from torch import nn

from halfbyte import api, checkpoint
from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError
from halfbyte.unpacking import unpack_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    model = api.load(path)
    parts = [model] if isinstance(model, nn.Module) else [one for one in model.components.values() if isinstance(one, nn.Module)]
    packed = [part for part in parts if packed_layers(part)]
    if not packed:
        raise ModelError(f"{path} has no packed layers; there is nothing to export")
    for part in packed:
        unpack(part, DTYPES[dtype])
    return checkpoint.write_folder(output, model.save_pretrained)
