"""Fair timing: every contestant in the same process, taking turns, medians of the rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 9  # turns of every contestant; the median counts
    least: float = 0.03  # seconds of one turn: calls are repeated until it has taken about this long
    most: float = 40.0  # seconds of one contestant after which it has no further turn: emulated bf16 can take 10 a layer


SMOKE = Effort(rounds=1, least=0.0)


@torch.inference_mode()
def medians(contestants: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """Median seconds of one call of each contestant.

    The contestants take turns, so that a machine that slows down for a while slows all of them down.
    """
    calls = {name: _calls_for(run, effort) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(effort.rounds):
        for name, run in contestants.items():
            if not seconds[name] or sum(seconds[name]) * calls[name] < effort.most:
                seconds[name].append(_timed(run, calls[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _calls_for(run: Callable[[], object], effort: Effort) -> int:
    """How many calls make up a turn; the first two warm up (prepacking, code that is generated once), or one slow one."""
    if _timed(run, 1) > effort.most / 10 or _timed(run, 1) > effort.least:
        return 1
    return max(1, round(effort.least / max(_timed(run, 1), 1e-7)))


def _timed(run: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
