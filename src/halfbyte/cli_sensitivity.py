"""The command `sensitivity`. A shell over `sensitivity.py`, `budget.py` and `bench/latency.py`; `cli.py` registers it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli_options import Arguments, Guidance, call_arguments
from halfbyte.terminal import progress

if TYPE_CHECKING:
    from halfbyte.latency import Latency
    from halfbyte.sensitivity import Sensitivity

EXAMPLES = (
    "Examples:  halfbyte sensitivity my-model -o study    halfbyte sensitivity my-model -o study --bits 4.5    "
    "halfbyte sensitivity my-model -o study --budget 12ms    "
    "halfbyte sensitivity my-model -o study --budget 1.9MB --budget 0.8x    "
    "then  halfbyte quantize my-model --recipe study/recipe.yaml -o my-model-4bit"
)


def sensitivity(
    model: Annotated[Path, typer.Argument(help="Folder of a float diffusers pipeline, or a model's name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the figures and the page.")] = Path("sensitivity"),
    images: Annotated[int, typer.Option(min=1, help="Images whose denoiser calls are compared.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    bits: Annotated[float | None, typer.Option(help="Budget: stored bits a weight, on average.")] = None,
    activation_bits: Annotated[float | None, typer.Option(help="Budget: bits an activation, averaged over the work.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Budget with a unit: 1.9MB of stored weights; 12ms a step of one image, as predicted for this machine and number "
            "of threads; 0.8x of the float model's time; 4.5bits is --bits 4.5. May be repeated: all limits are met.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of a step whose time is predicted: bf16 or fp32.")] = "bf16",
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    guidance: Guidance = None,
    argument: Arguments = None,
) -> None:
    """Measure what quantizing each layer alone costs, and spend a budget of bits, bytes or time where it helps most.

    A measurement that is in OUTPUT already is used again, so that budgets can be tried.
    """
    from halfbyte.budget import Limit, spend, to_recipe
    from halfbyte.checkpoint import write_file
    from halfbyte.evidence.tools import read_prompts
    from halfbyte.report.heatmap import write_heatmap

    numbers = {"bits": bits, "activation-bits": activation_bits}
    limits = [Limit(most, unit) for unit, most in numbers.items() if most is not None]
    limits += [Limit.parse(text) for text in budget or ()]
    told = {"prompts": read_prompts(prompts), "arguments": call_arguments(guidance, argument)}
    found = _damages(model, output / "sensitivity.json", images, steps, seed, told)
    latency = _times(model, output / "latency.json", found, dtype, told) if any(limit.timed for limit in limits) else None
    widths = spend(found, limits, latency) if limits else None
    if widths is not None:
        recipe = to_recipe(found, widths, "budget-" + "-".join(map(str, limits)))
        write_file(output / "recipe.yaml", recipe.to_yaml().encode())
    write_heatmap(found, output / "sensitivity.html", widths, latency)
    _print(found, widths, latency)
    typer.echo(f"The page with every layer: {(output / 'sensitivity.html').resolve()}")
    if widths is not None:
        typer.echo(f"The recipe: {(output / 'recipe.yaml').resolve()}")


def _damages(model: Path, file: Path, images: int, steps: int, seed: int, told: dict[str, Any]) -> "Sensitivity":
    """What quantizing each layer costs: as it was measured before, or anew."""
    from halfbyte import api
    from halfbyte.sensitivity import LADDER, Sensitivity, measure

    if file.is_file():
        found = Sensitivity.load(file)
        typer.echo(f"using the measurement in {file}; remove it to measure again")
        return found
    with progress() as report:
        found = measure(api.load_float(model), LADDER, images, steps, seed, progress=report, **told)
    found.save(file)
    return found


def _times(model: Path, file: Path, found: "Sensitivity", dtype: str, told: dict[str, Any]) -> "Latency":
    """The times of the layers: as they were measured before on this machine, or anew."""
    from halfbyte import api
    from halfbyte.bench.latency import known_latency, measure_latency

    known = known_latency(file, found.ladder, dtype)
    if known is not None:
        typer.echo(f"using the times in {file}; remove it to measure again")
        return known
    with progress() as report:
        latency = measure_latency(api.load_float(model), found.ladder, dtype, progress=report, **told)
    latency.save(file)
    return latency


def _print(found: "Sensitivity", widths: dict[str, str] | None, latency: "Latency | None") -> None:
    from rich.console import Console
    from rich.table import Table

    from halfbyte.budget import amount
    from halfbyte.latency import FLOAT
    from halfbyte.report.heatmap import decibel

    table = Table(title="SQNR of the predicted noise, dB, with one family of layers quantized")
    for heading in ("family", "weights", *found.ladder):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family in sorted(found.families, key=lambda one: -one.total(next(iter(found.ladder)))):
        table.add_row(family.name, f"{family.weights:,}", *(f"{decibel(family.total(width)):.1f}" for width in found.ladder))
    Console().print(table)
    if widths is None:
        return
    stored, seen, size = (amount(found, widths, unit) for unit in ("bits", "activation-bits", "MB"))
    numbers = {width: list(widths.values()).count(width) for width in (*found.ladder, FLOAT)}
    counts = ", ".join(f"{number} at {width}" for width, number in numbers.items() if number)
    typer.echo(f"{stored:.2f} bits a weight, {seen:.2f} bits an activation, {size:.2f} MB: {counts}")
    if latency is not None:
        step, share = (amount(found, widths, unit, latency) for unit in ("ms", "x"))
        typer.echo(f"Predicted step of one image: {step:.3g} ms, {share:.2f}x of the float model's {1e3 * latency.total:.3g} ms.")
        uniform = ", ".join(f"{width} {1e3 * latency.uniform(width):.3g} ms" for width in latency.widths)
        typer.echo(f"All layers at one width: {uniform}. Times hold {latency.describe()}.")
