"""A table of runs: every recipe applied to one float pipeline, sampled from the same noise, measured with the same tools.

What is done is kept in OUTPUT/runs, a folder a run, under a fingerprint of all that it depends on: the weights, the recipe, the
sampling, the tools and halfbyte's own numerics. A run that is there already is not made again, in whichever table it stands.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte import __version__, api
from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import CONFIG, read_json, write_file
from halfbyte.conversion import Result, quantizable_layers
from halfbyte.demo import environment, load_pipeline
from halfbyte.errors import EvaluationError
from halfbyte.evidence.config import RunConfig, TableConfig
from halfbyte.evidence.evaluation import Evaluation
from halfbyte.evidence.session import Session
from halfbyte.evidence.tools import DEMO, find_tools, read_prompts
from halfbyte.heal.student import denoiser_name
from halfbyte.heal.verb import heal
from halfbyte.layers import LayerReport
from halfbyte.recipe import Recipe
from halfbyte.report.schema import SCHEMA, Results, check_results
from halfbyte.runs import digest

ROW = "run.json"
MEASURING = ("torchmetrics", "torch-fidelity", "torchvision", "onnxruntime", "transformers", "pillow")
# what no figure depends on
SHELL = ("bench", "cli.py", "report", "evidence", "terminal.py", "cli_evidence.py", "cli_options.py", "cli_sensitivity.py")


class Table:
    """The table of a configuration.

    Args:
        output: folder; its `runs` keeps what was done.
        pipe: the float pipeline; None: the one the configuration names.
    Raises:
        EvaluationError: when the pipeline is of another class than the configuration is for.
    """

    def __init__(self, config: TableConfig, output: Path, session: Session, pipe: Any = None, trust_code: bool = False) -> None:
        self.config, self.session, self.folder = config, session, output / "runs"
        own = config
        self.tools = find_tools(own.features, own.lpips, own.clip, own.image_reward, trust_code)
        self.prompts = read_prompts(Path(own.prompts) if own.prompts else None)
        self.calibration_prompts = read_prompts(Path(own.calibration_prompts) if own.calibration_prompts else None)
        if self.prompts and not self.calibration_prompts and any(_calibrates(run) for run in own.runs):
            raise EvaluationError("recipes that calibrate need calibration_prompts: others than those they are judged by")
        self.pipe = session.place(prepared(pipe or load_model(own.model), own))
        self.shared = {
            "version": __version__,
            "numerics": numerics_digest(),
            "model": digest(find_denoiser(self.pipe)),
            "scheduler": plain(self.pipe.scheduler),
            "sampling": own.sampling(self.prompts).identity(),
            "tools": self.tools.identity(),
            "reference": [own.reference, own.image_size],
        }
        self.folders = [self._folder("float", {}), *(self._folder(run.title, self._identity(run)) for run in own.runs)]

    def run(self) -> Results:
        """All runs; those that are kept already are read."""
        config = self.config
        base = self.folders[0]
        evaluation = Evaluation(self.pipe, base, config.sampling(self.prompts), self.tools, self.session)
        self._add_reference(evaluation)
        rows = [self._kept(base, lambda: evaluation.float_run()) | {"published": config.published}]
        for run, folder in zip(config.runs, self.folders[1:], strict=True):
            rows.append(self._row(evaluation, run, folder) | {"published": run.published})
        return results_of(config.title, config.note, evaluation, rows, config.shown)

    def _add_reference(self, evaluation: Evaluation) -> None:
        if self.config.reference == DEMO:
            from halfbyte.demo.extractor import reference

            evaluation.reference = reference()
        elif self.config.reference is not None:
            evaluation.add_reference(Path(self.config.reference), self.config.image_size)

    def _row(self, evaluation: Evaluation, run: RunConfig, folder: Path) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            if not evaluation.original:
                evaluation.float_run()
            student, recipe, layers = self._student(run)
            return evaluation.run(run.title, student, folder, recipe, layers)

        return self._kept(folder, make)

    def _kept(self, folder: Path, make: Any) -> dict[str, Any]:
        """A run from its folder, or made and put there."""
        file = folder / ROW
        if not file.exists():
            row = make()
            if self.session.main:
                write_file(file, json.dumps(row).encode())
        self.session.wait()
        return read_json(file)

    def _identity(self, run: RunConfig) -> dict[str, Any]:
        if run.folder is not None:
            return {"folder": [read_json(file) for file in sorted(Path(run.folder).glob(f"*/{CONFIG}"))]}
        own = self.config
        return {
            "recipe": run.chosen().to_dict(),
            "calibration": [own.calibration, own.calibration_steps, self.calibration_prompts],
            "heal": run.heal,
        }

    def _folder(self, name: str, identity: dict[str, Any]) -> Path:
        text = json.dumps({**self.shared, **identity}, sort_keys=True)
        safe = "".join(letter if letter.isalnum() or letter in "-+.@" else "_" for letter in name)
        return self.folder / f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _student(self, run: RunConfig) -> tuple[Any, Recipe, list[LayerReport]]:
        """A quantized copy of the pipeline, packed where its recipe allows."""
        if run.folder is not None:
            student = self.session.place(prepared(api.load(run.folder), self.config))
            recipe, layers = described(run.folder, self.pipe, student)
            return student, recipe, layers
        student = copied(self.pipe)
        recipe = run.chosen()
        simulate = run.heal is not None or recipe.simulated_only() is not None
        calibration = self.config.calibration if recipe.needs_calibration else None
        stage = self.session.report
        result: Result = api.quantize(
            student,
            recipe,
            calibration,
            simulate=simulate,
            prompts=self.calibration_prompts,
            arguments=self.config.arguments,
            steps=self.config.calibration_steps,
            seed=self.config.seed + 2,
            progress=stage,
        )
        if run.heal is not None:
            options: Any = run.heal
            own = self.config
            heal(student, self.pipe, prompts=self.calibration_prompts, arguments=own.arguments, progress=stage, **options)
            if recipe.simulated_only() is None:
                api.pack_model(find_denoiser(student), recipe)
        return student, recipe, result.layers


def _calibrates(run: RunConfig) -> bool:
    return run.recipe is not None and (run.heal is not None or run.chosen().needs_calibration)


def copied(pipe: Any) -> Any:
    """A pipeline with a denoiser of its own, and everything else shared."""
    made, name = copy.copy(pipe), denoiser_name(pipe)
    made.register_modules(**{name: copy.deepcopy(getattr(pipe, name))})
    return made


def load_model(name: str) -> Any:
    """The float pipeline of a configuration."""
    return load_pipeline() if name == DEMO else api.load_float(name)


def prepared(pipe: Any, config: TableConfig) -> Any:
    """The pipeline with the sampler of the configuration.

    Raises:
        EvaluationError: when it is of another class, or there is no such sampler.
    """
    kind = type(pipe).__name__
    if config.pipeline not in (None, kind):
        raise EvaluationError(f"this table is for a {config.pipeline}, the model is a {kind}; use the table of its family")
    if config.sampler:
        import diffusers

        options = dict(config.sampler)
        name = str(options.pop("class", type(pipe.scheduler).__name__))
        sampler = getattr(diffusers, name, None)
        if not hasattr(sampler, "from_config"):
            raise EvaluationError(f"diffusers has no sampler {name!r}; give one of its schedulers, such as DDIMScheduler")
        pipe.scheduler = sampler.from_config(pipe.scheduler.config, **options)  # type: ignore[union-attr]
    return pipe


def described(folder: Any, float_pipe: Any, pipe: Any) -> tuple[Recipe, list[LayerReport]]:
    """Recipe and layers of a saved pipeline, as far as its files tell."""
    recipe, specs = api.describe(folder)
    prefix = f"{denoiser_name(pipe)}."
    known = {name.removeprefix(prefix): spec for name, spec in specs.items()}
    layers = []
    for name, layer in quantizable_layers(find_denoiser(float_pipe)).items():
        spec, shape = known.get(name), tuple(layer.weight.shape)
        layers.append(LayerReport(name, type(layer).__name__, shape, spec, "in float" if spec is None else "as saved"))
    return recipe, layers


def results_of(
    title: str, note: str, evaluation: Evaluation, rows: list[dict[str, Any]], shown: list[str] | None = None
) -> Results:
    """Rows as results.

    Args:
        shown: figures of short tables; None: all.
    """
    made = {
        "schema": SCHEMA,
        "model": title,
        "note": note,
        "shown": shown,
        "created": date.today().isoformat(),
        "environment": environment() | measuring_versions(),
        "settings": evaluation.settings(),
        "runs": rows,
    }
    return check_results(made)


def measuring_versions() -> dict[str, str]:
    """Versions of what figures are taken with, as far as it is installed."""
    found = {}
    for name in MEASURING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def numerics_digest() -> str:
    """SHA-256 of the source that figures depend on."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in SHELL:
            found.update(file.read_bytes())
    return found.hexdigest()


def plain(scheduler: Any) -> dict[str, str]:
    """The settings of a sampler, for fingerprints."""
    config = {"class": type(scheduler).__name__, **scheduler.config}
    return {key: repr(value) for key, value in sorted(config.items()) if not key.startswith("_")}
