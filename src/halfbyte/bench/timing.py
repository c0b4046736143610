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


SMOKE = Effort(rounds=1, least=0.0)


@torch.inference_mode()
def medians(contestants: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """Median seconds of one call of each contestant.

    The contestants take turns, so that a machine that slows down for a while slows all of them down.
    """
    calls = {name: _calls_for(run, effort.least) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(effort.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(times) for name, times in seconds.items()}


def _calls_for(run: Callable[[], object], least: float) -> int:
    """How many calls take about `least` seconds; the first two warm up (prepacking, code that is generated once)."""
    run()
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    return max(1, round(least / max(once, 1e-7)))
