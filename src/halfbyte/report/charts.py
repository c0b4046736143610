"""What the charts of a report show: one series a recipe, over layers and over timesteps. `svg.py` draws them."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Literal, TypeAlias

from halfbyte.formats import get_grid
from halfbyte.report.figures import half_width
from halfbyte.report.schema import Layer, Run, finite

COLOURS = 8  # CSS variables --series-0 to --series-7
MARKERS = (  # corners, radius of the inner ones, turn in degrees, scale
    (24, 1.0, 0.0, 0.9),  # circle
    (4, 1.0, 45.0, 1.0),  # square
    (3, 1.0, 0.0, 1.2),  # triangle
    (4, 1.0, 0.0, 1.1),  # diamond
    (3, 1.0, 180.0, 1.2),  # triangle on its tip
    (5, 0.45, 0.0, 1.3),  # star
    (4, 0.35, 45.0, 1.3),  # cross
    (6, 0.55, 0.0, 1.2),  # star of six
)
PLAIN, PLAIN_NAME = -1, "plain INT4"  # style and name of the line that recipes are held against
CodesKey: TypeAlias = Literal["weight_codes", "input_codes"]
BIT_TICKS = (2, 3, 4, 5, 6, 8, 10, 12, 16)
MAX_BLOCKS = 14  # named on the axis of layers; with more, names are cut to their first part


@dataclass(frozen=True)
class Series:
    """One line of a chart; nan where it has no value."""

    style: int  # of the run; PLAIN: no run's
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()  # halves of the intervals around y, where they are known


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
    ticks: Sequence[int] = ()  # of a logarithmic x; none: x is linear
    y_label: str = "SQNR, dB"
    markers: bool = True
    about: str = ""  # how to read it, for everybody


def marker(style: int) -> tuple[list[tuple[float, float]], float]:
    """The corners of a series' marker, in the unit circle with y upwards, and the scale that gives it its share of ink."""
    corners, inner, turn, scale = MARKERS[(style + style // COLOURS) % len(MARKERS)]
    step = 2 if inner == 1 else 1  # stars have an inner corner after each outer one
    angles = [math.radians(turn + 90 + 180 * index / corners) for index in range(0, 2 * corners, step)]
    radii = [1.0 if step == 2 or index % 2 == 0 else inner for index in range(len(angles))]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)], scale


def marker_points(style: int) -> str:
    """The same marker as the `points` of an SVG polygon, with y downwards."""
    points, scale = marker(style)
    return " ".join(f"{scale * x:.2f},{-scale * y:.2f}" for x, y in points)


def size_plot(runs: Sequence[Run]) -> Plot | None:
    """Nearness to the float model over stored bits a weight: PSNR where any run has it, SQNR otherwise.

    None for fewer than three runs, or where all are of one size.

    Args:
        runs: the quantized ones.
    """
    pictured = any("psnr" in run["figures"] for run in runs)
    label, subject = ("PSNR", "final images") if pictured else ("SQNR", "predicted noise")
    series = []
    for style, run in enumerate(runs):
        figure = run["figures"].get("psnr")
        value = run["sqnr"] if not pictured else figure["value"] if figure else None
        if finite(value) and finite(run["bits"]):
            half = half_width(figure) if figure and pictured else None
            series.append(Series(style, [run["bits"]], [_number(value)], [half] if half is not None and finite(half) else []))
    if len(series) < 3 or len({*(round(line.x[0], 2) for line in series)}) < 2:
        return None
    points = [f"{runs[line.style]['recipe']} {line.y[0]:.1f} dB at {line.x[0]:.2f} bits" for line in series]
    return Plot(
        "size",
        "Quality and size",
        f"{label} of the {subject} over stored bits a weight: {'; '.join(points)}.",
        "stored bits a weight, scales and branches included",
        series,
        ticks=BIT_TICKS,
        y_label=f"{label}, dB",
        about=f"{label} of the {subject} against the float model's. Higher is nearer, further left is smaller; of two recipes one "
        f"above the other the upper is better at the same size.{' Lines are 95 % intervals.' if pictured else ''}",
    )


def layer_plot(runs: Sequence[Run]) -> Plot | None:
    """SQNR over the layers in model order: of their outputs where any run has them, of their weights otherwise.

    Args:
        runs: the quantized ones.
    """
    rows = [row for run in runs for row in run["layers"]]
    key: Literal["output_sqnr", "weight_sqnr"] = "output_sqnr" if any(finite(row["output_sqnr"]) for row in rows) else "weight_sqnr"
    names, series = _over_layers(runs, lambda row: row[key])
    if not series:
        return None
    subject = "each layer's output" if key == "output_sqnr" else "each layer's weights"
    described = f"SQNR of {subject} in decibels over {len(names)} layers in model order. The layer tables below hold the numbers."
    about = "Each layer alone, given the float model's own input: where a recipe loses most. More is better; 6 dB halve the error."
    return Plot("layers", f"SQNR of {subject}", described, "layers in model order", series, _blocks(names), about=about)


def entropy_plots(runs: Sequence[Run]) -> list[Plot]:
    """Entropy of the 4-bit codes of weights and of inputs over the layers, beside that of plain INT4 (QuaRTZ, figure 4).

    Args:
        runs: the quantized ones.
    """
    plots = []
    kinds: tuple[tuple[CodesKey, str], ...] = (("weight_codes", "weights"), ("input_codes", "inputs"))
    for key, subject in kinds:
        names, series = _over_layers(runs, partial(_entropy, key, "entropy"))
        if not series:
            continue
        plain = _over_layers(runs, partial(_entropy, key, "plain"))[1]
        if not any(_known(line) == _known(other) for line in series for other in plain):  # nobody is plain INT4 already
            fullest = max(plain, key=lambda line: len(_known(line)))
            series.append(Series(PLAIN, fullest.x, fullest.y))
        means = [f"{fmean(_known(line)):.2f} for {_title(runs, line)}" for line in series]
        plots.append(
            Plot(
                f"{subject}-entropy",
                f"Entropy of the {subject}' 4-bit codes",
                f"Entropy in bits a code over {len(names)} layers in model order; on average {', '.join(means)}.",
                "layers in model order",
                series,
                _blocks(names),
                y_label="bits a code",
                about=f"How evenly the {subject} use the 16 codes: 4 bits when all are equally frequent, less when most values "
                f"share a few of them. On average {', '.join(means)}.",
            )
        )
    return plots


def _title(runs: Sequence[Run], line: Series) -> str:
    return PLAIN_NAME if line.style == PLAIN else runs[line.style]["recipe"]


def _entropy(key: CodesKey, which: Literal["entropy", "plain"], row: Layer) -> float | None:
    codes = row.get(key)
    return None if codes is None or get_grid(codes["grid"]).bits != 4 else codes[which]


def _over_layers(runs: Sequence[Run], value: Callable[[Layer], float | None]) -> tuple[list[str], list[Series]]:
    """The names of all layers in model order, and a line for every run that has values."""
    longest = max(runs, key=lambda run: len(run["layers"]), default=None)
    names = list(dict.fromkeys(row["name"] for run in (longest, *runs) if run for row in run["layers"]))
    series = []
    for style, run in enumerate(runs):
        values = {row["name"]: value(row) for row in run["layers"]}
        y = [_number(values.get(name)) for name in names]
        if any(map(finite, y)):
            series.append(Series(style, range(len(names)), y))
    return names, series


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
    title, about = "SQNR of the predicted noise over time", "All layers together, by sampling step: when a recipe loses most."
    return Plot("timesteps", title, described, "timestep (noise to image)", series, reverse=True, about=about)


def loss_plot(log: Sequence[Mapping[str, float]]) -> Plot | None:
    """The loss of a healing run over its steps; None where the log has fewer than two rows."""
    points = [(row["step"], row["loss"]) for row in log if finite(row["loss"])]
    if len(points) < 2:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    described = f"Loss over {steps[-1]} optimizer steps, from {losses[0]:.3g} to {losses[-1]:.3g}."
    about = "How far the student is from the float model while it is trained; less is better."
    series = [Series(0, steps, losses)]
    return Plot("loss", "Loss", described, "optimizer step", series, y_label="loss", markers=False, about=about)


def gamma_plot(timesteps: Sequence[float], gamma: Sequence[float]) -> Plot:
    """Denoising factors over timesteps, in sampling order."""
    described = (
        f"Weight of the loss by timestep, from {gamma[-1]:.3g} at the noisy end to {gamma[0]:.3g} at the clean end; 1 on average."
    )
    series = [Series(0, timesteps, gamma)]
    label, weight = "timestep (noise to image)", "weight of the loss"
    about = "How much an error at each timestep counts in the loss: as much as the sampler lets it change the final image."
    return Plot("gamma", "Denoising factors", described, label, series, reverse=True, y_label=weight, markers=False, about=about)


def _number(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _known(line: Series) -> list[float]:
    return [value for value in line.y if finite(value)]


def _ends(line: Series) -> str:
    values = _known(line)
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
