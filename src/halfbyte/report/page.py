"""The page itself: what it says about the results, and how it comes to disk."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.errors import MissingExtraError
from halfbyte.report.charts import COLOURS, Plot, layer_plot, marker_points, timestep_plot
from halfbyte.report.pictures import picture_size
from halfbyte.report.schema import Results, Run, Spread, check_results, finite
from halfbyte.report.svg import draw

FOUR_BITS = 6.0  # stored bits a weight below which a recipe counts as 4-bit: shifts and 8-bit edges come on top of 4
PIXELS_BELOW = 800  # width of a picture that the page enlarges, and so shows pixel by pixel; larger ones are smoothed
MISSING = "–"


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    label: str
    value: str
    unit: str
    note: str


def write_report(results: Any, path: str | Path) -> None:
    """Write results as one HTML page that loads nothing from elsewhere.

    The page appears at `path` whole or not at all; a page that is there already is replaced.

    Args:
        results: as `halfbyte.report.schema.Results` describes them, such as the content of a results.json.
    Raises:
        HalfbyteError: when the results are incomplete or of another version.
        CheckpointError: when the file cannot be written.
        MissingExtraError: without jinja2 or matplotlib.
    """
    write_file(path, render(check_results(results)).encode("utf-8"))


def environment() -> Any:
    """The templates, their filters and what they all use.

    Raises:
        MissingExtraError: without jinja2.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2: pip install 'halfbyte[report]'") from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"fixed": fixed, "spread": spread, "significant": significant, "ratio": ratio, "errors": errors}
    made.globals |= {
        "marker_points": marker_points,
        "colours": COLOURS,
        "picture_size": picture_size,
        "pixels_below": PIXELS_BELOW,
    }
    return made


def render(results: Results) -> str:
    """The page as text."""
    runs = results["runs"]
    template = environment().get_template("report.html.j2")
    page: str = template.render(
        results=results,
        settings=results["settings"],
        runs=runs,
        quantized=runs[1:],
        cards=cards(results),
        measured=[key for key in ("psnr", "ssim", "frechet", "images") if any(dict(run)[key] is not None for run in runs)],
        charts=[drawn(plot) for plot in (layer_plot(runs[1:]), timestep_plot(runs[1:])) if plot is not None],
    )
    return page


def drawn(plot: Plot) -> dict[str, Any]:
    """A chart as the template takes it."""
    return {"key": plot.key, "title": plot.title, "styles": [line.style for line in plot.series], "drawings": draw(plot)}


def cards(results: Results) -> list[Card]:
    """The numbers to read first; those without a run to take them from are left out."""
    quantized, settings, made = results["runs"][1:], results["settings"], []
    sizes = [run for run in quantized if run["bytes_bf16"]]
    if sizes:
        smallest = min(sizes, key=lambda run: run["bytes"] / run["bytes_bf16"])
        made.append(Card("Smallest", ratio(smallest), "of bf16", smallest["recipe"]))
    close = [run for run in quantized if run["bits"] < FOUR_BITS and finite(run["sqnr"])]
    if close:
        closest = max(close, key=lambda run: run["sqnr"] or 0.0)
        made.append(Card("Closest with 4-bit weights", fixed(closest["sqnr"]), "dB SQNR", closest["recipe"]))
    steps = f"from the same noise, {settings['steps']} steps"
    made.append(Card("Compared", f"{settings['images']:,}", "image" if settings["images"] == 1 else "images", steps))
    return made


def fixed(value: float | None, digits: int = 1) -> str:
    """A number with so many decimals, in words of symbols where it is none."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    shown = f"{abs(value):.{digits}f}" if math.isfinite(value) else "∞"
    return f"−{shown}" if value < 0 and shown.strip("0.") else shown


def spread(value: Spread | None, digits: int = 1) -> str:
    """Mean ± standard error."""
    if value is None:
        return MISSING
    error = "" if value["stderr"] is None else f" ± {fixed(value['stderr'], digits)}"
    return fixed(value["mean"], digits) + error


def significant(value: float | None) -> str:
    """About three digits of a positive number, without an exponent."""
    if value is None or not math.isfinite(value) or value == 0:
        return fixed(value, 0)
    return fixed(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def errors(found: dict[str, float]) -> list[tuple[str, str]]:
    """Grids and their mean squared errors, the least first, each as a multiple of it."""
    ranked = sorted(found.items(), key=lambda pair: pair[1])
    least = ranked[0][1] if ranked else 0.0
    return [(grid, f"{error:.2e}" if error == least or not least else f"×{fixed(error / least, 2)}") for grid, error in ranked]


def ratio(run: Run) -> str:
    """Stored bytes over those in bf16."""
    return f"{run['bytes'] / run['bytes_bf16']:.3f}×" if run["bytes_bf16"] else MISSING
