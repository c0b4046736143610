"""The heat map of a sensitivity measurement: layers by timesteps, coloured by damage; on its own page or beside other results."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from halfbyte.budget import amount
from halfbyte.checkpoint import write_file
from halfbyte.errors import HalfbyteError
from halfbyte.latency import FLOAT, Latency
from halfbyte.report.page import environment
from halfbyte.report.schema import Results
from halfbyte.sensitivity import LayerDamage, Sensitivity

COLD, HOT = 50.0, 5.0  # dB: where the colours end
MOST = 16  # rows that are shown at first
PART = re.compile(r"\.parts\.\d+$")  # what the name of a split layer's part ends in


@dataclass(frozen=True)
class Row:
    """One layer, or one family of layers, at one width."""

    name: str
    family: str
    weights: int
    given: str | None  # the width that a budget gave it; None: there was no budget, or it is a family
    total: float  # dB, the errors of all timesteps together
    cells: list[tuple[float, int]]  # dB and percent of colour, by timestep


@dataclass(frozen=True)
class Table:
    """All layers, or families, at one width, in the order of their damage at the first width."""

    width: str
    about: str  # the width in words
    worst: list[Row]
    others: list[Row]  # shown on demand


@dataclass(frozen=True)
class Heatmap:
    """All of a measurement, as the templates take it."""

    cold: ClassVar[float] = COLD
    hot: ClassVar[float] = HOT
    model: str
    timesteps: list[float]
    families: list[Table]  # by width
    layers: list[Table]


def load_heatmap(path: str | Path, results: Results) -> Heatmap:
    """The measurement that `halfbyte sensitivity` wrote, to stand beside results of the same model.

    Raises:
        CheckpointError: when it cannot be read. HalfbyteError: when it is something else, or of another model.
    """
    found = Sensitivity.load(path)
    _check_model(path, found, results)
    return heatmap_of(found)


def _check_model(path: str | Path, found: Sensitivity, results: Results) -> None:
    """Raises HalfbyteError when a run lacks a layer, or has one of another size; runs that list no layers tell nothing."""
    for run in results["runs"]:
        sizes = Counter[str]()
        for layer in run["layers"]:
            for name in {layer["name"], PART.sub("", layer["name"])}:  # the parts of a split layer add up to it
                sizes[name] += math.prod(layer["shape"])
        for one in found.layers if sizes else ():
            if sizes[one.name] != one.weights:
                other = f"has {one.weights:,} weights, not {sizes[one.name]:,}" if sizes[one.name] else "is missing there"
                raise HalfbyteError(
                    f"{path} is of another model than the results: its layer {one.name!r} {other}; "
                    f"give a measurement of {results['model']!r}"
                )


def heatmap_of(found: Sensitivity, widths: Mapping[str, str] | None = None) -> Heatmap:
    """A measurement, most sensitive first.

    Args:
        widths: what `budget.spend` gave every layer, where a budget was spent.
    """

    def tables(kind: Sequence[LayerDamage], given: Mapping[str, str] | None = None) -> list[Table]:
        ranked = sorted(kind, key=lambda one: _rank(one.total(next(iter(found.ladder)))))
        made = []
        for width, spec in found.ladder.items():
            rows = [_row(one, width, given[one.name] if given else None) for one in ranked]
            made.append(Table(width, spec.describe(), rows[:MOST], rows[MOST:]))
        return made

    return Heatmap(found.model, found.timesteps, tables(found.families), tables(found.layers, widths))


def _rank(damage: float) -> tuple[bool, float]:
    """The most damage first, before it what is not a number."""
    return not math.isnan(damage), -damage


def _row(one: LayerDamage, width: str, given: str | None) -> Row:
    cells = [(decibel(damage), heat(damage)) for damage in one.damage[width]]
    return Row(one.name, one.family, one.weights, given, decibel(one.total(width)), cells)


def write_heatmap(
    found: Sensitivity, path: str | Path, widths: Mapping[str, str] | None = None, latency: Latency | None = None
) -> None:
    """Write the page, whole or not at all.

    Args:
        widths: what `budget.spend` gave the layers, where a budget was spent.
        latency: of this machine, where its time was limited.
    Raises:
        CheckpointError: when the file cannot be written. MissingExtraError: without jinja2.
    """
    template = environment().get_template("sensitivity_page.html.j2")
    page = template.render(
        heatmap=heatmap_of(found, widths),
        widths=widths,
        amounts={unit: amount(found, widths, unit) for unit in ("bits", "activation-bits", "MB")} if widths else {},
        counts=[(width, list(widths.values()).count(width)) for width in (*found.ladder, FLOAT)] if widths else [],
        latency=latency,
        step=latency.predict(widths) if widths and latency else None,
    )
    write_file(path, page.encode())


def decibel(damage: float) -> float:
    """SQNR of a relative error energy."""
    return math.inf if damage == 0 else -10 * math.log10(damage)


def heat(damage: float) -> int:
    """Share of colour, in percent: none at 50 dB, most of it at 5 dB and where the damage is not a number."""
    share = (COLD - decibel(damage)) / (COLD - HOT)
    return round(85 * max(0.0, min(1.0, share)))  # min(1.0, NaN) is 1.0
