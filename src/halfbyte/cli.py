"""The `halfbyte` command: a shell over functions, no computation of its own."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    pass

INTERRUPTED = 130  # typer's exit code after Ctrl-C

app = typer.Typer(
    name="halfbyte",
    help="Diffusion models in 4 bits: quantize, sample, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left; yields a function that takes (what is being done, units done, units in all)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    bar: Progress
    with Progress(*columns) as bar:
        task = bar.add_task("loading", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield report


@app.command(epilog="Example:  halfbyte demo --images 512 -o my-demo")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page and its figures.")] = Path("halfbyte-demo"),
    images: Annotated[int, typer.Option(min=2, help="Images sampled by each recipe.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes to run; may be repeated.")] = None,
) -> None:
    """Quantize the embedded model with every method; a table here, a page with pictures in OUTPUT/report.html."""
    from halfbyte import demo as demo_room
    from halfbyte.checkpoint import write_file
    from halfbyte.recipe import get_recipe
    from halfbyte.report import save_results, write_report
    from halfbyte.report.pictures import grid_png

    demo_room.check_extras()
    settings = demo_room.Settings(images, steps, seed, tuple(recipe or demo_room.RECIPES))
    for name in settings.recipes:
        get_recipe(name)
    with progress() as report:
        results, strips = demo_room.run(settings, report)
    output.mkdir(parents=True, exist_ok=True)
    save_results(results, output / "results.json")
    write_report(results, output / "report.html")
    write_file(output / "pictures.png", grid_png(strips, columns=len(strips) // len(results["runs"])))
    _print_runs(results)
    typer.echo(f"\nThe page with the pictures: {(output / 'report.html').resolve()}")


def _print_runs(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['settings']['images']} images, {results['settings']['steps']} steps, same noise for every row")
    for heading in ("recipe", "bits", "size", "SQNR dB", "PSNR dB", "SSIM", "Frechet", "s/image"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for run in results["runs"]:
        table.add_row(
            run["recipe"],
            f"{run['bits']:.2f}",
            f"{run['bytes'] / run['bytes_bf16']:.3f}x",
            "" if run["sqnr"] is None else f"{run['sqnr']:.2f}",
            "" if run["psnr"] is None else f"{run['psnr']['mean']:.2f}",
            "" if run["ssim"] is None else f"{run['ssim']['mean']:.3f}",
            f"{run['frechet']:.2f}",
            f"{run['seconds_per_image']:.3f}",
        )
    Console().print(table)


@app.command(epilog="Examples:  halfbyte quantize my-model -o my-model-4bit    halfbyte quantize my-model -o out --recipe my.yaml")
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline, or a model's name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the quantized pipeline.")],
    recipe: Annotated[str, typer.Option(help="A preset, or a .json or .yaml file.")] = "quartz-w4a4",
    gptq: Annotated[bool, typer.Option("--gptq", help="Compensate rounding errors of the weights (minutes; calibrates).")] = False,
    smooth: Annotated[float | None, typer.Option(min=0, max=1, help="Strength of SmoothQuant scaling (calibrates).")] = None,
    calibrate: Annotated[int, typer.Option(min=1, help="Images to sample where the recipe needs calibration.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, for calibration.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of the calibration.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Print what became of every layer.")] = False,
) -> None:
    """Quantize a pipeline and save it; load it with DiffusionPipeline.from_pretrained after `import halfbyte`."""
    from halfbyte import api
    from halfbyte.conversion import stored_bytes
    from halfbyte.errors import OutputExistsError
    from halfbyte.recipe import get_recipe

    chosen = get_recipe(recipe)
    chosen = chosen.compensated() if gptq else chosen
    chosen = chosen if smooth is None else chosen.smoothed(smooth)
    if output.exists():
        raise OutputExistsError(f"{output} exists already; choose another output folder or remove it first")
    lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()] if prompts else []
    with progress() as report:
        pipe = api.load_float(model)
        result = api.quantize(pipe, chosen, calibrate, prompts=lines, steps=steps, seed=seed, progress=report)
    api.save(pipe, output)
    stored, plain = stored_bytes(result.model)
    if layers:
        typer.echo(result.table())
    kept = sum(layer.spec is None for layer in result.layers)
    typer.echo(
        f"{len(result.layers) - kept} layers quantized, {kept} kept in float; "
        f"{stored / 1e6:.2f} MB instead of {plain / 1e6:.2f} MB in bf16 ({stored / plain:.3f}x). Written to {output}"
    )


@app.command(epilog='Example:  halfbyte sample my-model-4bit -n 16 --steps 20 --prompt "a red bicycle" -o grid.png')
def sample(
    model: Annotated[Path, typer.Argument(help="Folder of a pipeline, quantized or not.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file of the grid.")] = Path("grid.png"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Images.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same images in every batch size.")] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="For text-to-image models; may be repeated.")] = None,
) -> None:
    """Sample a grid of images."""
    from halfbyte import api
    from halfbyte.checkpoint import write_file
    from halfbyte.evaluate import sample_images
    from halfbyte.report.pictures import grid_png

    with progress() as report:
        pipe = api.load(model)
        images = sample_images(pipe, count, steps, seed, prompts=prompt or [], progress=partial(report, "sampling"))
    write_file(output, grid_png(images, columns=max(1, round(count**0.5))))
    typer.echo(f"{count} images in {output}")


@app.command(epilog="Examples:  halfbyte bench    halfbyte bench pipeline --model sd15    halfbyte bench linear --json out.json")
def bench(
    kinds: Annotated[list[str] | None, typer.Argument(help="linear, conv, pipeline; all when none is given.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models of the pipelines; may be repeated. See --list.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny shapes, one call each: does it run.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Only list the models.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the figures there too.")] = None,
) -> None:
    """Time packed layers and whole models on this machine, side by side with what else it could run; random weights."""
    import json

    from rich.console import Console

    from halfbyte.bench.models import SUBJECTS
    from halfbyte.bench.run import KINDS, run, table
    from halfbyte.checkpoint import write_file
    from halfbyte.demo import environment

    if names:
        for name, subject in SUBJECTS.items():
            typer.echo(f"{name:8} {subject.about}{'; only when asked for' if subject.large else ''}")
        return
    with progress() as report:
        rows = run(kinds or KINDS, model or (), smoke, report)
    Console().print(table(rows))
    if json_file:
        results = {"environment": environment(), "rows": rows}
        write_file(json_file, (json.dumps(results, indent=2) + "\n").encode())


@app.command(epilog="Examples:  halfbyte info    halfbyte info my-model-4bit")
def info(model: Annotated[Path | None, typer.Argument(help="Folder of a quantized pipeline or component.")] = None) -> None:
    """Without MODEL: the backend and why. With MODEL: what the checkpoint holds, layer by layer."""
    if model is None:
        from halfbyte.demo import environment

        for key, value in environment().items():
            typer.echo(f"{key:10} {value}")
        return
    from halfbyte.api import describe
    from halfbyte.runtime.cpu import hindrance_of

    recipe, layers = describe(model)
    typer.echo(f"recipe {recipe.name}: {len(layers)} packed layers")
    width = max((len(name) for name in layers), default=0)
    for name, spec in layers.items():
        hindrance = hindrance_of(spec)
        note = f"  (reference backend: {hindrance})" if hindrance else ""
        typer.echo(f"  {name.ljust(width)}  {spec.describe()}{note}")


def main() -> None:
    """Entry point: intended errors and wrong usage end in a sentence, never in a traceback."""
    from halfbyte.errors import HalfbyteError

    try:
        app()
    except HalfbyteError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.secho("stopped; nothing was written", fg="red", err=True)
        raise


if __name__ == "__main__":
    main()
