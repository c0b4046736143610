"""What `halfbyte bench` and the scripts in bench/ run: cases to rows, rows to a table and to JSON."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from halfbyte.bench import layers, models, pipelines
from halfbyte.bench.timing import SMOKE, Effort
from halfbyte.errors import ModelError, listed
from halfbyte.runtime.backends import integer_limit

KINDS = ("linear", "conv", "pipeline")
Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # (what is being measured, cases done, cases in all)


def run(
    kinds: Iterable[str] = KINDS, names: Iterable[str] = (), smoke: bool = False, progress: Progress | None = None
) -> list[Row]:
    """Measure.

    Args:
        kinds: of KINDS.
        names: of `models.SUBJECTS`, for the kind `pipeline`; none: all but the large ones.
        smoke: tiny shapes, one call each: does it run, not how fast.
    Returns:
        A row for each case and contestant: seconds, ratios, and for single layers TOPS and the share of the machine's limit.
    Raises:
        ModelError: when a kind or a name is not known.
    """
    effort = SMOKE if smoke else Effort()
    cases = list(_cases(list(kinds), list(names), smoke, effort))
    rows = []
    for done, (title, measure) in enumerate(cases):
        if progress:
            progress(title, done, len(cases))
        rows += measure()
    return rows


def _cases(kinds: list[str], names: list[str], smoke: bool, effort: Effort) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    for known, asked in ((KINDS, kinds), (models.SUBJECTS, names)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ModelError(f"there is no benchmark {listed(unknown)}; there are {listed(known)}")
    limit = integer_limit()
    if "linear" in kinds:
        for shape in layers.SMOKE_LINEAR if smoke else layers.LINEAR:
            yield f"linear {shape}", partial(_layer, layers.linear_case, shape, effort, limit)
    if "conv" in kinds:
        for sizes in layers.SMOKE_CONV if smoke else layers.CONV:
            yield f"conv {sizes}", partial(_layer, layers.conv_case, sizes, effort, limit)
    if "pipeline" in kinds:
        everything = models.SMOKE_SUBJECTS if smoke else models.SUBJECTS
        chosen = [name for name in everything if name in names or not (names or everything[name].large)]
        for name in chosen:
            yield name, partial(pipelines.measure, name, everything[name], effort)


def _layer(make: Callable[..., layers.Case], shape: tuple[int, ...], effort: Effort, limit: float | None) -> list[Row]:
    return layers.measure(make(*shape), effort, limit)


def table(rows: list[Row]) -> Any:
    """The rows as a rich table; ratios say how many times faster than a rival a contestant is."""
    from rich.table import Table

    rivals = list(dict.fromkeys(rival for row in rows for rival in row["ratio_to"]))
    made = Table()
    for heading in ("case", "contestant"):
        made.add_column(heading, no_wrap=True)
    for heading in ("ms", "TOPS", "of limit", *(f"x {rival}" for rival in rivals), "weights of bf16"):
        made.add_column(heading, justify="right")
    previous = None
    for row in rows:
        made.add_row(
            "" if row["case"] == previous else row["case"],
            row["contestant"],
            f"{row['seconds'] * 1e3:.3f}",
            _number(row.get("tops"), ".2f"),
            _number(row.get("share_of_limit"), ".0%"),
            *(_number(row["ratio_to"].get(rival), ".2f") for rival in rivals),
            _number(row["weight_bytes_of_bf16"], ".3f"),
            end_section=row is rows[-1] or row["case"] != rows[rows.index(row) + 1]["case"],
        )
        previous = row["case"]
    return made


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
