"""How long a fine-tune runs, how fast it learns, and on what."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from halfbyte.errors import HealError


@dataclass(frozen=True)
class Settings:
    """How long, how fast, on what.

    Raises:
        HealError: for values that make no sense.
    """

    steps: int | None = None  # optimizer steps; the run ends, and the learning rate reaches 0, at the nearer of
    minutes: float | None = None  # steps and minutes of training time
    batch: int = 32  # samples of an optimizer step, over all processes
    accumulate: int = 1  # parts a process takes its share of the batch in
    learning_rate: float = 1e-3  # at its peak; methods scale it for each parameter
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # autocast of the student's forward pass
    ema: float | None = None  # decay of averaged weights, such as 0.999; they replace the trained ones at the end
    recompute: bool = False  # activation checkpointing: less memory, more time
    sampler_steps: int = 20  # of the teacher's trajectories, on average
    depth: int = 2  # trajectories a lane held at a time
    reuse: float = 2.0  # how often a state is learned from, on average
    seed: int = 0
    save_minutes: float = 3.0
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise HealError("a run needs an end: give steps, minutes, or both")
        lowest = {"weight_decay": 0, "seed": -math.inf, "warmup": 0, "steps": 1}
        for item in fields(self):
            value, low = getattr(self, item.name), lowest.get(item.name)
            if value is None or isinstance(value, bool):
                continue
            if not (value > 0 if low is None else value >= low) or not math.isfinite(value):
                raise HealError(f"{item.name} must be {'> 0' if low is None else f'>= {low}'}, got {value!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise HealError(f"ema must lie between 0 and 1, got {self.ema!r}")

    def identity(self) -> dict[str, Any]:
        """What a continued run must share: all but the time budget, and how often things are written."""
        return {key: value for key, value in asdict(self).items() if key not in ("minutes", "save_minutes", "log_every")}
