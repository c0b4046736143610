"""Which layers suffer at 4 bits, and what a budget spent by that gains.

    python bench/sensitivity.py                                             both tables, the demo model, two minutes
    python bench/sensitivity.py --table families demo runs/dit/model -o families.json
    python bench/sensitivity.py --table budgets -o budgets.json

`families` quantizes one family of layers at a time (feed-forward, attention, convolution, time embedding, skip, others): QuEST's
property 2 (arXiv 2402.03666) for models given as folders of float pipelines, or `demo`. The damage is given together, a layer and a
million parameters; beside -o stands a page with bars. `budgets` holds budgets spent by sensitivity against uniform bits of the same
size, by SQNR of the predicted noise and PSNR of images, and predicted against measured times of a step.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from halfbyte import api, demo
from halfbyte.bench import budgets, families
from halfbyte.checkpoint import write_file
from halfbyte.report.bars import write_bars
from halfbyte.terminal import progress

TABLES = ("families", "budgets")


def measure_models(console: Console, names: list[str], images: int, steps: int, output: Path | None) -> None:
    """The table of families, for each model."""
    models = {}
    with progress() as report:
        for name in names:
            pipe = demo.load_pipeline() if name == "demo" else api.load_float(name)
            models[name] = families.measure_families(pipe, images=images, steps=steps, progress=report)
    for name, found in models.items():
        console.print(families.families_table(f"{name}: one family quantized at a time", found))
    if output is None:
        return
    write_file(output, json.dumps(families.families_json(models, {"images": images, "steps": steps}), indent=1).encode())
    width = next(iter(families.WIDTHS))
    damage = {name: [(one.family, one.normalized(width)) for one in found] for name, found in models.items()}
    groups = {
        section: {name: {family: shares[section] for family, shares in found} for name, found in damage.items()}
        for section in next(iter(damage.values()))[0][1]
    }
    lead = f"Energy of the error of the predicted noise over its own, with one family of layers at {width}, by model."
    write_bars(groups, output.with_suffix(".html"), "Which family suffers most", lead, "damage")


def measure_budgets(console: Console, size: budgets.Size, output: Path | None) -> None:
    """The table of budgets."""
    with progress() as report:
        rows, latency = budgets.run(size, report)
    console.print(budgets.budgets_table(rows, latency))
    if output is not None:
        write_file(output, json.dumps(budgets.budgets_json(rows, latency, size), indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], help="of the table of families: demo, or folders of float pipelines")
    parser.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES), help="default: both")
    parser.add_argument("--images", type=int, default=8, help="of the table of families; default 8")
    parser.add_argument("--steps", type=int, default=10, help="sampler steps, likewise; default 10")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the figures; with both tables, their names are added")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of everything, for tests")
    options = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=140)
    for table in options.table:
        output = options.output
        if output is not None and len(options.table) > 1:
            output = output.with_stem(f"{output.stem}-{table}")
        if table == "families":
            images, steps = (1, 1) if options.smoke else (options.images, options.steps)
            measure_models(console, options.models, images, steps, output)
        else:
            measure_budgets(console, budgets.SMOKE if options.smoke else budgets.Size(), output)


if __name__ == "__main__":
    main()
