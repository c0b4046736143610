"""The commands that measure: eval, table, report. A shell over `halfbyte.evidence`; `cli.py` registers them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli_options import Arguments, Guidance, call_arguments
from halfbyte.terminal import progress

if TYPE_CHECKING:
    from halfbyte.report import Results

EVAL_EXAMPLES = (
    "Examples:  halfbyte eval my-model-4bit --against my-model -o results.json    "
    "halfbyte eval out --against my-model --images photos --features inception -n 10000    "
    "On several devices:  accelerate launch -m halfbyte.cli eval ..."
)
TABLE_EXAMPLES = "Examples:  halfbyte table configs/demo.yaml -o demo-table    halfbyte table my.yaml --insert README.md"
REPORT_EXAMPLES = (
    "Examples:  halfbyte report quartz.json msfp.json -o report.html    halfbyte report quartz.json --bench bench.json    "
    "halfbyte report quartz.json --sensitivity study/sensitivity.json"
)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder that `halfbyte quantize` or `halfbyte heal` wrote.")],
    against: Annotated[Path, typer.Option(help="The float model it was made from: a folder, a name on the Hub, or demo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New file for the results; a page appears beside it.")],
    images: Annotated[Path | None, typer.Option(help="Real images: a folder, or an .npz file as ADM's evaluator reads.")] = None,
    image_size: Annotated[int | None, typer.Option(min=6, help="Cut real images square and resize them to this.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, for text-to-image models.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=2, help="Images that each model makes.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at a time.")] = 32,
    guidance: Guidance = None,
    argument: Arguments = None,
    features: Annotated[str | None, typer.Option(help="Compare sets in: inception, inception:FILE, an .onnx file, demo.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow TorchScript files, which are programs.")] = False,
    lpips: Annotated[str | None, typer.Option(help="LPIPS by alex, vgg or squeeze (needs torchvision).")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP score by this model, such as openai/clip-vit-base-patch16.")] = None,
    image_reward: Annotated[bool, typer.Option("--image-reward", help="ImageReward (needs image-reward).")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run in tables.  \\[default: its recipe]")] = None,
    save_images: Annotated[Path | None, typer.Option(help="New folder to keep both sets of images in, as PNG files.")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Keep them as .npz files, as ADM's evaluator reads.")] = False,
) -> None:
    """Compare a quantized model with its float original, from the same noise: PSNR, SSIM, SQNR over time, Frechet distances.

    Stopped or killed, the same command goes on where it was.
    """
    from halfbyte.evaluate.sampling import Sampling
    from halfbyte.evidence.command import EvalOptions, evaluate_folder
    from halfbyte.evidence.tools import read_prompts
    from halfbyte.report import write_report

    sampling = Sampling(count, steps, seed, batch_size, read_prompts(prompts), call_arguments(guidance, argument))
    options = EvalOptions(sampling, features, trust_code, images, image_size, lpips, clip, image_reward, name, save_images, npz)
    with progress() as report:
        results = evaluate_folder(model, against, output, options, report)
    if results is not None:
        print_results(results)
        page = output.with_suffix(".html")
        write_report(results, page)
        typer.echo(f"Written to {output}; the page with the pictures: {page.resolve()}")


def table(
    config: Annotated[Path, typer.Argument(help="YAML file of the model, the sampling and the runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, page and what is kept of every run.")],
    images: Annotated[int | None, typer.Option("-n", "--count", min=2, help="Images a run, instead of the file's.")] = None,
    insert: Annotated[Path | None, typer.Option(help="Markdown file that gets the table between its markers.")] = None,
    slim: Annotated[Path | None, typer.Option(help="Write the results there too, without pictures and layers.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow TorchScript files, which are programs.")] = False,
) -> None:
    """Quantize a model by every recipe of a list and compare them, as the papers do; runs that are done are not made again."""
    import dataclasses

    from halfbyte.evidence.command import make_table, slimmed
    from halfbyte.evidence.config import read_config
    from halfbyte.report import save_results

    found = read_config(config)
    if images is not None:
        found = dataclasses.replace(found, images=images)
    with progress() as bar:
        results = make_table(found, output, insert, bar, trust_code=trust_code)
    if results is not None:
        if slim is not None:
            save_results(slimmed(results), slim)
        print_results(results)
        typer.echo(f"The page with the pictures: {(output / 'report.html').resolve()}")


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `halfbyte eval` or `halfbyte table` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file.")] = Path("report.html"),
    insert: Annotated[Path | None, typer.Option(help="Markdown file that gets the table between its markers.")] = None,
    bench: Annotated[Path | None, typer.Option(help="Speeds for the same page: what `halfbyte bench --json` wrote.")] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Heat map for the same page: the sensitivity.json that `halfbyte sensitivity` wrote.")
    ] = None,
) -> None:
    """Put the runs of several results, made in the same way, into one page."""
    from halfbyte.report import load_results, write_report
    from halfbyte.report.heatmap import load_heatmap
    from halfbyte.report.markdown import insert_table
    from halfbyte.report.merge import merge
    from halfbyte.report.speed import load_speed

    merged = merge([load_results(file) for file in results])
    speed = None if bench is None else load_speed(bench)
    heatmap = None if sensitivity is None else load_heatmap(sensitivity, merged)
    write_report(merged, output, speed, heatmap)
    if insert is not None:
        insert_table(insert, merged)
    print_results(merged)
    typer.echo(f"The page: {output.resolve()}")


def print_results(results: "Results") -> None:
    """The table of results on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from halfbyte.report.figures import number, shown, with_interval

    kinds, settings = shown(results), results["settings"]
    rows = Table(title=f"{settings['images']} images, {settings['steps']} steps, the same noise for every row")
    for heading in ("recipe", "bits", "size", "SQNR dB", *(kind.label for kind in kinds), "s/image"):
        rows.add_column(heading, justify="left" if heading == "recipe" else "right")
    for run in results["runs"]:
        time: Any = run["seconds_per_image"]
        rows.add_row(
            run["recipe"],
            f"{run['bits']:.2f}",
            f"{run['bytes'] / run['bytes_bf16']:.3f}x" if run["bytes_bf16"] else "",
            number(run["sqnr"], 1),
            *(with_interval(run["figures"].get(kind.key), kind.digits) for kind in kinds),
            "" if time is None else f"{time:.3g}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(rows)
