"""The speed of this machine: what `halfbyte bench --json` measured as bars, on a page of its own or beside other results."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

from halfbyte.checkpoint import write_file
from halfbyte.errors import HalfbyteError
from halfbyte.report.page import environment
from halfbyte.report.schema import check_mapping

BASE = "torch bf16"  # what times are multiples of; in cases without it, the slowest


class _MoreOfRow(TypedDict, total=False):
    about: str  # of whole models


class Row(_MoreOfRow):
    """One contestant of one case: the keys of a bench's rows that the bars are made of."""

    case: str
    contestant: str
    seconds: float
    weight_bytes_of_bf16: float | None  # null: not one of halfbyte's own


@dataclass(frozen=True)
class Bar:
    """One contestant."""

    name: str
    own: bool
    milliseconds: float
    times: float  # as fast as the base
    width: float  # percent of the longest bar


@dataclass(frozen=True)
class Case:
    """One layer or model; the fastest contestant first."""

    name: str
    about: str
    base: str
    bars: list[Bar]


@dataclass(frozen=True)
class Speed:
    """All of a measurement, as the templates take it."""

    models: list[Case]
    layers: list[Case]
    environment: dict[str, str]


def load_speed(path: str | Path) -> Speed:
    """The measurement in a JSON file.

    Raises:
        HalfbyteError: when it cannot be read or holds something else.
    """
    try:
        return speed_of(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise HalfbyteError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8 or not JSON; a HalfbyteError is no ValueError
        raise HalfbyteError(f"{path} is not JSON: {error}") from error


def speed_of(data: Any) -> Speed:
    """A measurement from what `halfbyte bench --json` writes.

    Raises:
        HalfbyteError: when something is missing or of another type; names it.
    """
    check_mapping("the measurement", data, {"environment": dict[str, str], "rows": list[Row]})
    for index, row in enumerate(data["rows"]):
        if not 0 < row["seconds"] < math.inf:
            raise HalfbyteError(f"the measurement.rows[{index}].seconds is {row['seconds']}; times are above 0")
    cases = [_case(name, list(rows)) for name, rows in groupby(data["rows"], key=lambda row: row["case"])]
    return Speed([case for case in cases if case.about], [case for case in cases if not case.about], data["environment"])


def _case(name: str, rows: Sequence[Row]) -> Case:
    seconds = {row["contestant"]: row["seconds"] for row in rows}
    base = BASE if BASE in seconds else max(seconds, key=lambda one: seconds[one])
    fastest = min(seconds.values())
    bars = [
        Bar(
            row["contestant"],
            row["weight_bytes_of_bf16"] is not None,
            1e3 * row["seconds"],
            seconds[base] / row["seconds"],
            100 * fastest / row["seconds"],
        )
        for row in sorted(rows, key=lambda row: row["seconds"])
    ]
    return Case(name, rows[0].get("about", ""), base, bars)


def write_speed_report(speed: Speed, path: str | Path, title: str = "Speed of this machine") -> None:
    """Write the page, whole or not at all.

    Raises:
        CheckpointError: when the file cannot be written. MissingExtraError: without jinja2.
    """
    page = environment().get_template("speed_page.html.j2").render(speed=speed, title=title)
    write_file(path, page.encode("utf-8"))
