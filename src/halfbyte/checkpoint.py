"""Folders on disk: written whole or not at all, and checked before anything in them is believed. Knows tensors, not modules.

A quantized component is a folder with `config.json` and safetensors shards (docs/format.md). Its `quantization_config` entry holds
the recipe, the spec of every packed layer and, when written by `hb.save`, the SHA-256 of each shard.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from halfbyte.errors import CheckpointError, CorruptError, OutputExistsError, RecipeError, VersionError
from halfbyte.recipe import LayerSpec, Recipe

FORMAT_VERSION = 1
METHOD = "halfbyte"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
MAX_SHARD = "5GB"
STATE = "halfbyte_state"  # the metadata key under which `write_state` keeps its entries
LARGEST_JSON = 1 << 26  # bytes; the index of 100,000 tensors takes a fifth of it
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ShardError = SafetensorError  # what safetensors raises on a file that is none


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Make a folder by writing it under a temporary name beside it and renaming it at the end.

    Args:
        write: fills the empty folder it is given.
    Returns:
        The final path.
    Raises:
        OutputExistsError: when the path exists already.
        CheckpointError: when writing fails (a full disk, no permission); the temporary folder is removed, also on Ctrl-C.
    """
    final = Path(path)
    if os.path.lexists(final):
        raise OutputExistsError(f"{final} exists already; choose another output folder or remove it first")
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        write(partial)
        sync(partial)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        failure = _os_error(error)
        if failure is not None and not isinstance(error, CheckpointError):
            raise CheckpointError(disk_sentence(final, failure)) from error
        raise
    return final


def write_file(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file under a temporary name and rename it, replacing an older one.

    Raises:
        CheckpointError: when it cannot be written; nothing is left behind then.
    """
    final = Path(path)
    if os.path.isdir(final):
        raise CheckpointError(f"{final} is a folder; give the name of a file in it")
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(disk_sentence(final, error)) from error
        raise
    return final


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error, also where safetensors has wrapped it in an error of its own."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, ShardError) and "os error 28" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def disk_sentence(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full: {path} was not written; free some space and run again"
    return f"{path} was not written: {error.strerror or error}"


def sync(folder: Path) -> None:
    """Have the operating system put every file on the disk before the rename makes them visible.

    Shards get the permissions the process gives other files; safetensors writes them readable by their owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def sha256(file: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def record_hashes(folder: Path) -> None:
    """Write the digest of every shard of a component folder into its config's quantization entry."""
    config = read_json(folder / CONFIG)
    config["quantization_config"]["files"] = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_hashes(folder: Path, files: Mapping[str, str]) -> None:
    """Compare the shards of a folder with their recorded digests.

    Raises:
        CorruptError: when a shard is missing or differs; names it.
    """
    for name, expected in files.items():
        if Path(name).name != name:
            raise CorruptError(f"{folder} lists a shard {name!r} outside its own folder; the checkpoint is not to be trusted")
        file = folder / name
        if not file.is_file():
            raise CorruptError(f"{folder} lacks its shard {name}; copy the folder again")
        if sha256(file) != expected:
            raise CorruptError(f"{file} was truncated or altered: its SHA-256 is not the recorded one; copy the folder again")


def verify_index(folder: Path) -> None:
    """Check that every index of a folder names files of that folder only.

    Raises:
        CorruptError: when one names a file elsewhere, or one that is missing.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        shards_of(index)


def shards_of(index: Path) -> list[Path]:
    """The files an index names, each in the folder of the index. Raises CorruptError as `verify_index` says."""
    names, folder = read_json(index).get("weight_map"), index.parent
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CorruptError(f"{index} has no weight_map of tensor names to files")
    for name in set(names.values()):
        if name in ("", "..") or Path(name).name != name:
            raise CorruptError(f"{folder} lists a shard {name!r} outside its own folder; the checkpoint is not to be trusted")
        if "\0" in name or not (folder / name).is_file():
            raise CorruptError(f"{folder} lacks its shard {name!r}; copy the folder again")
    return [folder / name for name in sorted(set(names.values()))]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: when it cannot be read. CorruptError: when it is not a JSON object.
    """
    try:
        if os.path.exists(file) and not file.is_file():
            raise CheckpointError(f"{file} cannot be read: it is no file")  # a pipe or a device might never end
        if file.is_file() and file.stat().st_size > LARGEST_JSON:
            raise CorruptError(f"{file} has {file.stat().st_size} bytes, too many for a config or an index")
        data = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptError(f"{file} holds a {type(data).__name__}, not a JSON object")
    return data


OPTIONAL_KEYS = {"smoothed", "timesteps", "splits", "attention", "files"}
LAYOUT_KEYS = {"quant_method", "format_version", "recipe", "specs", "layers"} | OPTIONAL_KEYS


@dataclass
class Layout:
    """What the `quantization_config` entry of a component says: how to read the tensors of its packed layers."""

    recipe: Recipe
    layers: dict[str, LayerSpec] = field(default_factory=dict)
    smoothed: list[str] = field(default_factory=list)  # names of the layers that carry an input scale
    timesteps: list[float] = field(default_factory=list)  # ascending; those that the layers' tables over time have an entry for
    splits: dict[str, list[int]] = field(default_factory=dict)  # channels of each part, by the name of the float layer
    attention: list[str] = field(default_factory=list)  # names of the modules whose products are those of integers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; each distinct spec is written once."""
        distinct = list(dict.fromkeys(self.layers.values()))
        entry: dict[str, Any] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_dict(),
            "specs": [spec.to_dict() for spec in distinct],
            "layers": {name: distinct.index(spec) for name, spec in self.layers.items()},
        }
        optional = {"smoothed": self.smoothed, "timesteps": self.timesteps, "splits": self.splits, "attention": self.attention}
        return entry | {key: value for key, value in optional.items() if value}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], where: str) -> "Layout":
        """The inverse of `to_dict`; the digests of the shards, under `files`, are checked in form only.

        Raises:
            VersionError: when a newer halfbyte wrote it. CorruptError: when an entry is missing, unknown or makes no sense.
        """
        _check_version(entry, where)
        try:
            specs = [LayerSpec.from_dict(spec) for spec in entry["specs"]]
            layers = {str(name): specs[_index(number, len(specs))] for name, number in entry["layers"].items()}
            smoothed, files = entry.get("smoothed", []), entry.get("files", {})
            if not isinstance(smoothed, list) or not all(name in layers for name in smoothed):
                raise TypeError(f"smoothed must be a list of names of its layers, got {smoothed!r}")
            if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
                raise TypeError(f"files must be a mapping of names to digests, got {files!r}")
            timesteps = _ascending(entry.get("timesteps", []))
            if not timesteps and any(spec.over_time for spec in specs):
                raise TypeError("its layers have tables over time, but it lists no timesteps")
            splits = {str(name): _sizes(sizes) for name, sizes in entry.get("splits", {}).items()}
            attention = entry.get("attention", [])
            if not isinstance(attention, list) or not all(isinstance(name, str) for name in attention):
                raise TypeError(f"attention must be a list of names, got {attention!r}")
            return cls(Recipe.from_dict(entry["recipe"]), layers, smoothed, timesteps, splits, attention)
        except RecipeError as error:
            raise CorruptError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CorruptError(f"{where}: quantization_config is damaged ({type(error).__name__}: {error})") from error


def _check_version(entry: Mapping[str, Any], where: str) -> None:
    version = entry.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CorruptError(f"{where}: format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise VersionError(
            f"{where} has format version {version}; this halfbyte reads up to {FORMAT_VERSION}. Upgrade: pip install -U halfbyte"
        )
    unknown = set(entry) - LAYOUT_KEYS
    if unknown:
        raise CorruptError(f"{where}: quantization_config has unknown keys {sorted(unknown)}; allowed are {sorted(LAYOUT_KEYS)}")


def _ascending(timesteps: Any) -> list[float]:
    numbers = isinstance(timesteps, list) and all(
        isinstance(t, (int, float)) and not isinstance(t, bool) and math.isfinite(t) for t in timesteps
    )
    if not numbers or any(a >= b for a, b in itertools.pairwise(timesteps)):
        raise TypeError(f"timesteps must be a list of ascending numbers, got {timesteps!r}")
    return [float(t) for t in timesteps]


def _sizes(sizes: Any) -> list[int]:
    if not isinstance(sizes, list) or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"the parts of a split layer must be a list of integers, got {sizes!r}")
    return sizes


def _index(number: Any, count: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        raise IndexError(f"spec number {number!r} of {count}")
    return number


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], max_shard: str = MAX_SHARD) -> None:
    """A component folder from tensors: shards, their index where there are several, and config.json.

    A tensor that goes by several names is written once, under its first; `with_aliases` finds the others again.
    """
    first = {same_storage(tensor): key for key, tensor in reversed(list(tensors.items()))}
    tensors = {key: tensor for key, tensor in tensors.items() if first[same_storage(tensor)] == key}
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=WEIGHTS, max_shard_size=max_shard)
    for name, keys in split.filename_to_tensors.items():
        save_file(_apart({key: tensors[key] for key in keys}), folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, and none a view of another's memory."""
    found: dict[str, Tensor] = {}
    taken = set()
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone(memory_format=torch.contiguous_format) if memory in taken else tensor.contiguous()
        taken.add(memory)
    return found


def same_storage(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor (empty tensors, which have no memory, all count as one of their shape)."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def with_aliases(tensors: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors completed by the names that share memory, in the model, with a name they hold."""
    by_storage = {same_storage(tensor): tensors[key] for key, tensor in model_state.items() if key in tensors}
    aliases = {key: by_storage[same_storage(t)] for key, t in model_state.items() if same_storage(t) in by_storage}
    return {**aliases, **tensors}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a component folder.

    Raises:
        CorruptError: when there are no shards, or one is not a whole safetensors file; names it.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CorruptError(f"{folder} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with unreadable(file), safe_open(file, framework="pt") as shard:
            tensors.update((key, shard.get_tensor(key)) for key in shard.keys())  # noqa: SIM118
    return tensors


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> Path:
    """Tensors and JSON-able entries as one safetensors file, replacing an older one: whole or not at all, whenever it is cut off.

    Raises:
        CheckpointError: when it cannot be written; the older file stays then.
    """
    return write_file(path, save(_apart(tensors), metadata={STATE: json.dumps(dict(entries))}))


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote.

    Raises:
        CorruptError: when the file is not a whole safetensors file, or not one of `write_state`.
    """
    file = Path(path)
    with unreadable(file), safe_open(file, framework="pt") as state:
        entries = (state.metadata() or {}).get(STATE)
        tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118
    try:
        found = json.loads(entries)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{file} holds no training state of halfbyte: {error}") from error
    return tensors, found


def read_header(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype name (such as U8, F32) of every tensor in some shards, without reading the tensors.

    Raises:
        CorruptError: when a shard is not a whole safetensors file; names it.
    """
    found = {}
    for file in files:
        with unreadable(file), safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                entry = shard.get_slice(key)
                found[key] = (tuple(entry.get_shape()), str(entry.get_dtype()))
    return found


def dtype_order(dtypes: Iterable[torch.dtype]) -> list[str]:
    """Safetensors' names of some dtypes in the order in which it puts them into a file (the wide ones first)."""
    content = save({str(dtype): torch.zeros(1).to(dtype) for dtype in dtypes})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [entry["dtype"] for entry in header.values()]


@contextlib.contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """Turns safetensors' own errors into a sentence that names the file."""
    try:
        yield
    except ShardError as error:
        raise CorruptError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from error


def pickle_sentence(file: Path) -> str:
    """Why a pickled checkpoint is refused, and how to convert it."""
    return (
        f"{file} is a pickled checkpoint, which can run any program when it is opened; convert it first, where you trust it: "
        f'from safetensors.torch import save_file; save_file(torch.load("{file.name}", weights_only=True), '
        f'"{file.stem}.safetensors")'
    )
