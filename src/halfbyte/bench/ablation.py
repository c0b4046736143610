"""Tables of what each part of a method is worth on the demo model: rows that differ in one thing, several seeds, one command.

Every run starts from the float model: quantize, heal, pack, sample. Runs are kept in a file and not made again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from halfbyte import demo
from halfbyte.api import pack_model, quantize
from halfbyte.checkpoint import read_json, write_file
from halfbyte.demo.extractor import frechet_to_real
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import States, float_states, prediction_sqnr, sample_images
from halfbyte.heal.verb import heal
from halfbyte.metrics import psnr
from halfbyte.presets import get_recipe
from halfbyte.recipe import Recipe

COLUMNS = {  # heading -> (entry of a run, digits)
    "Frechet": ("frechet", 2),
    "PSNR dB": ("psnr", 2),
    "SQNR dB": ("sqnr", 2),
    "trained %": ("share", 2),
    "steps": ("steps", 0),
    "s": ("seconds", 0),
}
Run = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    recipe: str | Recipe
    healing: Mapping[str, Any] | None = None  # options of `halfbyte.heal`; None: not healed
    published: str = ""  # what the method's paper reports
    as_long_as: str = ""  # a row above, whose seconds of training this one is given in place of a number of steps


@dataclass(frozen=True)
class Effort:
    """Size of every run."""

    steps: int = 800
    batch: int = 32
    images: int = 512
    sampler_steps: int = 20
    calibrate: int = 16


SMOKE = Effort(steps=4, batch=2, images=4, sampler_steps=2, calibrate=1)


def run_row(row: Row, seed: int, effort: Effort, states: States, reference: Tensor, seconds: float | None = None) -> Run:
    """One row with one seed, from the float model.

    Args:
        seconds: of training, in place of the effort's steps.
    """
    teacher, student = demo.load_pipeline(), demo.load_pipeline()
    calibration = effort.calibrate if get_recipe(row.recipe).needs_calibration else None
    quantize(student, row.recipe, calibration, steps=effort.sampler_steps, seed=seed, simulate=True)
    found: Run = {}
    if row.healing is not None:
        started = time.perf_counter()
        end: dict[str, float] = {"steps": effort.steps} if seconds is None else {"minutes": seconds / 60}
        settings = {"batch": effort.batch, "sampler_steps": effort.sampler_steps, "seed": seed, **end, **row.healing}
        result = heal(student, teacher, **settings)
        found = {"steps": result.log[-1]["step"], "training": result.log[-1]["seconds"], "share": 100 * result.share}
        found |= {"seconds": time.perf_counter() - started, "peak_bytes": result.peak_bytes}
    pack_model(student.unet)
    made = sample_images(student, effort.images, effort.sampler_steps, seed=0)
    found |= {"frechet": frechet_to_real(made), "sqnr": prediction_sqnr(student.unet, states)[0]}
    return {**found, "psnr": float(psnr(reference, made).mean())}


def run_table(
    rows: Mapping[str, Row], seeds: Sequence[int], effort: Effort, output: Path | None = None
) -> dict[str, dict[str, Run]]:
    """Every row with every seed; the same states and the same noise for all.

    Args:
        output: JSON file of the runs, written after each; those that are in it are not made again.
    Returns:
        By row and seed; the float model under "float".
    Raises:
        HalfbyteError: when the file holds runs of another effort.
    """
    kept = _kept(output, effort)
    pipe = demo.load_pipeline()
    states = float_states(pipe, min(16, effort.images), effort.sampler_steps, seed=1)
    reference = sample_images(pipe, effort.images, effort.sampler_steps, seed=0)
    found: dict[str, dict[str, Run]] = {"float": {"0": {"frechet": frechet_to_real(reference)}}, **kept}
    with Progress() as bar:
        task = bar.add_task("", total=len(rows) * len(seeds))
        for seed in map(str, seeds):
            for name, row in rows.items():
                bar.update(task, description=f"{name}, seed {seed}")
                if seed not in found.setdefault(name, {}):
                    seconds = found[row.as_long_as][seed]["training"] if row.as_long_as else None
                    found[name][seed] = run_row(row, int(seed), effort, states, reference, seconds)
                    if output is not None:
                        write_file(output, json.dumps({"settings": vars(effort), "runs": found}, indent=1).encode())
                bar.advance(task)
    return {name: found[name] for name in ("float", *rows)}


def _kept(output: Path | None, effort: Effort) -> dict[str, dict[str, Run]]:
    if output is None or not output.exists():
        return {}
    kept = read_json(output)
    if kept.get("settings") != vars(effort):
        raise HalfbyteError(f"{output} holds runs with {kept.get('settings')}, not {vars(effort)}; give another -o")
    return kept["runs"]  # type: ignore[no-any-return]


def table(title: str, rows: Mapping[str, Row], found: Mapping[str, Mapping[str, Run]]) -> Table:
    """The runs as a table: means, and standard deviations over seeds where there are several."""
    made = Table(title=title)
    for heading in ("row", *COLUMNS, "published"):
        made.add_column(heading, justify="left" if heading == "row" else "right")
    for name, seeds in found.items():
        cells = [_spread([one[key] for one in seeds.values() if key in one], digits) for key, digits in COLUMNS.values()]
        made.add_row(name, *cells, rows[name].published if name in rows else "")
    return made


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main(
    about: str | None, tables: Mapping[str, Mapping[str, Row]], output: str, smoke: Sequence[str]
) -> tuple[Effort, dict[str, dict[str, Run]]]:
    """The command line of a bench: run tables of rows, and print them.

    Args:
        about: its docstring. tables: by title. output: the default file of the runs. smoke: the rows of a tiny run.
    Returns:
        What was asked for, and the runs by row and seed.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Effort()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", choices=[*tables], nargs="+", default=[*tables], help="default: all")
    parser.add_argument("-o", "--output", type=Path, default=Path(output), help=f"figures of every run; default {output}")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of everything, for tests")
    options = parser.parse_args()
    effort = SMOKE if options.smoke else Effort(**{name: getattr(options, name) for name in vars(Effort())})
    seeds = [0] if options.smoke else options.seeds
    title = f"{effort.steps} steps of {effort.batch}, {len(seeds)} seeds, {effort.images} images of {effort.sampler_steps} steps"
    console, every = Console(), dict[str, dict[str, Run]]()
    for name in options.table:
        rows = {key: row for key, row in tables[name].items() if key in smoke or not options.smoke}
        found = run_table(rows, seeds, effort, None if options.smoke else options.output)
        (console if console.is_terminal else Console(width=140)).print(table(f"{name}: {title}", tables[name], found))
        every |= found
    return effort, every
