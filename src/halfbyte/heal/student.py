"""The student of a folder: the float teacher's layers, under the specs and scales of the quantized model on disk."""

import copy
import os
from typing import Any

import torch
from torch import nn

from halfbyte import api
from halfbyte.calibration import DENOISERS, find_denoiser
from halfbyte.conversion import packed_layers
from halfbyte.errors import HealError
from halfbyte.layers import FAKE_QUANT, FakeQuant, follow_timesteps, matrix_to_weight
from halfbyte.methods.smooth import scale_inputs
from halfbyte.runtime.layers import Packed
from halfbyte.splitting import owner_of, split_layers, splits_of


def load_student(folder: str | os.PathLike[str], teacher: Any) -> tuple[Any, nn.Module]:
    """The pipeline of a quantized folder, and a trainable copy of its denoiser.

    Weights start from the float teacher's where the folder's are the nearest to them; those that were compensated (GPTQ, AdaRound)
    or healed stay as they are. Scales, grids and tables are the folder's.

    Raises:
        HealError: when folder and teacher differ in shape, or the folder is healed already.
        CheckpointError, ModelError: when the folder is no quantized pipeline.
    """
    pipe = api.load(folder)
    packed, model = find_denoiser(pipe), copy.deepcopy(find_denoiser(teacher))
    layers = packed_layers(packed)
    if not layers:
        raise HealError(f"{folder} is not quantized; make a quantized folder with 'halfbyte quantize' first")
    check_shapes(packed, model)
    split_layers(model, splits_of(packed))
    made: dict[nn.Module, FakeQuant] = {}
    names = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if layer.spec.weight.sets > 1:
            raise HealError(f"{folder} is healed already; start from the folder that 'halfbyte quantize' wrote")
        made[names[name]] = _trainable(names[name], layer)
    for name, module in names.items():
        if module in made:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module])
    timed = next((layer.timestep for layer in layers.values() if layer.timestep is not None and layer.spec.over_time), None)
    if timed is not None:
        follow_timesteps(model, timed.calibrated)
    setattr(model, api.RECIPE_ATTRIBUTE, api.describe(folder)[0])
    return pipe, model


@torch.no_grad()
def _trainable(layer: Any, packed: Packed) -> FakeQuant:
    """The trainable twin of a packed layer, with the weight of a float one."""
    kind = next(kind for kind in FAKE_QUANT if isinstance(packed, kind))
    if packed.input_scale is not None:
        scale_inputs(layer, packed.input_scale.reciprocal())
    made = FAKE_QUANT[kind].from_float(layer, packed.spec, packed.weight_scale)
    levels = packed.levels()
    if not torch.equal(made.quantized_weight().levels, levels):  # compensated or healed: they are not the nearest ones
        made.weight = nn.Parameter(matrix_to_weight(layer, levels * packed.weight_scale).to(layer.weight.dtype))
    for name in ("input_scale", "activation_scale", "activation_zero"):
        setattr(made, name, getattr(packed, name))
    return made  # type: ignore[no-any-return]


def check_shapes(student: nn.Module, teacher: nn.Module) -> None:
    """Raises HealError unless both models have the same layers of the same shapes, and the teacher is a float one."""
    if any(isinstance(module, (FakeQuant, Packed)) for module in teacher.modules()):
        raise HealError(f"the teacher is a quantized {type(teacher).__name__}; healing learns from the float model")
    ours, theirs = _shapes(student), _shapes(teacher)
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) != theirs.get(name):
            raise HealError(
                f"student and teacher differ: {name}.weight is {_words(ours.get(name))} in the student and "
                f"{_words(theirs.get(name))} in the teacher; give the float model that the student was made from"
            )


def check_tables(student: nn.Module) -> None:
    """Raises HealError unless every scale that should be calibrated is there, with an entry for each calibrated timestep."""
    for name, layer in student.named_modules():
        if not isinstance(layer, FakeQuant) or layer.spec.activation is None or layer.spec.activation.scale == "dynamic":
            continue
        kind, table = layer.spec.activation.scale, layer.activation_scale
        entries = 1 if kind == "static" else 0 if layer.timestep is None else len(layer.timestep.calibrated)
        if table is None or not entries or len(table) != entries:
            wanted = f"{entries} entries" if entries else "an entry for each calibrated timestep, and no timestep is known"
            found = "none" if table is None else len(table)
            raise HealError(
                f"the {kind} input scales of {name} need {wanted}, found {found}; quantize the whole model again, with calibration"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a model by layer; those of split layers as they were before."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if _has_weight(module):
            shape, owner = tuple(module.weight.shape), owner_of(model, name)
            found[owner] = (shape[0], found[owner][1] + shape[1], *shape[2:]) if owner in found else shape
    return found


def _has_weight(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor)


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def denoiser_name(pipe: Any) -> str:
    """The name of a pipeline's denoiser among its components."""
    return next(name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module))
