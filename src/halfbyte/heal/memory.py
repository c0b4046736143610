"""How much memory training takes: of the process, for users, and of one piece of work alone, for comparisons."""

import copy
import sys
from collections.abc import Callable

import torch
from torch import nn

from halfbyte.heal.method import Method
from halfbyte.heal.objective import mean_square
from halfbyte.heal.states import Batch, prediction


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


def step_peaks(method: Method, student: nn.Module, teacher: nn.Module, batch: Batch) -> tuple[int, int]:
    """Peaks of one forward and backward pass on the CPU: of a method on its student, and of the float model.

    In the float model the same weights are trained. Neither counts the models themselves, nor the optimizer's moments; both count
    gradients.
    """
    plain = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    chosen = method.trained()

    def heal() -> None:
        method.loss(student, batch).mean().backward()

    def learn() -> None:
        mean_square(prediction(plain(*batch.args, **batch.kwargs)), batch.target).mean().backward()

    found = []
    for model, step in ((student, heal), (plain, learn)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        step()  # what is allocated once and kept, such as re-ordered weights of convolutions
        model.zero_grad(set_to_none=True)
        found.append(peak_of(step))
        model.zero_grad(set_to_none=True)
    return found[0], found[1]
