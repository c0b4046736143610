"""Tables as YAML: a model, how it is sampled and measured, and the runs to compare. `configs/` has ready ones."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.errors import EvaluationError, HalfbyteError, HealError, RecipeError, listed
from halfbyte.evaluate.sampling import Sampling
from halfbyte.heal.verb import read_settings
from halfbyte.presets import get_recipe
from halfbyte.recipe import Recipe
from halfbyte.report.schema import check_mapping

Kind = TypeVar("Kind", "RunConfig", "TableConfig")


@dataclass(frozen=True)
class RunConfig:
    """A row of the table: a recipe applied here, or a folder that holds a quantized pipeline."""

    recipe: str | None = None  # a preset, or a .json or .yaml file
    folder: str | None = None  # what `halfbyte quantize` or `halfbyte heal` wrote
    name: str | None = None  # in the table; the recipe's own by default
    gptq: bool = False  # compensate the rounding errors of the weights
    attention: bool = False  # the products of attention in 8-bit integers
    smooth: float | None = None  # strength of SmoothQuant scaling
    rank: int | None = None  # of the 16-bit branch of inner layers, for recipes that have one
    heal: dict[str, Any] | None = None  # fine-tune afterwards: options of `halfbyte.heal`, such as {steps: 300}
    published: list[dict[str, Any]] = field(default_factory=list)  # {figure, value, source} of the literature

    def chosen(self) -> Recipe:
        """The recipe with its options.

        Raises:
            RecipeError: when there is none.
        """
        recipe = get_recipe(self.recipe or "")
        if self.rank is not None:
            if self.rank < 1 or not recipe.inner.low_rank:
                raise RecipeError(f"rank must be at least 1, of a recipe with a 16-bit branch; got {self.rank} for {recipe.name}")
            recipe = recipe.replace(name=f"{recipe.name}-rank{self.rank}", inner=recipe.inner.replace(low_rank=self.rank))
        recipe = recipe.compensated() if self.gptq else recipe
        recipe = recipe.with_attention() if self.attention else recipe
        return recipe if self.smooth is None else recipe.smoothed(self.smooth)

    @property
    def title(self) -> str:
        if self.name is not None:
            return self.name
        name = Path(self.folder).name if self.folder is not None else self.chosen().name
        return name if self.heal is None else f"{name}+{self.heal.get('method', 'lora')}"


@dataclass(frozen=True)
class TableConfig:
    """A table: what all runs share, and the runs."""

    model: str  # "demo": the embedded one; or a folder, or a name on the Hub
    title: str
    images: int
    steps: int  # of the sampler
    runs: list[RunConfig]
    note: str = ""  # what a reader must know of the protocol
    pipeline: str | None = None  # class of the pipeline that the protocol is for
    seed: int = 0
    batch: int = 32
    sampler: dict[str, Any] = field(default_factory=dict)  # class: a diffusers scheduler; the rest are its options
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline's call, such as guidance_scale
    prompts: str | None = None  # text file, one a line
    calibration_prompts: str | None = None  # others, for recipes that calibrate
    features: str | None = None  # "demo", "inception", "inception:FILE", or an .onnx file
    reference: str | None = None  # real images: a folder or an .npz file; "demo": what the demo model was trained on
    image_size: int | None = None  # real images are cut square and resized to so many pixels
    lpips: str | None = None  # alex, vgg or squeeze
    clip: str | None = None  # a CLIP model, for the CLIP score
    image_reward: bool = False
    calibration: int = 16  # images that recipes calibrate on
    calibration_steps: int = 20
    published: list[dict[str, Any]] = field(default_factory=list)  # of the float model
    shown: list[str] | None = None  # figures in the Markdown table and on the terminal; the page shows all

    def sampling(self, prompts: tuple[str, ...] = ()) -> Sampling:
        return Sampling(self.images, self.steps, self.seed, self.batch, prompts, self.arguments)


def read_config(path: Path) -> TableConfig:
    """The table of a YAML file.

    Raises:
        EvaluationError: when it cannot be read, or a key or a value is not allowed; names it.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvaluationError(f"{path} cannot be read as YAML: {error}") from error
    return parse_config(data, path.name)


def parse_config(data: Any, place: str = "table") -> TableConfig:
    """A table from a plain mapping; errors as `read_config`."""
    if not isinstance(data, dict):
        raise EvaluationError(f"{place} must be a mapping, got {type(data).__name__}")
    runs = data.get("runs", [])
    if not isinstance(runs, list) or not runs:
        raise EvaluationError(f"{place}.runs must be a list of at least one run")
    runs = [{"recipe": run} if isinstance(run, str) else run for run in runs]
    known = [_typed(RunConfig, run, f"{place}.runs[{index}]") for index, run in enumerate(runs)]
    for index, run in enumerate(known):
        if (run.recipe is None) == (run.folder is None):
            raise EvaluationError(f"{place}.runs[{index}] needs a recipe or a folder, one of them")
        if run.recipe is not None:
            run.chosen()
        if run.heal is not None:
            _check_heal(run.heal, f"{place}.runs[{index}].heal")
    titles = [run.title for run in known]
    twice = {title for title in titles if titles.count(title) > 1}
    if twice:
        raise EvaluationError(f"{place} has several runs called {listed(twice)}; give them names")
    return _typed(TableConfig, {**data, "runs": known}, place)


def _check_heal(options: dict[str, Any], place: str) -> None:
    """What the run would be refused for, hours later."""
    shared = set(options) & {"prompts", "arguments", "output", "resume", "progress"}
    if shared:
        raise EvaluationError(f"{place} must not have {listed(shared)}: the table's own prompts and arguments hold")
    given = {"method": "lora", "dfa": "step", **options}
    try:
        read_settings(given.pop("method"), given.pop("dfa"), given)
    except HealError as error:
        raise EvaluationError(f"{place}: {error}") from error


def _typed(kind: type[Kind], data: Any, place: str) -> Kind:
    """A dataclass from a mapping, its keys and types checked; missing keys take their defaults."""
    if not isinstance(data, dict):
        raise EvaluationError(f"{place} must be a mapping, got {type(data).__name__} {data!r}")
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise EvaluationError(f"{place} has no key {listed(unknown)}; its keys are {listed(hints)}")
    given = {name: hint for name, hint in hints.items() if name != "runs" and (name in data or name in _required(kind))}
    try:
        check_mapping(place, data, given)
        for index, one in enumerate(data.get("published", [])):
            check_mapping(f"{place}.published[{index}]", one, {"figure": str, "value": float, "source": str})
    except HalfbyteError as error:
        raise EvaluationError(str(error)) from error
    return kind(**data)


def _required(kind: Any) -> set[str]:
    missing = dataclasses.MISSING
    return {item.name for item in dataclasses.fields(kind) if item.default is missing and item.default_factory is missing}
