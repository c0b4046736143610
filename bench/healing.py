"""The ablation of MSFP's paper on the demo model: signed FP4 and one LoRA, then mixed signs, TALoRA and DFA, one after the other.

    python bench/healing.py                              four rows, three seeds, the same number of steps each
    python bench/healing.py --steps 1500 --seeds 0 1 -o healing.json

Rows of the published table, Frechet (Inception) distance on a data set it does not name: 16.02, 9.60, 8.39, 7.69. Here: the demo's
own features, 512 images from the same noise for every row, and the SQNR of the predicted noise at the float model's own states.
Runs that are in the output file already are not made again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import halfbyte as hb
from halfbyte import demo
from halfbyte.checkpoint import write_file
from halfbyte.evaluate import States, float_states, prediction_sqnr, sample_images
from halfbyte.metrics import psnr, spread

ROWS = {  # name -> recipe, options of halfbyte.heal (None: not healed), published FID
    "signed FP4, not healed": ("msfp-signed-w4a4", None, None),
    "mixed signs, not healed": ("msfp-w4a4", None, None),
    "signed FP4 + one LoRA": ("msfp-signed-w4a4", {"method": "lora", "dfa": "off"}, 16.02),
    "+ mixed signs": ("msfp-w4a4", {"method": "lora", "dfa": "off"}, 9.60),
    "+ TALoRA": ("msfp-w4a4", {"method": "talora", "dfa": "off"}, 8.39),
    "+ DFA": ("msfp-w4a4", {"method": "talora", "dfa": "auto"}, 7.69),
}


def measure(pipe, states: States, images: int, steps: int, reference: torch.Tensor | None) -> dict[str, float]:
    """Frechet distance, PSNR against the float images and SQNR of a pipeline."""
    made = sample_images(pipe, images, steps, seed=0)
    found = {"frechet": demo.frechet_to_real(made), "sqnr": prediction_sqnr(pipe.unet, states)[0]}
    if reference is not None:
        found["psnr"] = spread(psnr(reference, made))["mean"]
    return found


def run(name: str, seed: int, options: argparse.Namespace, states: States, reference: torch.Tensor) -> dict[str, float]:
    """One row with one seed, from the float model."""
    recipe, healing, _ = ROWS[name]
    teacher, student = demo.load_pipeline(), demo.load_pipeline()
    hb.quantize(student, recipe, options.calibrate, steps=options.sampler_steps, seed=seed, simulate=True)
    seconds = 0.0
    if healing is not None:
        started = time.perf_counter()
        hb.heal(student, teacher, steps=options.steps, batch=options.batch, seed=seed, **healing)
        seconds = time.perf_counter() - started
    hb.pack(student.unet)
    return {**measure(student, states, options.images, options.sampler_steps, reference), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of every run (default 800)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="sampled by every row (default 512)")
    parser.add_argument("--sampler-steps", type=int, default=20, help="of calibration and sampling (default 20)")
    parser.add_argument("--calibrate", type=int, default=16, help="images the calibration samples (default 16)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("healing.json"), help="figures of every run; kept runs are reused"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny run of everything, for tests")
    options = parser.parse_args()
    rows = list(ROWS)
    if options.smoke:
        rows = ["mixed signs, not healed", "+ DFA"]
        options.steps, options.batch, options.seeds, options.images = 2, 2, [0], 8
        options.sampler_steps, options.calibrate, options.output = 2, 1, None
    settings = {key: getattr(options, key) for key in ("steps", "batch", "images", "sampler_steps", "calibrate")}
    kept = json.loads(options.output.read_text()) if options.output and options.output.exists() else {"settings": settings}
    if kept["settings"] != settings:
        raise SystemExit(f"{options.output} holds runs with {kept['settings']}, not {settings}; give another -o")
    pipe = demo.load_pipeline()
    states = float_states(pipe, 16, options.sampler_steps, seed=1)
    reference = sample_images(pipe, options.images, options.sampler_steps, seed=0)
    found = {"float": {"0": {"frechet": demo.frechet_to_real(reference)}}, **kept.get("runs", {})}
    with Progress() as bar:
        task = bar.add_task("", total=len(rows) * len(options.seeds))
        for seed in options.seeds:
            for name in rows:
                bar.update(task, description=f"{name}, seed {seed}")
                if str(seed) not in found.setdefault(name, {}):
                    found[name][str(seed)] = run(name, seed, options, states, reference)
                    if options.output:
                        write_file(options.output, json.dumps({"settings": settings, "runs": found}, indent=1).encode())
                bar.advance(task)
    show(found, options)


def show(found: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.steps} steps of {options.batch}, {len(options.seeds)} seeds, {options.images} images")
    for heading in ("row", "Frechet", "PSNR dB", "SQNR dB", "s", "published"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for name, seeds in found.items():
        runs = list(seeds.values())
        cells = [_spread([one[key] for one in runs if key in one]) for key in ("frechet", "psnr", "sqnr", "seconds")]
        table.add_row(name, *cells, str(ROWS[name][2] or "") if name in ROWS else "")
    Console().print(table)


def _spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
