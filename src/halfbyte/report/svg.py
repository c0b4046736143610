"""Charts as inline SVG, drawn by matplotlib and then handed over to the page's style sheet.

matplotlib knows neither dark mode nor phones. So each chart is drawn twice, for wide and for narrow pages, in placeholder colours
that become the page's CSS variables; its text stays text, in the page's font. Markers differ in shape as well as in colour.
"""

import io
import math
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from halfbyte.errors import MissingExtraError
from halfbyte.report.charts import COLOURS, PLAIN, Plot, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"wide": 1040, "narrow": 350}  # CSS pixels at which a chart's text has its true size
LABEL = 22  # letters of a block's name on the axis of layers
PLACEHOLDERS = {"ink": "#000001", "muted": "#000002", "line": "#000003", "band": "#000004"} | {
    f"series-{index}": f"#0000{index + 16:02x}" for index in range(COLOURS)
}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "halfbyte",
    "text.parse_math": False,
    "font.size": 13.0,
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
    "xtick.labelsize": 12.0,
    "ytick.labelsize": 12.0,
    "ytick.major.size": 0.0,
}


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
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever style the caller has set
        matplotlib.rcParams.update(RC)
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
        colour = PLACEHOLDERS["muted" if line.style == PLAIN else f"series-{line.style % COLOURS}"]
        axes.plot(line.x, line.y, color=colour, linewidth=1.2, alpha=0.55 if plot.markers else 1.0)
        if not plot.markers or line.style == PLAIN:
            continue
        if line.half:
            bottom, top = ([y + sign * half for y, half in zip(line.y, line.half, strict=True)] for sign in (-1, 1))
            axes.vlines(line.x, bottom, top, color=colour, linewidth=1.2)
        points, scale = marker(line.style)
        axes.plot(line.x, line.y, color=colour, linestyle="none", marker=points, markersize=scale * size, markeredgewidth=0)
    axes.set_ylabel(plot.y_label)
    axes.set_xlabel(plot.x_label)
    if plot.blocks:
        _name_blocks(axes, plot.blocks, width)
    if plot.ticks:
        places = [place for line in plot.series for place in line.x]
        low, high = 0.97 * min(places), 1.03 * max(places)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        axes.set_xticks([tick for tick in plot.ticks if low <= tick <= high])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
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
            shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
            labels.append(shown if len(shown) <= LABEL else f"{shown[: LABEL - 1]}…")
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
        if name != "id" or value in used:
            made.set(_local(name), _attribute(_local(name), value, prefix))
    made.extend(_clean(child, prefix, used) for child in element if _local(child.tag) not in ("metadata", "style"))
    return made


def _attribute(name: str, value: str, prefix: str) -> str:
    """An attribute as the page wants it: its variables for the placeholder colours, its font, and short numbers."""
    if name == "id":
        return f"{prefix}-{value}"
    if name == "style":
        for variable, colour in PLACEHOLDERS.items():
            value = value.replace(colour, f"var(--{variable})")
        value = re.sub(r"font: (?:[\w.]+ )*?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
    if name in ("d", "x", "y", "transform", "points"):
        value = re.sub(r"(\.\d\d)\d+", r"\1", value)
    return re.sub(r"^#|(?<=url\()#", f"#{prefix}-", value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
