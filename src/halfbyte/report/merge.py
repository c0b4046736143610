"""Several results as one: runs of one model, made in one way and measured with the same tools."""

from collections.abc import Sequence
from typing import Any

from halfbyte.errors import EvaluationError
from halfbyte.report.schema import Results

IGNORED = ("batch",)  # settings that do not change what is compared


def merge(several: Sequence[Results]) -> Results:
    """All runs in one table, below the float run of the first.

    Raises:
        EvaluationError: when models, settings, extractors or the figures of the float runs differ; names what does.
    """
    first = several[0]
    runs = list(first["runs"])
    for other in several[1:]:
        _check_alike("model", first["model"], other["model"])
        for key, value in first["settings"].items():
            if key not in IGNORED:
                _check_alike(key, value, dict(other["settings"])[key])
        _check_alike("float images' figures", _values(first), _values(other))
        taken = {run["recipe"] for run in runs}
        for run in other["runs"][1:]:
            if run["recipe"] in taken:
                raise EvaluationError(f"two results hold a run {run['recipe']!r}; give each run a name of its own")
            runs.append(run)
    return {**first, "runs": runs}


def _values(results: Results) -> dict[str, float]:
    return {name: figure["value"] for name, figure in results["runs"][0]["figures"].items()}


def _check_alike(what: str, one: Any, other: Any) -> None:
    if repr(one) != repr(other):
        raise EvaluationError(
            f"results cannot be compared: their {what} differ, {_short(one)} and {_short(other)}; evaluate both in the same way"
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
