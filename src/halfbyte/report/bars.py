"""Numbers as bars, group beside group, on a page of their own."""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.checkpoint import write_file
from halfbyte.report.page import environment

Groups = Mapping[str, Mapping[str, Mapping[str, float]]]  # section -> group -> name of a bar -> its length


def write_bars(groups: Groups, path: str | Path, title: str, lead: str, unit: str) -> None:
    """Write the page, whole or not at all; the bars of a group are as long as its longest allows, in descending order.

    Args:
        lead: what is shown, in a sentence. unit: the heading of the numbers.
    Raises:
        CheckpointError: when the file cannot be written. MissingExtraError: without jinja2.
    """
    sections = {
        section: {group: _bars(values) for group, values in found.items()}  # a percentage of the longest, and the number
        for section, found in groups.items()
    }
    page = environment().get_template("bars.html.j2").render(sections=sections, title=title, lead=lead, unit=unit)
    write_file(path, page.encode("utf-8"))


def _bars(values: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, percent of the longest, value)."""
    longest = max(values.values(), default=0.0) or 1.0
    return [(name, 100 * value / longest, value) for name, value in sorted(values.items(), key=lambda one: -one[1])]
