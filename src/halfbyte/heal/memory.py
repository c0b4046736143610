"""How much memory training takes: of the process, for users, and of one piece of work alone, for comparisons."""

import sys
from collections.abc import Callable

import torch


def peak_memory() -> int:
    """Most bytes held so far: allocated on the GPU where there is one, else resident in this process (0 where that is unknown)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that are alive at once while something is done, beyond those that were before.

    Every allocation of torch counts, temporaries inside operations and the backward pass included.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
