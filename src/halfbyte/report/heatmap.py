"""The page of a sensitivity measurement: layers by timesteps, coloured by damage."""

import math
from collections.abc import Mapping
from pathlib import Path

from halfbyte.budget import amount
from halfbyte.checkpoint import write_file
from halfbyte.latency import FLOAT, Latency
from halfbyte.report.page import environment
from halfbyte.sensitivity import Sensitivity

COLD, HOT = 50.0, 5.0  # dB: where the colours end
MOST = 16  # rows that are shown at first


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
    templates = environment()
    templates.filters |= {"decibel": decibel, "heat": heat}
    first = next(iter(found.ladder))
    page = templates.get_template("sensitivity.html.j2").render(
        found=found,
        layers=sorted(found.layers, key=lambda layer: -layer.total(first)),
        first=first,
        most=MOST,
        cold=COLD,
        hot=HOT,
        families=sorted(found.families, key=lambda family: -family.total(first)),
        widths=widths,
        amounts={unit: amount(found, widths, unit) for unit in ("bits", "activation-bits", "MB")} if widths else {},
        counts=[(width, list(widths.values()).count(width)) for width in (*found.ladder, FLOAT)] if widths else [],
        latency=latency,
        step=latency.predict(widths) if widths and latency else None,
    )
    write_file(path, page.encode())


def decibel(damage: float) -> float:
    """SQNR of a relative error energy."""
    return -10 * math.log10(damage) if damage > 0 else math.inf


def heat(damage: float) -> int:
    """Share of colour, in percent: none at 50 dB, most of it at 5 dB."""
    return round(85 * min(1.0, max(0.0, (COLD - decibel(damage)) / (COLD - HOT))))
