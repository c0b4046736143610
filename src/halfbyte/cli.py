"""The `halfbyte` command: a shell over functions, no computation of its own."""

import math
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte import cli_evidence, cli_sensitivity
from halfbyte.cli_options import Arguments, Guidance, call_arguments
from halfbyte.terminal import progress

INTERRUPTED = 130  # typer's exit code after Ctrl-C

app = typer.Typer(
    name="halfbyte",
    help="Diffusion models in 4 bits: quantize, sample, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog="Example:  halfbyte demo --images 512 -o my-demo")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page and its figures.")] = Path("halfbyte-demo"),
    images: Annotated[int, typer.Option(min=2, help="Images sampled by each recipe.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes to run; may be repeated.")] = None,
) -> None:
    """Quantize the embedded model with every method; a table here, a page with pictures in OUTPUT/report.html."""
    from halfbyte.evidence.demo import run_demo

    with progress() as report:
        results = run_demo(output, images, steps, seed, tuple(recipe or ()), report)
    if results is not None:
        cli_evidence.print_results(results)
        typer.echo(f"\nThe page with the pictures: {(output / 'report.html').resolve()}")


def _lines(file: Path | None) -> list[str]:
    """The lines of a text file that are not empty."""
    from halfbyte.errors import HalfbyteError

    if file is None:
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise HalfbyteError(f"{file} cannot be read as a list of prompts: {error}") from error


app.command(name="eval", epilog=cli_evidence.EVAL_EXAMPLES)(cli_evidence.evaluate)
app.command(epilog=cli_evidence.TABLE_EXAMPLES)(cli_evidence.table)
app.command(epilog=cli_evidence.REPORT_EXAMPLES)(cli_evidence.report)


@app.command(
    epilog="Examples:  halfbyte quantize my-model -o my-model-4bit    halfbyte quantize my-model -o out --recipe quartz-w4a8 "
    "--text-encoders quartz-w4a8    halfbyte quantize my-model -o out --dry-run"
)
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a pipeline or component, a .safetensors file, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the quantized model.")],
    recipe: Annotated[str, typer.Option(help="A preset, or a .json or .yaml file.")] = "halfbyte-w4a4",
    text_encoders: Annotated[str | None, typer.Option(help="A recipe for the text encoders too, such as quartz-w4a8.")] = None,
    vae: Annotated[str | None, typer.Option(help="A recipe for the autoencoder too, such as int8-w8a8.")] = None,
    gptq: Annotated[bool, typer.Option("--gptq", help="Compensate rounding errors of the weights (minutes; calibrates).")] = False,
    adaround: Annotated[
        bool, typer.Option("--adaround", help="Optimize for every weight whether it is rounded up or down (minutes; calibrates).")
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Multiply queries, keys and values in 8-bit integers too: faster on CPUs.")
    ] = False,
    smooth: Annotated[float | None, typer.Option(min=0, max=1, help="Strength of SmoothQuant scaling (calibrates).")] = None,
    calibrate: Annotated[int, typer.Option(min=1, help="Images to sample where the recipe needs calibration.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, for calibration.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of the calibration.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    guidance: Guidance = None,
    argument: Arguments = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print what became of every layer.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would happen: layers, sizes, time, memory.")] = False,
    config: Annotated[Path | None, typer.Option(help="For a .safetensors file: a diffusers folder of its architecture.")] = None,
) -> None:
    """Quantize a model and save it; load it with DiffusionPipeline.from_pretrained after `import halfbyte`.

    Recipes that need no calibration read and write folders a few rows at a time: models larger than memory are no matter.
    """
    from halfbyte.errors import HalfbyteError, OutputExistsError, RecipeError, UnstreamableError
    from halfbyte.presets import get_recipe

    chosen = get_recipe(recipe)
    if gptq and adaround:
        raise RecipeError("--gptq and --adaround are two ways to round the same weights; choose one")
    chosen = chosen.compensated() if gptq else chosen.adarounded() if adaround else chosen
    chosen = chosen if smooth is None else chosen.smoothed(smooth)
    chosen = chosen.with_attention() if attention else chosen
    if output.exists():
        raise OutputExistsError(f"{output} exists already; choose another output folder or remove it first")
    only_streaming = resume or dry_run or text_encoders or vae
    if not chosen.needs_calibration and model.is_dir():
        try:
            _quantize_streaming(model, output, chosen, {"encoders": text_encoders, "vae": vae}, resume, dry_run, layers)
            return
        except UnstreamableError as reason:
            if only_streaming:
                raise
            typer.echo(f"{reason}; quantizing in memory")
    elif only_streaming:
        option = "--resume" if resume else "--dry-run" if dry_run else "--text-encoders" if text_encoders else "--vae"
        why = f"recipe {chosen.name!r} calibrates" if chosen.needs_calibration else f"{model} is not a folder"
        raise HalfbyteError(f"{option} is for folders and recipes that need no calibration; {why}")
    told = {"prompts": _lines(prompts), "arguments": call_arguments(guidance, argument)}
    _quantize_in_memory(model, output, chosen, config, calibrate, told, steps, seed, layers)


def _quantize_streaming(
    model: Path, output: Path, recipe: Any, others: dict[str, Any], resume: bool, dry_run: bool, layers: bool
) -> None:
    from halfbyte.errors import StoppedError
    from halfbyte.report.card import write_card
    from halfbyte.streaming.verb import forecast, prepare, quantize_folder

    if dry_run:
        job = prepare(model, recipe, **others)
        seen = forecast(job)
        _print_tables(job)
        for name, why in job.skipped.items():
            typer.echo(f"left behind  {name}: {why}")
        typer.echo(
            f"{seen.input_bytes / 1e9:.2f} GB in, {seen.output_bytes / 1e9:.2f} GB out, about {seen.seconds:.0f} s and "
            f"{seen.peak_bytes / 1e9:.1f} GB of memory here. Nothing was written."
        )
        return
    try:
        with progress() as report:
            job = quantize_folder(model, output, recipe, **others, resume=resume, progress=report)
    except KeyboardInterrupt:
        raise StoppedError("stopped; the same command with --resume continues", signal.SIGINT) from None
    if layers:
        _print_tables(job)
    rows = [row for result in job.results.values() for row in result.layers]
    kept = sum(row.spec is None for row in rows)
    weights = [(math.prod(row.shape), row.bits) for row in rows if row.spec is not None]
    write_card(output, str(model), recipe, rows, round(sum(n * bits for n, bits in weights) / 8), sum(2 * n for n, _ in weights))
    stored, plain = (sum(getattr(plan, name) for plan in job.plans.values()) for name in ("output_bytes", "input_bytes"))
    typer.echo(
        f"{len(rows) - kept} layers quantized, {kept} kept in float; {stored / 1e6:.2f} MB instead of {plain / 1e6:.2f} MB "
        f"({stored / plain:.3f}x). Written to {output}"
    )


def _print_tables(job: Any) -> None:
    for name, result in job.results.items():
        typer.echo(f"{name or job.folder}\n{result.table()}\n")


def _quantize_in_memory(
    model: Path,
    output: Path,
    recipe: Any,
    config: Path | None,
    calibrate: int,
    told: dict[str, Any],
    steps: int,
    seed: int,
    layers: bool,
) -> None:
    from halfbyte import api
    from halfbyte.conversion import stored_bytes
    from halfbyte.report.card import write_card

    with progress() as report:
        pipe = api.load_float(model, config)
        result = api.quantize(pipe, recipe, calibrate, **told, steps=steps, seed=seed, progress=report)
    api.save(pipe, output)
    stored, plain = stored_bytes(result.model)
    write_card(output, str(model), result.recipe, result.layers, stored, plain)
    if layers:
        typer.echo(result.table())
    kept = sum(layer.spec is None for layer in result.layers)
    typer.echo(
        f"{len(result.layers) - kept} layers quantized, {kept} kept in float; "
        f"{stored / 1e6:.2f} MB instead of {plain / 1e6:.2f} MB in bf16 ({stored / plain:.3f}x). Written to {output}"
    )


app.command(epilog=cli_sensitivity.EXAMPLES)(cli_sensitivity.sensitivity)


@app.command(
    epilog="Examples:  halfbyte heal my-model-4bit --teacher my-model -o my-model-healed --minutes 15    "
    "halfbyte heal my-model-4bit --teacher my-model -o my-model-healed --method quest --share 0.05    "
    "On several devices:  accelerate launch -m halfbyte.cli heal ..."
)
def heal(
    model: Annotated[Path, typer.Argument(help="Folder that `halfbyte quantize` wrote.")],
    teacher: Annotated[Path, typer.Option(help="The float model it was made from: a folder, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the healed pipeline.")],
    method: Annotated[
        str,
        typer.Option(
            help="lora: one a layer; talora: several, chosen by timestep (each adds the size of the weights); quest: few layers, "
            "and input scales."
        ),
    ] = "lora",
    minutes: Annotated[float | None, typer.Option(help="End after this much training.  \\[default: 15, without --steps]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after these optimizer steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped, with the same options.")] = False,
    loras: Annotated[int | None, typer.Option(min=1, max=255, help="talora: LoRAs a layer.  \\[default: 2]")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="talora, lora: rank of each LoRA.  \\[default: 16]")] = None,
    routing: Annotated[
        str | None, typer.Option(help="talora: router: learned; split: equal parts of the timesteps.  \\[default: router]")
    ] = None,
    dfa: Annotated[
        str,
        typer.Option(
            help="What an error counts: its square in the next sample: step; a factor: auto, ddpm, ddim, flow; just itself: off."
        ),
    ] = "step",
    stages: Annotated[
        list[str] | None, typer.Option(help="quest: temporal, critical or full; may be repeated.  \\[default: temporal, critical]")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="quest: most of the parameters that may be trained.  \\[default: 0.07]")
    ] = None,
    local_weight: Annotated[float | None, typer.Option(help="quest: of the trained layers' errors.  \\[default: 0.2]")] = None,
    global_weight: Annotated[float | None, typer.Option(help="quest: of the prediction's error.  \\[default: 2]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of an optimizer step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts that a process takes its share in, to save memory.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak, in quantization steps.  \\[default: 0.02; quest: 0.05]")
    ] = None,
    sampler_steps: Annotated[
        int, typer.Option(min=1, help="Of the teacher's trajectories; best as many as you will sample with.")
    ] = 20,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bf16 where that is safe.")] = False,
    ema: Annotated[float | None, typer.Option(help="Decay of averaged weights, such as 0.999.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Recompute activations: less memory, more time.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, for text-to-image models.")] = None,
    guidance: Guidance = None,
    argument: Arguments = None,
    seed: Annotated[int, typer.Option(help="Seed of noise, batches and LoRAs.")] = 0,
) -> None:
    """Win back quality by a short fine-tune against the float model; no data needed."""
    from halfbyte.heal.command import heal_folder

    own: dict[str, object] = {"loras": loras, "rank": rank, "routing": routing, "stages": stages}
    own |= {"share": share, "local_weight": local_weight, "global_weight": global_weight, "learning_rate": learning_rate}
    with progress() as report:
        summary = heal_folder(
            model,
            teacher,
            output,
            prompts=_lines(prompts),
            arguments=call_arguments(guidance, argument),
            progress=report,
            method=method,
            minutes=15.0 if minutes is None and steps is None else minutes,
            steps=steps,
            resume=resume,
            dfa=dfa,
            batch=batch,
            accumulate=accumulate,
            sampler_steps=sampler_steps,
            bf16=bf16,
            ema=ema,
            recompute=recompute,
            seed=seed,
            **{name: value for name, value in own.items() if value is not None},  # those of another method are refused
        )
    if summary:
        typer.echo(summary)
        _write_healing_page(output)


def _write_healing_page(output: Path) -> None:
    from halfbyte.checkpoint import read_json
    from halfbyte.errors import MissingExtraError
    from halfbyte.heal.command import RESULTS_FILE, run_folder
    from halfbyte.report.healing import write_healing_report

    page = run_folder(output) / "report.html"
    try:
        write_healing_report(read_json(page.with_name(RESULTS_FILE)), page, output.name)
        typer.echo(f"The page with the pictures: {page.resolve()}")
    except MissingExtraError as missing:
        typer.echo(f"No page with pictures: {missing}")


@app.command(
    epilog='Examples:  halfbyte sample my-model-4bit -n 16 --steps 20 --prompt "a red bicycle" -o grid.png    '
    "halfbyte sample my-turbo-4bit --steps 1 --guidance 0 --argument height=512 --argument width=512"
)
def sample(
    model: Annotated[Path, typer.Argument(help="Folder of a pipeline, quantized or not.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file of the grid.")] = Path("grid.png"),
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Images.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same images in every batch size.")] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="For text-to-image models; may be repeated.")] = None,
    guidance: Guidance = None,
    argument: Arguments = None,
) -> None:
    """Sample a grid of images."""
    from halfbyte import api
    from halfbyte.checkpoint import write_file
    from halfbyte.evaluate import sample_images
    from halfbyte.report.pictures import grid_png

    with progress() as report:
        pipe = api.load(model)
        stage, arguments = partial(report, "sampling"), call_arguments(guidance, argument)
        images = sample_images(pipe, count, steps, seed, prompts=prompt or [], progress=stage, arguments=arguments)
    write_file(output, grid_png(images, columns=max(1, round(count**0.5))))
    typer.echo(f"{count} images in {output}")


@app.command(epilog="Examples:  halfbyte bench    halfbyte bench pipeline --model sd15    halfbyte bench linear --json out.json")
def bench(
    kinds: Annotated[list[str] | None, typer.Argument(help="linear, conv, pipeline; all when none is given.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models of the pipelines; may be repeated. See --list.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny shapes, one call each: does it run.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Only list the models.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the figures there too, and a page beside it.")
    ] = None,
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
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(rows))
    if json_file:
        results = {"environment": environment(), "rows": rows}
        write_file(json_file, (json.dumps(results, indent=2) + "\n").encode())
        _write_speed_page(results, json_file.with_suffix(".html"))


def _write_speed_page(results: Any, page: Path) -> None:
    from halfbyte.errors import MissingExtraError
    from halfbyte.report.speed import speed_of, write_speed_report

    try:
        write_speed_report(speed_of(results), page)
        typer.echo(f"The page: {page.resolve()}")
    except MissingExtraError as missing:
        typer.echo(f"No page: {missing}")


@app.command(
    epilog="Examples:  halfbyte export my-model-4bit -o my-model-bf16    "
    "halfbyte export my-model-4bit -o for-comfyui --layout comfyui    "
    "halfbyte export my-model -o for-comfyui --layout comfyui --recipe nvfp4-w4a4"
)
def export(
    model: Annotated[Path, typer.Argument(help="Folder that `halfbyte quantize` wrote; with --recipe, of a float model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder.")],
    layout: Annotated[
        str, typer.Option(help="diffusers: floats, for any tool. comfyui: quantized layers that ComfyUI loads.")
    ] = "diffusers",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16 (default), fp16 or fp32. With comfyui: of what it has no quantized form for; default: nothing is rounded."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="With comfyui: quantize the denoiser by this for the file, such as nvfp4-w4a4.")
    ] = None,
) -> None:
    """Write a 4-bit model for tools that know nothing of halfbyte: as an ordinary float one, or in ComfyUI's layout.

    Weights keep the values they have here, but for what --dtype rounds; inputs are rounded as the tool does it, or not at all.
    """
    from halfbyte.export import export_by_layout

    for line in export_by_layout(model, output, layout, dtype, recipe):
        typer.echo(line)


@app.command(epilog="Examples:  halfbyte info    halfbyte info my-model-4bit")
def info(model: Annotated[Path | None, typer.Argument(help="Folder of a quantized pipeline or component.")] = None) -> None:
    """Without MODEL: the backend and why. With MODEL: what the checkpoint holds, layer by layer."""
    if model is None:
        from halfbyte.demo import environment

        for key, value in environment().items():
            typer.echo(f"{key:10} {value}")
        return
    from halfbyte.api import describe, stored_sizes
    from halfbyte.runtime.cpu import hindrance_of

    (recipe, layers), sizes = describe(model), stored_sizes(model)
    typer.echo(f"recipe {recipe.name}: {len(layers)} packed layers, {sum(sizes.values()) / 1e6:.2f} MB")
    width = max((len(name) for name in layers), default=0)
    for name, spec in layers.items():
        hindrance = hindrance_of(spec)
        note = f"  (reference backend: {hindrance})" if hindrance else ""
        typer.echo(f"  {name.ljust(width)}  {sizes[name] / 1e3:10.1f} KB  {spec.describe()}{note}")


def main() -> None:
    """Entry point: intended errors and wrong usage end in a sentence, never in a traceback."""
    from halfbyte.errors import HalfbyteError, StoppedError

    try:
        app()
    except StoppedError as stop:
        typer.secho(str(stop), fg="yellow", err=True)
        sys.exit(128 + stop.signal)
    except HalfbyteError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.secho("stopped; nothing was written", fg="red", err=True)
        raise


if __name__ == "__main__":
    main()
