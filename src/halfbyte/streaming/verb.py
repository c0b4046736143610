"""`halfbyte quantize` for recipes that need no data: a folder in, a folder out, the float model never in memory."""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfbyte import __version__, checkpoint
from halfbyte.api import is_transformers
from halfbyte.calibration import DENOISERS
from halfbyte.conversion import Result
from halfbyte.errors import CheckpointError, CorruptError, HalfbyteError, ModelError
from halfbyte.presets import DEFAULT, get_recipe
from halfbyte.recipe import Recipe
from halfbyte.runtime.weights import pack_rows, takes
from halfbyte.streaming.journal import RESULT, Journal, locked, model_digest
from halfbyte.streaming.plan import Plan, check_data_free, make_plan
from halfbyte.streaming.shards import Shards
from halfbyte.streaming.work import decibel, one_thread_each, run_parts, unfinished

Progress = Callable[[str, int, int], None]
WORK_BYTES = 24  # a weight in a worker's hands takes at its peak in plain torch: stored, float32, units, levels, temporaries
ENGINE_BYTES = 5  # the same in the C++ engine: stored and, of some layers, re-ordered; codes
BASE_BYTES = 900 << 20  # torch and diffusers themselves
SECOND = re.compile(r"_\d+$")  # Wan has a transformer and a transformer_2
DISK_RATE = 1 << 30  # bytes a second that a run is assumed to read at most
PASS_RATE = 1 << 30  # bytes a second that a core reads, or writes with their CRC-32, or hashes; measured: 0.9e9 to 1.8e9
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors", ".md")


@dataclass
class Job:
    """What a folder becomes: its quantized components, and the files that are copied as they are."""

    folder: Path
    plans: dict[str, Plan]  # by the component's folder name; "" for a bare component
    copies: list[str] = field(default_factory=list)  # paths below the folder
    skipped: dict[str, str] = field(default_factory=dict)  # path or component -> why it is not there

    @property
    def results(self) -> dict[str, Result]:
        return {name: plan.result for name, plan in self.plans.items()}

    @property
    def values(self) -> int:
        return sum(part.values for plan in self.plans.values() for part in plan.parts)


def prepare(model: str | os.PathLike[str], recipe: Any, encoders: Any = None, vae: Any = None) -> Job:
    """Plan a folder in diffusers layout: a pipeline (its denoiser is quantized) or a single component.

    Args:
        recipe: of the denoiser.
        encoders, vae: of the text encoders and of the autoencoder, which are copied where it is None.
    Raises:
        ModelError: when there is nothing to quantize, weights are pickled, or the recipe needs data.
    """
    folder, chosen = Path(model), get_recipe(recipe)
    check_data_free(chosen)
    if not (folder / "model_index.json").is_file():
        if not (folder / checkpoint.CONFIG).is_file():
            raise ModelError(f"{folder} is not a model: it has neither model_index.json nor config.json")
        return Job(folder, {"": make_plan(folder, chosen)})
    components = _components(folder)
    wanted: dict[str, Recipe] = dict.fromkeys((name for name in components if SECOND.sub("", name) in DENOISERS), chosen)
    if not wanted:
        raise ModelError(f"{folder} has no denoiser: model_index.json names none of {', '.join(DENOISERS)}")
    for kind, own in (("text_encoder", encoders), ("vae", vae)):
        if own is not None:
            wanted |= {name: get_recipe(own) for name in components if name.startswith(kind)}
    job = Job(folder, {name: make_plan(folder / name, own) for name, own in wanted.items()}, ["model_index.json"])
    for name in components:
        if name not in wanted and (folder / name).is_dir():
            _choose_copies(job, name)
    return job


def _components(folder: Path) -> list[str]:
    """The components that a pipeline's index names and that are not null."""
    entries = checkpoint.read_json(folder / "model_index.json").items()
    found = [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None]
    outside = next((name for name in found if Path(name).name != name), None)
    if outside is not None:
        raise CorruptError(f"{folder} lists a component {outside!r} outside its own folder; the checkpoint is not to be trusted")
    return found


def _choose_copies(job: Job, component: str) -> None:
    """The files of a component that is left as it is; variants and pickled doubles stay behind."""
    files = sorted(path for path in (job.folder / component).iterdir() if path.is_file())
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    plain = any(name.count(".") == 1 for name in weights)
    for path in files:
        name, variant = f"{component}/{path.name}", path.name.count(".") > (3 if ".index." in path.name else 1)
        if path.suffix in checkpoint.PICKLED and not weights:
            raise ModelError(checkpoint.pickle_sentence(path))
        if path.suffix in checkpoint.PICKLED or ".bin.index." in path.name:
            job.skipped[name] = "pickled; its safetensors twin is copied"
        elif plain and variant and ".safetensors" in path.name:
            job.skipped[name] = "a variant; the plain one is copied"
        elif path.suffix in COPIED:
            job.copies.append(name)
        else:
            job.skipped[name] = "not part of a diffusers folder"


def quantize_folder(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Any = DEFAULT,
    *,
    encoders: Any = None,
    vae: Any = None,
    resume: bool = False,
    max_shard: str = checkpoint.MAX_SHARD,
    progress: Progress | None = None,
) -> Job:
    """Quantize a model folder into a new folder, a few rows at a time; the bytes are those of `quantize` and `save`.

    Killed at any moment it can be continued with `resume=True` and ends at the same bytes.

    Args:
        model, recipe, encoders, vae: see `prepare`.
        progress: called with (what is being done, units done, units in all).
    Returns:
        The job, the layer tables in its `results` filled in.
    Raises:
        ModelError, CorruptError, NonFiniteError, CheckpointError, ResumeError: see halfbyte.errors.
    """
    final = Path(output)
    with locked(final) as work:
        job = prepare(model, recipe, encoders, vae)
        try:
            _run(job, work, _fingerprint(job, max_shard), resume, max_shard, progress)
        except HalfbyteError as error:
            if isinstance(error, ModelError):  # it will never end well
                shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            raise CheckpointError(checkpoint.disk_sentence(final, error) + "; --resume continues") from error
        (work / RESULT).rename(final)
        shutil.rmtree(work, ignore_errors=True)
    return job


def _run(job: Job, work: Path, fingerprint: dict[str, Any], resume: bool, max_shard: str, progress: Progress | None) -> None:
    journal = Journal(work, fingerprint, resume)
    done, total, report = 0, job.values, progress or (lambda *_: None)

    def step(values: int) -> None:
        nonlocal done
        done += values
        report("quantizing", done, total)

    for name, plan in job.plans.items():
        shards = _shards(work / RESULT / name, plan, max_shard)
        shards.create()
        finished = journal.done(name)
        todo = unfinished(plan.parts, shards, finished) if finished else list(range(len(plan.parts)))
        step(sum(part.values for part in plan.parts) - sum(plan.parts[number].values for number in todo))
        run_parts(plan.parts, todo, shards, partial(journal.add, name), step)
        _note_quality(plan, journal.done(name))
        _write_config(plan, shards)
    for name in job.copies:
        _copy(job.folder / name, work / RESULT / name)
    checkpoint.sync(work / RESULT)


def _fingerprint(job: Job, max_shard: str) -> dict[str, Any]:
    """What a run must have in common with the one it continues."""
    configs = {name: (plan.folder / checkpoint.CONFIG).read_bytes() for name, plan in job.plans.items()}
    return {
        "model": {name: model_digest(plan.sources, configs[name]) for name, plan in job.plans.items()},
        "recipe": {name: plan.result.recipe.to_dict() for name, plan in job.plans.items()},
        "shard size": max_shard,
        "division into parts": {name: len(plan.parts) for name, plan in job.plans.items()},
        "version of halfbyte": __version__,
        "version of torch": torch.__version__,
    }


def weights_pattern(model: Any) -> str:
    """The file name under which a model's library looks for its weights."""
    return "model{suffix}.safetensors" if is_transformers(model) else checkpoint.WEIGHTS


def _shards(folder: Path, plan: Plan, max_shard: str = checkpoint.MAX_SHARD) -> Shards:
    return Shards(folder, plan.outputs, weights_pattern(plan.model), max_shard)


def _note_quality(plan: Plan, entries: dict[int, dict[str, Any]]) -> None:
    """SQNR of every quantized layer into the layer table."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for number, part in enumerate(plan.parts):
        if part.layer is not None:
            parts.setdefault(part.name, []).append(entries[number])
    for report in plan.result.layers:
        if report.name in parts:
            report.weight_sqnr = decibel(parts[report.name])


def _write_config(plan: Plan, shards: Shards) -> None:
    """config.json as the model's library writes it, the index, and the digests."""
    if is_transformers(plan.model):
        plan.model.config.save_pretrained(shards.folder)
        shards.write_index({"total_parameters": plan.model.num_parameters()})
    else:
        plan.model.save_config(shards.folder)
        shards.write_index({})
    checkpoint.read_header(shards.folder / file for file in shards.sizes)  # what was laid out here is what safetensors reads
    checkpoint.record_hashes(shards.folder)


def _copy(source: Path, target: Path) -> None:
    """A file under its final name once it is whole."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_copy = target.with_name(f".{target.name}.copying")
        shutil.copyfile(source, partial_copy)
        partial_copy.replace(target)


@dataclass
class Forecast:
    """What a run will take and leave."""

    input_bytes: int
    output_bytes: int  # of the weight files, headers included, and of what is copied; to the byte
    seconds: float
    peak_bytes: int


def forecast(job: Job) -> Forecast:
    """Sizes from the plan; time from quantizing 4 million random weights here, with as many workers as the run would have."""
    plans, workers = job.plans.values(), torch.get_num_threads()
    copied = sum((job.folder / name).stat().st_size for name in job.copies)
    sample = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = next(iter(plans)).result.recipe.inner.weight
    with one_thread_each(), torch.no_grad():
        start = time.perf_counter()
        pack_rows(sample, spec, "the sample")
        pace = (time.perf_counter() - start) / sample.numel()
        held = ENGINE_BYTES if takes(sample, spec) else WORK_BYTES
    weights = sum(part.values for plan in plans for part in plan.parts if part.layer is not None)
    read = sum(plan.input_bytes for plan in plans) + copied
    written = sum(sum(_shards(plan.folder, plan).sizes.values()) for plan in plans) + copied
    largest = max((part.values for plan in plans for part in plan.parts if part.layer is not None), default=0)
    flying = 2 * workers * 4 * largest  # read ahead, or waiting to be written
    work = weights * pace + (read + written) / PASS_RATE  # shared by the cores; the digests are not
    seconds = max(work / workers, read / DISK_RATE) + written / PASS_RATE
    return Forecast(read, written, seconds, BASE_BYTES + workers * held * largest + flying)
