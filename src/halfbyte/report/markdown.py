"""Results as a Markdown table, and files with a table between two markers."""

import re
from pathlib import Path

from halfbyte.checkpoint import write_file
from halfbyte.errors import HalfbyteError
from halfbyte.report.figures import MISSING, measured, number, shown, with_interval
from halfbyte.report.schema import Results, Run

MARKERS = "<!-- {name}: written by halfbyte -->", "<!-- end of {name} -->"


def markdown_table(results: Results) -> str:
    """The runs as a table, each figure with half its 95 % interval; published figures of the literature below."""
    kinds = shown(results)
    heads = [f"{kind.label} {kind.unit}".strip() + f" {kind.arrow}" for kind in kinds]
    head = ["recipe", "weights", "activations", "bits", "size of bf16", "SQNR dB ↑", *heads, "s an image"]
    rows = [head, ["---"] * len(head)]
    for run in results["runs"]:
        figures = [with_interval(run["figures"].get(kind.key), kind.digits) for kind in kinds]
        time = run["seconds_per_image"]
        rows.append([*_identity(run), number(run["sqnr"], 1), *figures, MISSING if time is None else f"{time:.3g}"])
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines + _published(results))


def captioned_table(results: Results) -> str:
    """The table, and how its runs were made and measured."""
    settings = results["settings"]
    made = f"{settings['images']:,} images, {settings['steps']} steps of {settings['sampler']}, seed {settings['seed']}"
    lines = [markdown_table(results), "", f"{made}, the same noise for every row; ± is half of a 95 % bootstrap interval."]
    if settings["features"] is not None:
        features = f"Features: {settings['features']}, SHA-256 {str(settings['digest'])[:16]}"
        lines.append(f"{features}; few images make distances of sets too large.")
    return "\n".join(lines)


def _identity(run: Run) -> list[str]:
    size = f"{run['bytes'] / run['bytes_bf16']:.3f}×" if run["bytes_bf16"] else MISSING
    return [f"`{run['recipe']}`", run["weights"], run["activations"], f"{run['bits']:.2f}", size]


def _published(results: Results) -> list[str]:
    labels = {kind.key: kind.label for kind in measured(results["runs"])}
    said = []
    for run in results["runs"]:
        for one in run["published"]:
            label = labels.get(one["figure"], one["figure"])
            said.append(f"- `{run['recipe']}`: {label} {one['value']:g}, {one['source']}")
    return ["", "Published, under the protocols of their authors:", "", *said] if said else []


def between_markers(text: str, name: str, content: str) -> str:
    """A text with the content between the markers of a name; in place of what was there.

    Raises:
        HalfbyteError: when the markers are missing.
    """
    start, end = (re.escape(marker.format(name=name)) for marker in MARKERS)
    found = re.search(f"(?s)({start}\n).*?({end})", text)
    if found is None:
        wanted = " and ".join(repr(marker.format(name=name)) for marker in MARKERS)
        raise HalfbyteError(f"the file has no lines {wanted}; add them where the table belongs")
    return text[: found.end(1)] + content + "\n" + text[found.start(2) :]


def marked(name: str, content: str) -> str:
    """Content between new markers."""
    start, end = (marker.format(name=name) for marker in MARKERS)
    return f"{start}\n{content}\n{end}"


def insert_table(path: Path, results: Results, name: str = "results") -> None:
    """Put the table of results between the markers of a file.

    Raises:
        HalfbyteError: when the file cannot be read or has no markers. CheckpointError: when it cannot be written.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HalfbyteError(f"{path} cannot be read: {error}") from error
    write_file(path, between_markers(text, name, captioned_table(results)).encode())
