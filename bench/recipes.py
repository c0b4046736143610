"""The search for recipes of our own: what grids, shifts, offsets and compensation are worth, on every trained model at hand.

    python bench/recipes.py                                  all trials, on the demo and on models/*
    python bench/recipes.py --trials w4a8 --images 512 -o trials.json
    python bench/recipes.py --models models/fashion-dit --trials w4a4

`w4a4` and `w4a8` hold what the runtime can execute exactly at no more than 4.25 bits a weight (and 4.25 or 8.25 a value of the
inputs), and the baselines they are judged by; what was chosen, and why, docs/log.md says. SQNR is of the prediction at the float
model's own states; PSNR and the Frechet distance (the demo's features) are of images from the same noise, intervals from
bootstrapping.
Trials that are in the output file already are not made again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from halfbyte.api import quantize
from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import read_json, write_file
from halfbyte.demo.extractor import DemoExtractor, reference
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import float_states, prediction_sqnr
from halfbyte.evaluate.pairs import sample_batch
from halfbyte.evidence.table import load_model
from halfbyte.metrics import psnr
from halfbyte.metrics.intervals import of_frechet, of_mean
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

MODELS = Path(__file__).parents[1] / "models"
BATCH = 64
ARGUMENTS = {
    "DiTPipeline": {"guidance_scale": 2.0}
}  # of the sampler, by pipeline; diffusers' own 4 draws caricatures of small models
OURS, OURS_W4A8 = PRESETS["halfbyte-w4a4"], PRESETS["halfbyte-w4a8"]
WEIGHTS = {
    "e2m1*10": OURS.inner.weight,
    "lzs4*16": WeightSpec("lzs4", max_multiple=16),
    "e2m1*10, absmax": OURS.inner.weight.replace(scale="absmax"),
    "e2m1*10/32": OURS.inner.weight.replace(subgroup=32),
    "e2m1<<3": WeightSpec("e2m1", max_shift=3),
    "lzs4<<4": WeightSpec("lzs4", max_shift=4),
    "e2m1": WeightSpec("e2m1"),
}
INPUTS = {
    "e2m1*10": ActivationSpec("e2m1", max_multiple=10),
    "lzs4*16": ActivationSpec("lzs4", max_multiple=16),
    "e2m1*10/32": ActivationSpec("e2m1", max_multiple=10, subgroup=32),
    "e2m1<<3": ActivationSpec("e2m1", max_shift=3),
    "lzs4<<4": ActivationSpec("lzs4", max_shift=4),
    "e2m1": ActivationSpec("e2m1"),
}
BEHIND = {  # a SiLU or GELU
    "ue1m3*16": ActivationSpec("ue1m3", max_multiple=16, zero_point=True),
    "ue2m2*9": ActivationSpec("ue2m2", max_multiple=9, zero_point=True),
    "ue1m3<<4": ActivationSpec("ue1m3", max_shift=4, zero_point=True),
    "ue2m2<<3": ActivationSpec("ue2m2", max_shift=3, zero_point=True),
    "the same": None,
}


def of_four_bits() -> Iterator[Recipe]:
    """Ours, and what it is with one thing changed: a grid, shifts in place of multiples, one-sided inputs or not, compensation."""
    yield OURS
    w, x, behind = (next(iter(some)) for some in (WEIGHTS, INPUTS, BEHIND))
    for other in [one for one in WEIGHTS if one != w]:
        yield _of(other, x, behind)
    for other in [one for one in INPUTS if one != x]:
        yield _of(w, other, behind)
    for other in [one for one in BEHIND if one != behind]:
        yield _of(w, x, other)
    yield OURS.replace(name="halfbyte-w4a4, 4-bit inputs where the timestep is embedded", overrides=())
    yield from (OURS.compensated(), OURS.adarounded(), OURS.smoothed(0.25), OURS.smoothed(0.5))


def _of(w: str, x: str, behind: str) -> Recipe:
    inner = LayerSpec(WEIGHTS[w], INPUTS[x])
    overrides = tuple(one.replace(spec=one.spec.replace(weight=inner.weight)) for one in OURS.overrides)
    return Recipe(f"{w} x {x}, {behind} behind SiLU", inner, after_silu=BEHIND[behind], overrides=overrides)


def of_eight_bit_inputs() -> Iterator[Recipe]:
    """4-bit weights with 8-bit inputs."""
    yield from (OURS_W4A8, OURS_W4A8.compensated(), OURS_W4A8.adarounded())
    for name, weight in {**WEIGHTS, "e1m2<<4": WeightSpec("e1m2", max_shift=4)}.items():
        plain = Recipe(f"{name} x int8", LayerSpec(weight, ActivationSpec("int8")))
        yield from (plain, plain.compensated())


def of_rank(rank: int) -> Recipe:
    """SVDQuant's branch at another rank: 32 is a quarter to all of the channels of models this small, 1 % of its paper's."""
    whole = PRESETS["svdquant-w4a4"]
    return whole.replace(name=f"svdquant-w4a4, rank {rank}", inner=whole.inner.replace(low_rank=rank))


TRIALS: dict[str, list[Recipe]] = {
    "w4a4": [
        *(
            PRESETS[name]
            for name in ("nvfp4-w4a4", "mxfp4-w4a4", "int4-g64-w4a4", "quartz-w4a4", "msfp-w4a4", "quest-w4a4", "qdiffusion-w4a4")
        ),
        *(of_rank(rank) for rank in (1, 2, 4, 32)),
        *of_four_bits(),
    ],
    "w4a8": [*(PRESETS[name] for name in ("quartz-w4a8", "quest-w4a8", "qdiffusion-w4a8")), *of_eight_bit_inputs()],
}


class Trials:
    """Trials on one model, from the same noise."""

    def __init__(self, model: str, images: int, steps: int, calibration: int) -> None:
        self.model, self.images, self.steps, self.calibration = model, images, steps, calibration
        self.extractor, self.real = DemoExtractor(), reference().statistics
        pipe = load_model(model)
        self.arguments = ARGUMENTS.get(type(pipe).__name__, {})
        self.states = float_states(pipe, min(16, images), steps, seed=1, arguments=self.arguments)
        self.exact = self.sample(pipe)

    def sample(self, pipe: Any) -> Tensor:
        """Images (N, C, H, W), each from a noise of its own."""
        pipe.set_progress_bar_config(disable=True)
        parts = [range(start, min(self.images, start + BATCH)) for start in range(0, self.images, BATCH)]
        return torch.cat([sample_batch(pipe, part, self.images, self.steps, arguments=self.arguments) for part in parts])

    def measure(self, recipe: Recipe | None) -> dict[str, Any]:
        """Figures of a recipe, or of the float model."""
        images, found = self.exact, {}
        if recipe is not None:
            pipe = load_model(self.model)
            quantize(
                pipe,
                recipe,
                self.calibration if recipe.needs_calibration else None,
                steps=self.steps,
                simulate=recipe.simulated_only() is not None,
            )
            found = {"sqnr": prediction_sqnr(find_denoiser(pipe), self.states)[0]}
            images = self.sample(pipe)
            found["psnr"] = of_mean(psnr(self.exact, images)).to_dict()
        return {**found, "frechet": of_frechet(self.extractor.extract(images).pooled, self.real).to_dict()}


def table(model: str, runs: dict[str, dict[str, Any]]) -> Table:
    made = Table(title=model)
    for heading in ("recipe", "SQNR dB", "PSNR dB", "Frechet", "95 %"):
        made.add_column(heading, justify="left" if heading == "recipe" else "right")
    for name, run in runs.items():
        distance = run["frechet"]
        cells = [f"{run['sqnr']:.1f}", f"{run['psnr']['value']:.1f}"] if "sqnr" in run else ["", ""]
        made.add_row(name, *cells, f"{distance['value']:.2f}", f"{distance['low']:.2f} to {distance['high']:.2f}")
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["demo", *(str(path.parent) for path in sorted(MODELS.glob("*/model_index.json")))]
    parser.add_argument("--models", nargs="+", default=known, help="demo, or folders of pipelines; default: all at hand")
    parser.add_argument("--trials", choices=[*TRIALS], nargs="+", default=[*TRIALS], help="default: all")
    parser.add_argument("--images", type=int, default=256, help="default 256")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler; default 10")
    parser.add_argument("--calibration", type=int, default=16, help="images that recipes calibrate on; default 16")
    parser.add_argument("-o", "--output", type=Path, default=Path("recipes.json"), help="figures; default recipes.json")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, for tests")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.images, options.steps, options.calibration = ["demo"], 2, 2, 1
    return options


def kept_runs(file: Path, settings: dict[str, int]) -> dict[str, Any]:
    """What the output file holds already."""
    if not file.exists():
        return {"settings": settings, "runs": {}}
    kept: dict[str, Any] = read_json(file)
    if kept.get("settings") != settings:
        raise HalfbyteError(f"{file} holds trials with {kept.get('settings')}, not {settings}; give another -o")
    return kept


def main() -> None:
    options, console = arguments(), Console()
    settings = {"images": options.images, "steps": options.steps, "calibration": options.calibration}
    kept = {"settings": settings, "runs": {}} if options.smoke else kept_runs(options.output, settings)
    recipes = [None, *(recipe for name in options.trials for recipe in (TRIALS[name][-1:] if options.smoke else TRIALS[name]))]
    with Progress(console=console) as bar:
        task = bar.add_task("", total=len(options.models) * len(recipes))
        for model in options.models:
            runs, trials = kept["runs"].setdefault(Path(model).name, {}), None
            for recipe in recipes:
                name = "float" if recipe is None else recipe.name
                bar.update(task, description=f"{Path(model).name}: {name}")
                if name not in runs:
                    trials = trials or Trials(model, **settings)
                    runs[name] = trials.measure(recipe)
                    if not options.smoke:
                        write_file(options.output, json.dumps(kept, indent=1).encode())
                bar.advance(task)
    for model in options.models:
        runs = kept["runs"][Path(model).name]
        shown = {name: runs[name] for name in ("float" if recipe is None else recipe.name for recipe in recipes)}
        (console if console.is_terminal else Console(width=140)).print(table(Path(model).name, shown))


if __name__ == "__main__":
    main()
