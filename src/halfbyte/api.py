"""The public verbs: quantize, save, load. They take a diffusers pipeline, a diffusers or transformers model, or any nn.Module."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from halfbyte import checkpoint, conversion
from halfbyte.calibration import DENOISERS, Call, Conditions, InputStatistics, Progress, collect, find_denoiser, record_calls
from halfbyte.conversion import Result, hessian_layers, sampled_layers, specs_of
from halfbyte.errors import CheckpointError, CorruptError, HalfbyteError, ModelError
from halfbyte.hub import LayoutConfig, after_loading, before_loading, is_packed
from halfbyte.layers import FakeQuant
from halfbyte.presets import DEFAULT, get_recipe
from halfbyte.recipe import Recipe
from halfbyte.splitting import join_layers

# what bad folders raise
LOADING_ERRORS = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError, ArithmeticError, AssertionError,
    MemoryError, checkpoint.ShardError,
)  # fmt: skip
RECIPE_ATTRIBUTE = "_halfbyte_recipe"  # remembered on quantized modules, so that packing and saving them can tell


def quantize(
    model: Any,
    recipe: str | Path | Recipe | dict[str, Any] = DEFAULT,
    calibration: int | Iterable[Any] | None = None,
    *,
    simulate: bool = False,
    prompts: Sequence[str] = (),
    steps: int = 20,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Result:
    """Quantize a model in place.

    Args:
        model: a diffusers pipeline (its unet or transformer is quantized) or any nn.Module with Linear or convolution layers.
        recipe: a preset's name, a Recipe, a mapping, or the path of a .json or .yaml file.
        calibration: for recipes that need it: how many images the float pipeline samples, or an iterable of inputs of the module
            (a tensor, a tuple of positional or a dict of keyword arguments each).
        simulate: leave trainable layers that round as the packed ones would, instead of packing.
        prompts: for text-to-image pipelines, the prompts to calibrate on.
        steps, seed: of the calibration's sampler.
        progress: called with (what is being done, units done, units in all).
        arguments: of the pipeline's call while it samples to calibrate, such as guidance_scale: those you will sample with.
    Returns:
        A Result; `result.layers` accounts for every Linear and convolution layer, `print(result.table())` shows it.
    Raises:
        RecipeError, ModelError, NonFiniteError, CalibrationError, SamplerError: see halfbyte.errors.
    """
    chosen = get_recipe(recipe)
    module = _module_of(model)
    hindrance = chosen.simulated_only()
    if hindrance and not simulate:
        raise ModelError(f"recipe {chosen.name!r} cannot be packed: {hindrance}; pass simulate=True to study it")
    told = Conditions(prompts, arguments or {})
    calls = _calls(model, chosen, calibration, told, steps, seed, progress) if chosen.needs_calibration else []
    try:
        if chosen.split and calls:
            conversion.split_concatenations(module, chosen, calls[0])
        statistics = _statistics(module, chosen, calls, seed, progress) if chosen.needs_calibration else None
        result = conversion.simulate(module, chosen, statistics, _stage(progress, "quantizing layers"), calls, seed)
    except BaseException:
        join_layers(module)  # what fails leaves the model as it was
        raise
    setattr(module, RECIPE_ATTRIBUTE, chosen)
    if not simulate:
        pack_model(module, chosen)
        conversion.note_backends(result)
    return result


def _module_of(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if hasattr(model, "components"):
        return find_denoiser(model)
    raise ModelError(f"a diffusers pipeline or a torch.nn.Module is needed, got {type(model).__name__}")


def _stage(progress: Callable[[str, int, int], None] | None, stage: str) -> Progress | None:
    return None if progress is None else partial(progress, stage)


def _calls(
    model: Any,
    recipe: Recipe,
    calibration: Any,
    told: Conditions,
    steps: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> list[Call]:
    """The calls of the module that a recipe is calibrated on."""
    if calibration is None:
        raise ModelError(f"recipe {recipe.name!r} needs calibration; pass calibration=16 or some inputs")
    if isinstance(calibration, int):
        if isinstance(model, nn.Module):
            raise ModelError("a bare module has no sampler to calibrate with; pass its pipeline, or an iterable of inputs")
        stage = _stage(progress, "sampling the float model")
        return record_calls(model, calibration, steps, seed, prompts=told.prompts, progress=stage, arguments=told.arguments)
    if isinstance(calibration, (torch.Tensor, dict, Call)):
        raise ModelError(f"calibration is a single {type(calibration).__name__}; put the inputs of the module into a list")
    return [_as_call(entry) for entry in calibration]


def _statistics(
    module: nn.Module, recipe: Recipe, calls: Sequence[Call], seed: int, progress: Callable[[str, int, int], None] | None
) -> dict[str, InputStatistics]:
    hessians, rows = hessian_layers(module, recipe), sampled_layers(module, recipe)
    stage = _stage(progress, "looking at the layers' inputs")
    return collect(module, calls, specs_of(module, recipe), hessians, rows, seed, stage)


def _as_call(entry: Any) -> Call:
    if isinstance(entry, Call):
        return entry
    if isinstance(entry, dict):
        return Call((), entry)
    return Call(tuple(entry) if isinstance(entry, (tuple, list)) else (entry,), {})


def pack_model(module: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """Trainable quantized layers to packed ones, in place; the model then saves itself packed."""
    conversion.pack(module)
    plugin = plugin_of(module)
    chosen = recipe or getattr(module, RECIPE_ATTRIBUTE, None)
    if chosen is not None:
        setattr(module, RECIPE_ATTRIBUTE, chosen)
        if plugin is not None:
            plugin.attach(module, chosen)
    return module


def plugin_of(module: nn.Module) -> Any:
    """The plug-in of the library a module comes from; None for a plain module. Imports no library that is not in use."""
    for library, base in (("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel")):
        kind = getattr(sys.modules.get(library), base, None) if library in sys.modules else None
        if kind is not None and isinstance(module, kind):
            return importlib.import_module(f"halfbyte.{library}_plugin")
    return None


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    plugin = plugin_of(module)
    return plugin is not None and hasattr(plugin, "is_transformers_model")


def save(model: Any, path: str | os.PathLike[str], max_shard_size: str = checkpoint.MAX_SHARD) -> Path:
    """Save a quantized pipeline, component or plain module as a new folder, with the SHA-256 of every shard.

    Raises:
        OutputExistsError: when the folder exists. CheckpointError: when it cannot be written; nothing is left behind then.
        ModelError: when the model is not packed.
    """
    packed = _packed_parts(model)

    def write(folder: Path) -> None:
        if isinstance(model, nn.Module) and plugin_of(model) is None:
            config = LayoutConfig.from_model(model, getattr(model, RECIPE_ATTRIBUTE)).to_dict()
            entries = {"_class_name": type(model).__name__, "quantization_config": config}
            checkpoint.write_tensors(folder, model.state_dict(), entries, max_shard_size)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name in packed:
            checkpoint.record_hashes(folder / name)

    return checkpoint.write_folder(path, write)


def _packed_parts(model: Any) -> list[str]:
    """Folders of the packed components of a pipeline; "" for a module itself. Raises ModelError as `save` says."""
    whole = {"": _module_of(model)}
    parts = whole if isinstance(model, nn.Module) else {k: v for k, v in model.components.items() if isinstance(v, nn.Module)}
    for part in parts.values():
        if any(isinstance(layer, FakeQuant) for layer in part.modules()):
            raise ModelError(f"this {type(part).__name__} is simulated, not packed; run halfbyte.pack on it first")
        if any(name.endswith(".base_layer") for name, _ in part.named_modules()):
            raise ModelError(
                f"this {type(part).__name__} holds adapters, which a 4-bit checkpoint has no place for; save them with "
                "save_lora_weights, then unload_lora_weights"
            )
    packed = [name for name, part in parts.items() if is_packed(part)]
    if not packed:
        raise ModelError(f"this {type(whole['']).__name__} is not packed; run halfbyte.quantize on it first (and halfbyte.pack)")
    return packed


def load_float(path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Any:
    """A float pipeline in float32, from a folder in diffusers layout, a single .safetensors file or a name on the Hub.

    Args:
        config: of a single file: a diffusers folder of the same architecture, for what the file does not hold; None: diffusers
            recognizes the architecture and takes the folder from the Hub.
    Raises:
        ModelError: when there is no such pipeline, it is pickled, or it is quantized already.
    """
    from diffusers import DiffusionPipeline

    folder = Path(path)
    if folder.suffix in checkpoint.PICKLED:
        raise ModelError(checkpoint.pickle_sentence(folder))
    single = folder.suffix == ".safetensors"
    if config is not None and not single:
        raise ModelError(f"config belongs to a single .safetensors file; {folder} is none")
    if single and not os.path.isfile(folder):
        raise ModelError(f"{folder} is not a file")
    if os.path.exists(folder) and not single and not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    try:
        if single:
            pipe = _load_single_file(folder, config)
        else:
            pipe = DiffusionPipeline.from_pretrained(str(path), dtype=torch.float32)
    except HalfbyteError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"{path} is no diffusers pipeline's folder, single file or name on the Hub: {error}") from error
    if is_packed(find_denoiser(pipe)):
        raise ModelError(f"{path} is quantized already; start from the float model")
    return pipe


def _load_single_file(file: Path, config: str | os.PathLike[str] | None) -> Any:
    """A checkpoint in its authors' own layout, through diffusers' converters."""
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    found = {} if config is not None else fetch_diffusers_config(load_single_file_checkpoint(str(file)))
    folder = found.get("pretrained_model_name_or_path") or str(config)
    name = diffusers.DiffusionPipeline.load_config(folder)["_class_name"]
    return getattr(diffusers, name).from_single_file(str(file), config=folder, dtype=torch.float32)


def load(path: str | os.PathLike[str], into: nn.Module | None = None, **options: Any) -> Any:
    """Load what `save` wrote: a pipeline, a diffusers or transformers model, or (with `into`) the weights of a plain module.

    Args:
        into: a float module of the saved architecture; its layers are replaced by the packed ones. Needed for plain modules.
        options: passed on to `from_pretrained`.
    Raises:
        CheckpointError and its kinds: when the folder is missing, incomplete, altered or from a newer version.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # Path's own raises where a parent may not be searched
        raise CheckpointError(f"{folder} is not a folder; give the folder that halfbyte.save or 'halfbyte quantize -o' wrote")
    if into is not None:
        return _load_into(folder, into)
    kind = class_of(folder)
    verify(folder)
    try:
        with at_most(4 * _stored_tensors(folder) + 1000):
            return kind.from_pretrained(str(folder), **{**options, "use_safetensors": True})
    except HalfbyteError:
        raise
    except LOADING_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder} cannot be loaded by {kind.__module__.partition('.')[0]}: {reason}") from error


def _stored_tensors(folder: Path) -> int:
    """Tensors in the shards of a component, or of all components of a pipeline."""
    shards = (file for file in (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")) if file.is_file())
    return len(checkpoint.read_header(shards))


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Refuses to build a model of many more parameters than its shards hold: a config may ask for a billion layers.

    Raises:
        CorruptError: from inside, as soon as there are more.
    """
    count = 0

    def counted(module: nn.Module, *_: Any) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise CorruptError(f"the config asks for more layers than the shards hold, one of them a {type(module).__name__}")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def class_of(folder: Path) -> Any:
    """The diffusers or transformers class that loads a saved folder."""
    import diffusers

    if (folder / "model_index.json").is_file():
        index = checkpoint.read_json(folder / "model_index.json")
        if not any((folder / name / checkpoint.CONFIG).is_file() for name in index):
            raise CorruptError(f"{folder} has a model_index.json but none of its components has a config.json")
        return diffusers.DiffusionPipeline
    if not (folder / checkpoint.CONFIG).is_file():
        raise ModelError(f"{folder} is not a model: it has neither model_index.json nor config.json")
    config, library = checkpoint.read_json(folder / checkpoint.CONFIG), diffusers
    name = config.get("_class_name")
    if name is None and isinstance(config.get("architectures"), list):  # a text encoder
        name, library = next(iter(config["architectures"]), None), importlib.import_module("transformers")
    kind = getattr(library, str(name), None)
    if not hasattr(kind, "from_pretrained"):
        raise ModelError(f"{folder} holds a {name!r}, which diffusers does not know; pass into=<a float module of that class>")
    return kind


def verify(folder: Path) -> None:
    """Check the recorded SHA-256 of every shard of a saved pipeline or component.

    Raises:
        CorruptError: when a shard is missing, truncated or altered; names it.
    """
    for config in (folder / checkpoint.CONFIG, *sorted(folder.glob(f"*/{checkpoint.CONFIG}"))):
        entry = checkpoint.read_json(config).get("quantization_config") if config.is_file() else None
        if config.is_file():
            checkpoint.verify_index(config.parent)
        if isinstance(entry, dict) and isinstance(entry.get("files"), dict):
            checkpoint.verify_hashes(config.parent, entry["files"])


def _load_into(folder: Path, module: nn.Module) -> nn.Module:
    entry = checkpoint.read_json(folder / checkpoint.CONFIG).get("quantization_config")
    if not isinstance(entry, dict):
        raise CorruptError(f"{folder / checkpoint.CONFIG} has no quantization_config; it is not a halfbyte checkpoint")
    config = LayoutConfig(**entry)
    before_loading(module, config, sorted(folder.glob("*.safetensors")), None)
    try:
        module.load_state_dict(checkpoint.with_aliases(checkpoint.read_tensors(folder), module.state_dict()))
    except RuntimeError as error:
        raise CorruptError(f"{folder} does not fit this {type(module).__name__}: {error}") from error
    after_loading(module)
    setattr(module, RECIPE_ATTRIBUTE, config.recipe)
    return module


def describe(path: str | os.PathLike[str]) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and layer specs of a saved folder (a pipeline or one component), without loading a tensor.

    Where several components of a pipeline are quantized, layer names start with their component's, and the recipe is the
    denoiser's.
    """
    folder, found = Path(path), {}
    if not os.path.isdir(folder):
        raise ModelError(f"{folder} is not a folder; give one that halfbyte.save or 'halfbyte quantize -o' wrote")
    for config in (folder / checkpoint.CONFIG, *sorted(folder.glob(f"*/{checkpoint.CONFIG}"))):
        entry = checkpoint.read_json(config).get("quantization_config") if config.is_file() else None
        if isinstance(entry, dict) and entry.get("quant_method") == checkpoint.METHOD:
            found[config.parent.name] = checkpoint.Layout.from_dict(entry, str(config.parent))
    if not found:
        raise ModelError(f"{folder} holds no halfbyte checkpoint (no config.json with a halfbyte quantization_config)")
    main = found[next((name for name in DENOISERS if name in found), next(iter(found)))]
    if len(found) == 1:
        return main.recipe, main.layers
    return main.recipe, {f"{part}.{name}": spec for part, one in found.items() for name, spec in one.layers.items()}


def stored_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of every packed layer of a saved folder (bias aside), named as `describe` names them; only headers are read.

    Raises:
        CorruptError: when a shard is no safetensors file.
    """
    folder, (_, layers) = Path(path), describe(path)
    found = dict.fromkeys(layers, 0)
    for part in (folder, *sorted(config.parent for config in folder.glob(f"*/{checkpoint.CONFIG}"))):
        header = checkpoint.read_header(file for file in sorted(part.glob("*.safetensors")) if file.is_file())
        for key, (shape, dtype) in header.items():
            name, _, leaf = key.rpartition(".")
            owner = name if name in layers else f"{part.name}.{name}"
            if owner in found and leaf != "bias":
                found[owner] += math.prod(shape) * (1 if dtype == "U8" else 4)
    return found
