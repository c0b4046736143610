"""Fair timing: every contestant in the same process, taking turns, medians of the rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key")


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 9  # turns of every contestant; the median counts
    least: float = 0.03  # seconds of one turn: calls are repeated until it has taken about this long


SMOKE = Effort(rounds=1, least=0.0)


@torch.inference_mode()
def medians(
    contestants: Mapping[Key, Callable[[], object]], effort: Effort, progress: Callable[[int, int], None] | None = None
) -> dict[Key, float]:
    """Median seconds of one call of each contestant.

    The contestants take turns, so that a machine that slows down for a while slows all of them down.

    Args:
        progress: called after every turn, of which the first warms up, with (turns done, turns in all).
    """
    calls: dict[Key, int] = {}
    seconds: dict[Key, list[float]] = {name: [] for name in contestants}
    for turn in range(1 + effort.rounds):
        for place, (name, run) in enumerate(contestants.items()):
            if turn == 0:
                calls[name] = _calls_for(run, effort.least)
            else:
                seconds[name].append(_seconds_of(run, calls[name]))
            if progress:
                progress(turn * len(contestants) + place + 1, (1 + effort.rounds) * len(contestants))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds_of(run: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _calls_for(run: Callable[[], object], least: float) -> int:
    """How many calls take about `least` seconds; the first two warm up (prepacking, code that is generated once)."""
    run()
    run()
    return max(1, round(least / max(_seconds_of(run, 1), 1e-7)))
