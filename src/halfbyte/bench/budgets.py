"""What a budget spent by sensitivity gains over uniform bits of the same size, and whether predicted times come true."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from halfbyte import demo
from halfbyte.api import quantize
from halfbyte.bench.latency import DTYPES, measure_latency, step_of
from halfbyte.bench.timing import Effort, medians
from halfbyte.budget import Limit, amount, input_bits, spend, to_recipe
from halfbyte.calibration import Call
from halfbyte.evaluate import States, float_states, prediction_sqnr, sample_images
from halfbyte.latency import Latency
from halfbyte.layers import LayerReport
from halfbyte.metrics import psnr
from halfbyte.presets import get_recipe
from halfbyte.recipe import LayerSpec, Recipe
from halfbyte.sensitivity import LADDER, Sensitivity, measure

UNIFORM = {  # what budgets are held against: one width everywhere, 8 bits at the edges
    "INT4, groups of 64": get_recipe("int4-g64-w4a4"),
    "NVFP4": get_recipe("nvfp4-w4a4"),
    "QuaRTZ": get_recipe("quartz-w4a4"),
    "halfbyte-w4a4": get_recipe("halfbyte-w4a4"),
    "halfbyte-w4a8": get_recipe("halfbyte-w4a8"),
    "6 bits, e2m3": Recipe("e2m3-w6a6", LADDER["w6a6"]),
    "8 bits": get_recipe("int8-w8a8"),
}
TIMES = (0.25, 0.5, 0.75)  # budgets of time: where between the fastest assignment and the float model
DTYPE = "bf16"
TIMING = Effort(rounds=15, least=0.01)
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    study_images: int = 2
    study_steps: int = 5
    images: int = 64
    steps: int = 10
    timing: Effort = TIMING


SMOKE = Size(1, 1, 2, 2, Effort(rounds=1, least=0.0))


@dataclass
class Row:
    """A contestant: bits a weight and an input, quality, and a step of one image in milliseconds."""

    name: str
    bits: float
    input_bits: float
    sqnr: float | None  # of the predicted noise at the float model's states, dB; None: the float model's own
    psnr: float | None  # of its images against the float model's, dB
    predicted: float | None  # None: it has a layer at a width that was not measured
    measured: float | None = None  # None: it is simulated


def run(size: Size, progress: Progress | None = None) -> tuple[list[Row], Latency]:
    """Every uniform recipe, and below it the budget of its bits; then budgets of time; the float model last."""
    pipe = demo.load_pipeline()
    study = measure(pipe, LADDER, size.study_images, size.study_steps, progress=progress)
    latency = measure_latency(pipe, LADDER, DTYPE, rounds=size.timing.rounds, progress=progress)
    judge = Judge(pipe, size, latency, study)
    for name, recipe in UNIFORM.items():
        row = judge.add(name, recipe)
        if recipe.inner != LADDER["w8a8"]:  # which is the most that a budget could give
            limits = [Limit(row.bits, "bits"), Limit(row.input_bits, "activation-bits")]
            judge.spend(f"  budget of {row.bits:.2f} and {row.input_bits:.2f} bits", limits)
        if progress:
            progress("quantizing and sampling", len(judge.rows), 2 * len(UNIFORM) - 1 + len(TIMES))
    fastest = {layer.name: min(latency.widths, key=partial(latency.seconds, layer.name)) for layer in study.layers}
    least = amount(study, fastest, "x", latency)
    for part in TIMES:
        share = least + part * (1 - least)
        judge.spend(f"budget of {share:.2f} of the float model's time", [Limit(share, "x")])
        if progress:
            progress("quantizing and sampling", len(judge.rows), 2 * len(UNIFORM) - 1 + len(TIMES))
    judge.time()
    return judge.rows, latency


class Judge:
    """Quantizes the demo model by recipes, and judges all by the same states, noise and clock."""

    def __init__(self, pipe: Any, size: Size, latency: Latency, study: Sensitivity) -> None:
        self.size, self.latency, self.study = size, latency, study
        self.states: States = float_states(pipe, min(8, size.images), size.steps, seed=1)
        self.reference: Tensor = sample_images(pipe, size.images, size.steps, seed=2)
        model, self.call = step_of(pipe, DTYPES[DTYPE])
        self.rows: list[Row] = []
        self.models: dict[str, nn.Module] = {"float": model}

    def spend(self, name: str, limits: Sequence[Limit]) -> None:
        """Add the recipe of a budget."""
        widths = spend(self.study, limits, self.latency)
        self.add(name, to_recipe(self.study, widths, "budget"))

    def add(self, name: str, recipe: Recipe) -> Row:
        """Add a recipe."""
        student = demo.load_pipeline()
        simulated = recipe.simulated_only() is not None
        reports = quantize(student, recipe, simulate=simulated).layers
        quality = prediction_sqnr(student.unet, self.states)[0]
        made = sample_images(student, self.size.images, self.size.steps, seed=2)
        bits, seen = self._bits(reports)
        row = Row(name, bits, seen, quality, float(psnr(self.reference, made).mean()), self._predicted(reports))
        self.rows.append(row)
        if not simulated:
            self.models[name] = nn.Module.to(student.unet, DTYPES[DTYPE]).to(memory_format=torch.channels_last)
        return row

    def _bits(self, reports: Sequence[LayerReport]) -> tuple[float, float]:
        """Stored bits a weight, and bits an input value by the work it is used in, scales of groups included."""
        sizes = {layer.name: layer for layer in self.study.layers}
        weights, work = (sum(getattr(layer, what) for layer in sizes.values()) for what in ("weights", "operations"))
        stored = sum(sizes[report.name].weights * report.bits for report in reports)
        seen = sum(sizes[report.name].operations * _input_bits(report.spec) for report in reports)
        return stored / weights, seen / work

    def _predicted(self, reports: Sequence[LayerReport]) -> float | None:
        """Milliseconds of a step, where all layers are at measured widths."""
        names = {spec: width for width, spec in LADDER.items() if width in self.latency.widths}
        if any(report.spec is not None and report.spec not in names for report in reports):
            return None
        return 1e3 * self.latency.predict({report.name: names[report.spec] for report in reports if report.spec is not None})

    @torch.inference_mode()
    def time(self) -> None:
        """Measure a step of every model, all taking turns."""
        seconds = medians({name: _bind(model, self.call) for name, model in self.models.items()}, self.size.timing)
        for row in self.rows:
            row.measured = 1e3 * seconds[row.name] if row.name in seconds else None
        self.rows.append(Row("float", 16, 16, None, None, 1e3 * self.latency.total, 1e3 * seconds["float"]))


def _bind(model: nn.Module, call: Call) -> Callable[[], object]:
    return lambda: model(*call.args, **call.kwargs)


def _input_bits(spec: LayerSpec | None) -> float:
    if spec is None or spec.activation is None or not spec.activation.group:
        return input_bits(spec)
    return input_bits(spec) + {"float32": 16, "e4m3": 8, "e8m0": 8}[spec.activation.group_scale] / spec.activation.group


def budgets_table(rows: Sequence[Row], latency: Latency) -> Table:
    """The rows as a table."""
    made = Table(title=f"Budgets against uniform bits, demo model; a step of one image {latency.describe()}")
    for heading in ("row", "bits a weight", "an input", "SQNR dB", "PSNR dB", "predicted ms", "measured ms"):
        made.add_column(heading, justify="left" if heading == "row" else "right")
    for row in rows:
        known = ("" if value is None else f"{value:.2f}" for value in (row.sqnr, row.psnr, row.predicted, row.measured))
        made.add_row(row.name, f"{row.bits:.3f}", f"{row.input_bits:.3f}", *known)
    return made


def budgets_json(rows: Sequence[Row], latency: Latency, size: Size) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "settings": asdict(size),
        "environment": latency.environment,
        "dtype": latency.dtype,
        "rows": [asdict(row) for row in rows],
    }
