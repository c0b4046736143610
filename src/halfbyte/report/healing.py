"""The page of a healing run: its loss, what was trained, the weight of every timestep, and which weights serve which timesteps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.errors import HalfbyteError, listed
from halfbyte.report.allocation import allocation_svg, share_svg
from halfbyte.report.charts import gamma_plot, loss_plot
from halfbyte.report.page import drawn, environment
from halfbyte.report.svg import WIDTHS

KEYS = (
    "method",
    "settings",
    "log",
    "timesteps",
    "choice",
    "gamma",
    "stored_bytes",
    "stored_before",
    "share",
    "trained",
    "peak_bytes",
)


def write_healing_report(results: Any, path: str | Path, title: str) -> None:
    """Write the results of `halfbyte heal` as one HTML page that loads nothing from elsewhere.

    Args:
        results: as `HealResult.to_dict` makes them, such as the content of a healing.json.
        title: of the page.
    Raises:
        HalfbyteError: when the results are incomplete. CheckpointError: when the file cannot be written.
        MissingExtraError: without jinja2 or matplotlib.
    """
    missing = set(KEYS) - set(results if isinstance(results, dict) else ())
    if missing:
        raise HalfbyteError(f"the results of a healing run lack {listed(missing)}; `halfbyte heal` writes them as healing.json")
    plots = [loss_plot(results["log"])]
    if results["gamma"] is not None:
        plots.append(gamma_plot(results["timesteps"], results["gamma"]))
    page = environment().get_template("healing.html.j2")
    text = page.render(
        title=title,
        results=results,
        last=results["log"][-1] if results["log"] else None,
        sets=max((number + 1 for runs in results["choice"].values() for number, _ in runs), default=1),
        several=sum(len({number for number, _ in runs}) > 1 for runs in results["choice"].values()),
        shares=_both_widths(share_svg, results),
        allocation=_both_widths(allocation_svg, results),
        charts=[drawn(plot) for plot in plots if plot is not None],
    )
    write_file(path, text.encode("utf-8"))


def _both_widths(draw: Callable[..., str], results: Any) -> dict[str, str]:
    """A picture for wide and for narrow pages; none where nothing was chosen by timestep."""
    if not results["choice"]:
        return {}
    return {size: draw(results["choice"], results["timesteps"], narrow=size == "narrow") for size in WIDTHS}
