"""The page itself: what it says about the results, and how it comes to disk."""

import base64
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint import write_file
from halfbyte.errors import MissingExtraError
from halfbyte.report.charts import (
    COLOURS,
    PLAIN,
    PLAIN_NAME,
    Plot,
    entropy_plots,
    layer_plot,
    marker_points,
    size_plot,
    timestep_plot,
)
from halfbyte.report.figures import KINDS, MISSING, half_width, measured
from halfbyte.report.figures import number as fixed
from halfbyte.report.levels import LevelDrawings
from halfbyte.report.pictures import picture_size
from halfbyte.report.schema import Figure, Results, Run, check_results, finite
from halfbyte.report.svg import draw

if TYPE_CHECKING:
    from halfbyte.report.heatmap import Heatmap
    from halfbyte.report.speed import Speed

FOUR_BITS = 6.0  # stored bits a weight below which a recipe counts as 4-bit: multipliers and 8-bit edges come on top of 4
PIXELS_BELOW = 800  # width of a picture that the page enlarges, and so shows pixel by pixel; larger ones are smoothed
FORMATS = (  # how to read what `LayerSpec.describe` says
    "int4 and int8 are integers; lzs4 is int4 without -8; e2m1 and its like are floats of so many exponent and mantissa bits, "
    "unsigned with a u before. <<4/16: every 16 neighbours share a shift of 0 to 4 bits; *10/16: a factor of 1 to 10; g64: "
    "every 64 share a scale; cut: low bits are dropped, not rounded; static, timestep: calibrated scales."
)
SCRIPT = Path(__file__).with_name("templates") / "slider.js"


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    label: str
    value: str
    unit: str
    note: str


def write_report(results: Any, path: str | Path, speed: "Speed | None" = None, heatmap: "Heatmap | None" = None) -> None:
    """Write results as one HTML page that loads nothing from elsewhere.

    The page appears at `path` whole or not at all; a page that is there already is replaced.

    Args:
        results: as `halfbyte.report.schema.Results` describes them, such as the content of a results.json.
        speed, heatmap: measurements to stand on the same page.
    Raises:
        HalfbyteError: when the results are incomplete or of another version.
        CheckpointError: when the file cannot be written.
        MissingExtraError: without jinja2 or matplotlib.
    """
    write_file(path, render(check_results(results), speed, heatmap).encode("utf-8"))


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
    made.filters |= {"fixed": fixed, "interval": interval, "significant": significant, "ratio": ratio, "errors": errors}
    made.globals |= {
        "marker_points": marker_points,
        "colours": COLOURS,
        "picture_size": picture_size,
        "pixels_below": PIXELS_BELOW,
        "formats": FORMATS,
    }
    return made


def render(results: Results, speed: "Speed | None" = None, heatmap: "Heatmap | None" = None) -> str:
    """The page as text."""
    runs, script = results["runs"], SCRIPT.read_text(encoding="utf-8")
    drawings = LevelDrawings()
    levels = [(index, found) for index, run in enumerate(runs) if (found := drawings.of_run(run))]
    plots = [size_plot(runs[1:]), layer_plot(runs[1:]), timestep_plot(runs[1:]), *entropy_plots(runs[1:])]
    template = environment().get_template("report.html.j2")
    page: str = template.render(
        results=results,
        settings=results["settings"],
        runs=runs,
        quantized=runs[1:],
        cards=cards(results),
        kinds=measured(runs),
        labels={key: kind.label for key, kind in KINDS.items()},
        pictured=[run for run in runs if run["images"] is not None],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=[drawn(plot) for plot in plots if plot is not None],
        levels=levels,
        symbols=drawings.symbols(),
        speed=speed,
        heatmap=heatmap,
        plain=PLAIN,
        plain_name=PLAIN_NAME,
    )
    return page


def drawn(plot: Plot) -> dict[str, Any]:
    """A chart as the template takes it."""
    styles = [line.style for line in plot.series]
    return {"key": plot.key, "title": plot.title, "about": plot.about, "styles": styles, "drawings": draw(plot)}


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
        made.append(Card("Closest with 4-bit weights", fixed(closest["sqnr"], 1), "dB SQNR", closest["recipe"]))
    steps = f"from the same noise, {settings['steps']} steps"
    made.append(Card("Compared", f"{settings['images']:,}", "image" if settings["images"] == 1 else "images", steps))
    return made


def interval(figure: Figure | None, digits: int) -> str:
    """Plus and minus half of a figure's 95 % interval; empty where there is none."""
    half = None if figure is None else half_width(figure)
    return "" if half is None else f"± {fixed(half, digits)}"


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
