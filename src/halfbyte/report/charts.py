"""Charts as inline SVG, drawn by matplotlib and then handed over to the page's style sheet.

matplotlib knows neither dark mode nor phones. So each chart is drawn twice, for wide and for narrow pages, in placeholder colours
that become the page's CSS variables; its text stays text, in the page's font. Markers differ in shape as well as in colour.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from halfbyte.errors import MissingExtraError
from halfbyte.report.schema import Run, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"wide": 1040, "narrow": 350}  # CSS pixels at which a chart's text has its true size
COLOURS = 8  # CSS variables --series-0 to --series-7
PLACEHOLDERS = {"ink": "#000001", "muted": "#000002", "line": "#000003", "band": "#000004"} | {
    f"series-{index}": f"#0000{index + 16:02x}" for index in range(COLOURS)
}
MAX_BLOCKS = 14  # named on the axis of layers; with more, names are cut to their first part
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "halfbyte",
    "text.parse_math": False,
    "font.size": 12.0,
    "text.color": PLACEHOLDERS["ink"],
    "axes.labelcolor": PLACEHOLDERS["muted"],
    "axes.edgecolor": PLACEHOLDERS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PLACEHOLDERS["line"],
    "grid.linewidth": 1.0,
    "xtick.color": PLACEHOLDERS["line"],
    "ytick.color": PLACEHOLDERS["line"],
    "xtick.labelcolor": PLACEHOLDERS["muted"],
    "ytick.labelcolor": PLACEHOLDERS["muted"],
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "ytick.major.size": 0.0,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; nan where it has no value."""

    style: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """A chart before it is drawn."""

    key: str  # of this chart among those of a page; begins its element ids
    title: str
    description: str  # for readers who do not see it
    x_label: str
    series: list[Series]
    blocks: list[tuple[int, int, str]] = field(default_factory=list)  # first and last x, and the name of what lies there
    reverse: bool = False  # x falls from left to right


def marker(style: int) -> list[tuple[float, float]]:
    """The corners of a series' marker, within the unit circle, y upwards."""
    corners, inner, turn = (
        (24, 1.0, 0.0),  # circle
        (4, 1.0, 45.0),  # square
        (3, 1.0, 0.0),  # triangle
        (4, 1.0, 0.0),  # diamond
        (3, 1.0, 180.0),  # triangle on its tip
        (5, 0.42, 0.0),  # star
        (4, 0.35, 45.0),  # cross
        (6, 0.55, 0.0),  # star of six
    )[(style + style // COLOURS) % COLOURS]
    points = []
    for index in range(2 * corners):
        angle = math.radians(turn + 90 + 180 * index / corners)
        radius = inner if index % 2 else 1.0
        if inner < 1 or index % 2 == 0:
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def marker_points(style: int) -> str:
    """The same marker as the `points` of an SVG polygon, y downwards."""
    return " ".join(f"{x:.2f},{-y:.2f}" for x, y in marker(style))


def layer_plot(runs: Sequence[Run]) -> Plot | None:
    """SQNR over the layers in model order: of their outputs where any run has them, of their weights otherwise.

    Args:
        runs: the quantized ones.
    """
    key = next(
        (key for key in ("output_sqnr", "weight_sqnr") if any(finite(row[key]) for run in runs for row in run["layers"])), None
    )
    if key is None:
        return None
    longest = max(runs, key=lambda run: len(run["layers"]))
    names = list(dict.fromkeys(row["name"] for run in (longest, *runs) for row in run["layers"]))
    series = []
    for style, run in enumerate(runs):
        values = {row["name"]: row[key] for row in run["layers"]}
        y = [_number(values.get(name)) for name in names]
        if any(map(finite, y)):
            series.append(Series(style, range(len(names)), y))
    subject = "each layer's output" if key == "output_sqnr" else "each layer's weights"
    described = f"SQNR of {subject} in decibels over {len(names)} layers in model order. The layer tables below hold the numbers."
    return Plot("layers", f"SQNR of {subject}", described, "layers in model order", series, _blocks(names))


def timestep_plot(runs: Sequence[Run]) -> Plot | None:
    """SQNR of the predicted noise over timesteps, in sampling order; None where no run has two of them."""
    series = []
    for style, run in enumerate(runs):
        points = sorted((step, _number(value)) for step, value in run["sqnr_by_timestep"])
        if len(points) > 1 and any(finite(value) for _, value in points):
            series.append(Series(style, [step for step, _ in points], [value for _, value in points]))
    if not series:
        return None
    ends = [f"{_ends(line)} for {runs[line.style]['recipe']}" for line in series]
    described = f"SQNR of the predicted noise in decibels, from the first sampling step to the last: {'; '.join(ends)}."
    return Plot("timesteps", "SQNR of the predicted noise over time", described, "timestep (noise to image)", series, reverse=True)


def draw(plot: Plot) -> dict[str, str]:
    """The chart as SVG elements to put into a page, by the names of WIDTHS.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("charts need matplotlib: pip install 'halfbyte[report]'") from error
    drawn = {}
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font draws it
        for size, width in WIDTHS.items():
            drawn[size] = _page_svg(_figure(plot, width), f"{plot.key}-{size}", plot)
    return drawn


def _figure(plot: Plot, width: int) -> "Figure":
    from matplotlib.figure import Figure

    height = max(260, round(width * 0.34))
    figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")
    axes = figure.add_subplot()
    most = max(len(line.x) for line in plot.series)
    size = min(7.0, max(3.0, 0.8 * width / most))
    for line in plot.series:
        colour = PLACEHOLDERS[f"series-{line.style % COLOURS}"]
        axes.plot(line.x, line.y, color=colour, linewidth=1.2, alpha=0.55)
        axes.plot(line.x, line.y, color=colour, linestyle="none", marker=marker(line.style), markersize=size, markeredgewidth=0)
    axes.set_ylabel("SQNR, dB")
    axes.set_xlabel(plot.x_label)
    if plot.blocks:
        _name_blocks(axes, plot.blocks, width)
    if plot.reverse:
        axes.invert_xaxis()
    return figure


def _name_blocks(axes: "Axes", blocks: list[tuple[int, int, str]], width: int) -> None:
    """Alternating bands behind the layers of a block, and the names of those that have room."""
    last = blocks[-1][1]
    axes.set_xlim(-0.5, last + 0.5)
    ticks, labels, free = [], [], -math.inf
    for index, (start, end, name) in enumerate(blocks):
        if index % 2 == 0:
            axes.axvspan(start - 0.5, end + 0.5, color=PLACEHOLDERS["band"], linewidth=0, zorder=0)
        middle = (start + end) / 2
        if middle >= free:
            ticks.append(middle)
            labels.append(name if len(name) <= 22 else f"{name[:21]}…")
            free = middle + 15 * (last + 1) / (width - 60)  # a line of text is 15 pixels high
    axes.set_xticks(ticks, labels, rotation=90)
    axes.tick_params(axis="x", length=0)


def _page_svg(figure: "Figure", prefix: str, plot: Plot) -> str:
    """What matplotlib draws, without all that belongs to a file of its own, and in the page's colours."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    clean = _clean(root, prefix, _references(root))
    for key in ("width", "height", "version"):
        clean.attrib.pop(key, None)
    clean.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-desc", "class": "chart"}
    for index, (tag, text) in enumerate((("title", plot.title), ("desc", plot.description))):
        element = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        element.text = text
        clean.insert(index, element)
    return ElementTree.tostring(clean, encoding="unicode")


def _references(root: Any) -> set[str]:
    """The ids that something in the drawing refers to."""
    return {found for element in root.iter() for value in element.attrib.values() for found in re.findall(r"#([\w-]+)", value)}


def _clean(element: Any, prefix: str, used: set[str]) -> Any:
    """A copy without namespaces, metadata, global styles and unused ids; the ids that stay begin with the prefix."""
    made = ElementTree.Element(_local(element.tag))
    made.text = element.text if element.text and element.text.strip() else None
    for name, value in element.attrib.items():
        name = _local(name)
        if name == "id":
            if value in used:
                made.set("id", f"{prefix}-{value}")
        elif name == "style":
            made.set("style", _page_style(value, prefix))
        else:
            value = re.sub(r"^#", f"#{prefix}-", value)
            made.set(
                name,
                re.sub(r"(\.\d\d)\d+", r"\1", value) if name in ("d", "x", "y", "transform", "points") else _url(value, prefix),
            )
    made.extend(_clean(child, prefix, used) for child in element if _local(child.tag) not in ("metadata", "style"))
    return made


def _page_style(style: str, prefix: str) -> str:
    """A style attribute with the page's variables for the placeholder colours, and without fonts but their size."""
    for name, colour in PLACEHOLDERS.items():
        style = style.replace(colour, f"var(--{name})")
    style = re.sub(r"font: (?:[\w.]+ )*?([\d.]+px)[^;]*", r"font-size: \1", style)
    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    return _url(style, prefix)


def _url(value: str, prefix: str) -> str:
    return re.sub(r"url\(#", f"url(#{prefix}-", value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _number(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _ends(line: Series) -> str:
    values = [value for value in line.y if finite(value)]
    return f"{values[-1]:.1f} to {values[0]:.1f}"


def _blocks(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Neighbouring layers of one block, such as down_blocks.0, as (first, last, name); coarser where there are many."""
    blocks = list(_runs_of([re.match(r"[^.]*(\.\d+)?", name).group() for name in names]))  # type: ignore[union-attr]
    return blocks if len(blocks) <= MAX_BLOCKS else list(_runs_of([name.partition(".")[0] for name in names]))


def _runs_of(labels: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    start = 0
    for label, group in groupby(labels):
        count = len(list(group))
        yield start, start + count - 1, label
        start += count
