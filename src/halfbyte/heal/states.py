"""States to learn from, without data: the float teacher's own sampler is run, and its denoiser calls are kept with their answers.

The pool is a table of trajectories: `batch` lanes wide and `depth` generations deep. A generation is one trajectory a lane, made by
one call of the pipeline, with its own scheduler and guidance; its number of sampler steps varies a little, so that the timesteps
differ from generation to generation. Every so often the oldest generation gives way to a new one, so each state serves about
`reuse` times. Sample i of a step picks a random state among the trajectories of lane i: timesteps mix freely within a batch.

Everything is a function of (seed, step, lane) alone. So a run can be continued without storing the pool, and any number of
processes, each with some of the lanes, learns from the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import Call, Conditions, find_denoiser, run_sampler, sampler_arguments, to_device
from halfbyte.errors import HealError
from halfbyte.timestep import timestep_argument

SHARED = ("img_ids", "txt_ids")  # arguments without a batch axis, whatever their length
SPREAD = 1 << 16  # trajectories are numbered modulo this; odd multipliers permute it
GOLDEN = 40503  # about 2**16 over the golden ratio: neighbouring trajectories get distant classes


def draw(*key: int) -> int:
    """A pseudo-random 63-bit number that depends on the key alone (splitmix64)."""
    mixed = 0
    for part in key:
        mixed = (mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


@dataclass(frozen=True)
class PoolSettings:
    """Size of the pool and how fast it is renewed."""

    batch: int = 32  # lanes: samples of one optimizer step, over all processes
    sampler_steps: int = 20  # of a trajectory, on average
    depth: int = 2  # generations held at a time
    reuse: float = 2.0  # how often a state is used before it is replaced, on average
    seed: int = 0

    @property
    def renewal(self) -> int:
        """Optimizer steps between two generations."""
        return max(1, round(self.reuse * self.sampler_steps))

    def steps_of(self, generation: int) -> int:
        """Sampler steps of a generation: 3/4 to 5/4 of the average."""
        low, high = max(1, round(0.75 * self.sampler_steps)), max(1, round(1.25 * self.sampler_steps))
        return low + draw(self.seed, 1, generation) % (high - low + 1)


@dataclass
class State:
    """One denoiser call of a generation: the arguments and the prediction of every lane."""

    call: Call  # tensors on the CPU
    target: Tensor  # (rows, ...): the teacher's prediction
    timestep: float


@dataclass
class Batch:
    """What the student is given at one step, and what the teacher answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor  # (rows, ...)
    timesteps: Tensor  # (rows,), as the denoiser takes them; the rows of a sample (with guidance: two) are neighbours
    samples: int

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            to_device(self.args, device),
            to_device(self.kwargs, device),
            self.target.to(device),
            self.timesteps.to(device),
            self.samples,
        )


def prediction(output: Any) -> Tensor:
    """The predicted tensor in what a denoiser returns."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    return found


def timestep_of(call: Call, denoiser: nn.Module) -> float:
    """The (largest) timestep of a denoiser's call."""
    name, position = timestep_argument(denoiser)
    return float(torch.as_tensor(call.kwargs[name] if name in call.kwargs else call.args[position]).max())


class StatePool:
    """The trajectories of some lanes, made when they are needed.

    Args:
        pipe: the float pipeline; its denoiser is the teacher.
        lanes: those of this process.
        told: prompts and further arguments of the pipeline's call.
        check: called before every denoiser call of a trajectory; may raise to stop.
    """

    def __init__(
        self,
        pipe: Any,
        settings: PoolSettings,
        lanes: range,
        told: Conditions | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.pipe, self.settings, self.lanes, self.told, self.check = pipe, settings, lanes, told, check
        self.denoiser = find_denoiser(pipe)
        self.timestep = timestep_argument(self.denoiser)
        self.generations: dict[int, list[State]] = {}
        pipe.set_progress_bar_config(disable=True)

    def batch(self, step: int, lanes: range | None = None) -> Batch:
        """The samples of some lanes (all of this process by default) at an optimizer step."""
        newest = step // self.settings.renewal + self.settings.depth - 1
        wanted = range(newest - self.settings.depth + 1, newest + 1)
        self.generations = {number: known for number, known in self.generations.items() if number in wanted}
        for number in wanted:
            if number not in self.generations:
                self.generations[number] = self._generate(number)
        picks = []
        for lane in self.lanes if lanes is None else lanes:
            choice = draw(self.settings.seed, 2, step, lane)
            states = self.generations[wanted[choice % len(wanted)]]
            picks.append((states[choice // len(wanted) % len(states)], lane - self.lanes.start))
        picks.sort(key=lambda pick: pick[0].timestep)  # rows with the same weights lie together
        return self._mix(picks)

    def _generate(self, generation: int) -> list[State]:
        """One trajectory a lane."""
        states: list[State] = []

        def before(*_: Any) -> None:
            self.check()

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = Call(to_device(args, "cpu"), to_device(kwargs, "cpu"))
            if states:
                call = _share(states[-1].call, call)
            states.append(State(call, to_device(prediction(output), "cpu"), timestep_of(call, self.denoiser)))

        settings, first = self.settings, generation * self.settings.batch
        epoch = first // SPREAD
        indices = [(first + lane) * GOLDEN % SPREAD for lane in self.lanes]
        handles = [
            self.denoiser.register_forward_pre_hook(before),
            self.denoiser.register_forward_hook(record, with_kwargs=True),
        ]
        steps = settings.steps_of(generation)
        try:
            with torch.no_grad():
                run_sampler(self.pipe, sampler_arguments(self.pipe, indices, SPREAD, steps, settings.seed + epoch, self.told))
        finally:
            for handle in handles:
                handle.remove()
        if not states or len(states[0].target) % len(self.lanes):
            rows = len(states[0].target) if states else 0
            kind = type(self.pipe).__name__
            raise HealError(f"{kind} made {rows} predictions for {len(self.lanes)} images; it cannot be told whose they are")
        return states

    def _mix(self, picks: list[tuple[State, int]]) -> Batch:
        """Rows of several states as one batch; with guidance a sample has a row for each of its passes."""
        rows = [torch.arange(lane, len(state.target), len(self.lanes)) for state, lane in picks]
        sizes = [len(state.target) for state, _ in picks]
        args = [state.call.args for state, _ in picks]
        kwargs = [state.call.kwargs for state, _ in picks]
        name, position = self.timestep
        inside = position < len(args[0])
        given = [entry[position] for entry in args] if inside else [entry[name] for entry in kwargs]
        times = torch.cat([_per_row(value, size)[row] for value, size, row in zip(given, sizes, rows, strict=True)])
        mixed = list(_gather(args, sizes, rows))
        named = _gather(kwargs, sizes, rows)
        if inside:
            mixed[position] = times
        else:
            named[name] = times
        target = torch.cat([state.target[row] for (state, _), row in zip(picks, rows, strict=True)])
        return Batch(tuple(mixed), named, target, times, len(picks))


def _per_row(value: Any, rows: int) -> Tensor:
    """A timestep, a number or a tensor, as one for every row."""
    return torch.as_tensor(value).reshape(-1).expand(rows)


def _share(before: Any, now: Any) -> Any:
    """The same value, with the tensors that equal those of the call before taken from there: conditioning is stored once."""
    if isinstance(now, Call):
        return Call(_share(before.args, now.args), _share(before.kwargs, now.kwargs))
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        same = before.shape == now.shape and before.dtype == now.dtype and torch.equal(before, now)
        return before if same else now
    if isinstance(now, dict) and isinstance(before, dict):
        return {key: _share(before.get(key), value) for key, value in now.items()}
    if isinstance(now, (tuple, list)) and isinstance(before, (tuple, list)) and len(before) == len(now):
        return type(now)(_share(old, new) for old, new in zip(before, now, strict=True))
    return now


def _gather(values: Sequence[Any], sizes: Sequence[int], rows: Sequence[Tensor]) -> Any:
    """The chosen rows of tensors with a batch axis, one call after another; what has none is taken from the first call."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim and all(value.shape[0] == size for value, size in zip(values, sizes, strict=True)):
            return torch.cat([value[row] for value, row in zip(values, rows, strict=True)])
        return first
    if isinstance(first, dict):
        return {key: first[key] if key in SHARED else _gather([value[key] for value in values], sizes, rows) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_gather([value[index] for value in values], sizes, rows) for index in range(len(first)))
    return first
