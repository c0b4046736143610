"""`halfbyte.heal`: everything between a quantized student and a healed one."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfbyte.api import RECIPE_ATTRIBUTE
from halfbyte.calibration import find_denoiser, record_calls
from halfbyte.conversion import SIMULATED_ATTRIBUTE
from halfbyte.errors import DivergedError, HealError, listed
from halfbyte.heal.dfa import denoising_factors, normalised
from halfbyte.heal.distill import Progress, distill
from halfbyte.heal.resume import digest
from halfbyte.heal.routing import LoRASettings
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import timestep_of
from halfbyte.heal.student import check_shapes
from halfbyte.heal.talora import TALoRA
from halfbyte.layers import FakeQuant, QuantizedLayer
from halfbyte.runtime.layers import packed_shapes

METHODS = ("talora", "lora")
STEPS = 1000  # of a run that is given no end
LEARNING_RATE = 2e-2  # quantization steps that a weight's correction may move at an optimizer step


@dataclass
class HealResult:
    """What a fine-tune left.

    Attributes:
        model: the student, in place: trainable layers with healed weights; `halfbyte.pack` makes them 4-bit.
        log: rows of step, loss, gradient_norm, learning_rate, seconds.
        timesteps: the entries of the tables, ascending, as the denoiser takes them.
        choice: by layer, which of its weight sets serves each of them: uint8 (T,).
        gamma: weight of the loss at each of them, float32 (T,); None: all alike.
        stored_bytes, stored_before: of the quantized layers' codes, scales and shifts, packed; with all sets, and with one.
    """

    model: nn.Module
    method: str
    settings: dict[str, Any]
    log: list[dict[str, Any]]
    timesteps: list[float]
    choice: dict[str, Tensor]
    gamma: Tensor | None
    stored_bytes: int
    stored_before: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for reports; choices as runs of (set, number of timesteps)."""
        runs = {}
        for name, choice in self.choice.items():
            sets, lengths = choice.unique_consecutive(return_counts=True)
            runs[name] = [[int(number), int(length)] for number, length in zip(sets, lengths, strict=True)]
        return {
            "method": self.method,
            "settings": self.settings,
            "log": self.log,
            "timesteps": self.timesteps,
            "choice": runs,
            "gamma": None if self.gamma is None else self.gamma.tolist(),
            "stored_bytes": self.stored_bytes,
            "stored_before": self.stored_before,
        }


def heal(
    student: Any,
    teacher: Any,
    method: Literal["talora", "lora"] = "talora",
    *,
    steps: int | None = None,
    minutes: float | None = None,
    loras: int = 2,
    rank: int = 16,
    routing: Literal["router", "split"] = "router",
    dfa: Literal["auto", "ddpm", "ddim", "flow", "off"] = "auto",
    prompts: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> HealResult:
    """Win back quality by a short fine-tune against the float model, without data; in place.

    Args:
        student: what `halfbyte.quantize(..., simulate=True)` left: a pipeline, or its denoiser.
        teacher: the float pipeline that the student was made from; its sampler makes the training states.
        method: talora: several LoRAs a layer, chosen by timestep; lora: one.
        steps, minutes: where the run ends, the nearer of the two; neither: 1000 steps.
        loras, rank: of every layer's hub.
        routing: router: which LoRA serves a timestep is learned; split: equal parts.
        dfa: weigh the loss by denoising factors: auto takes the form that suits the scheduler.
        prompts: for text-to-image pipelines.
        output: folder for the run's state and log; `resume` continues it.
        progress: called with (what is being done, units done, units in all).
        options: further fields of `halfbyte.heal.settings.Settings`, such as batch, learning_rate, seed, bf16, ema.
    Returns:
        A HealResult; `halfbyte.pack(result.model)` makes the healed student 4-bit.
    Raises:
        HealError and its kinds: see halfbyte.errors.
    """
    model = _denoiser(student)
    settings = _settings(steps, minutes, options)
    hub = LoRASettings(loras=1 if _known(method) == "lora" else loras, rank=rank, routing=routing)
    if isinstance(teacher, nn.Module) or not hasattr(teacher, "components"):
        raise HealError(
            f"the teacher is a {type(teacher).__name__}; healing needs its whole pipeline, whose sampler makes the data"
        )
    float_model = find_denoiser(teacher)
    check_shapes(model, float_model)
    if getattr(model, SIMULATED_ATTRIBUTE, None):
        raise HealError(f"this {type(model).__name__} cannot be healed: {getattr(model, SIMULATED_ATTRIBUTE)}; quantize it without")
    identity = _identity(model, teacher, prompts)
    seen = [timestep_of(call, float_model) for call in record_calls(teacher, 1, settings.sampler_steps, prompts=prompts)]
    timesteps = _timesteps(model, teacher.scheduler, max(seen))
    gamma = None if dfa == "off" else _gamma(teacher.scheduler, dfa, settings.sampler_steps, timesteps, seen)
    before = stored_bytes(model)
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        float_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    talora = TALoRA(model, timesteps, hub, gamma, settings.seed)
    try:
        log = distill(
            model, teacher, talora, settings, prompts=prompts, folder=output, resume=resume, identity=identity, progress=progress
        )
    except DivergedError:
        talora.melt()  # the student keeps the last good state
        raise
    except BaseException:
        talora.remove()  # the student is as it came, so that the same call with resume can go on
        raise
    choice = talora.melt()
    used = {**asdict(settings), **asdict(hub), "dfa": dfa}
    return HealResult(model, method, used, log.rows, timesteps, choice, gamma, stored_bytes(model), before)


def _denoiser(student: Any) -> nn.Module:
    return student if isinstance(student, nn.Module) else find_denoiser(student)


def _known(method: str) -> str:
    if method not in METHODS:
        raise HealError(f"unknown method {method!r}; the methods are {listed(METHODS)}")
    return method


def _settings(steps: int | None, minutes: float | None, options: Mapping[str, Any]) -> Settings:
    names = {item.name for item in fields(Settings)}
    unknown = set(options) - names
    if unknown:
        raise HealError(f"heal has no option {listed(unknown)}; its options are {listed(names)}")
    end = STEPS if steps is None and minutes is None else steps
    return Settings(**{"learning_rate": LEARNING_RATE, **options, "steps": end, "minutes": minutes})


def _identity(model: nn.Module, teacher: Any, prompts: Sequence[str]) -> dict[str, Any]:
    recipe = getattr(model, RECIPE_ATTRIBUTE, None)
    return {
        "recipe": None if recipe is None else recipe.to_dict(),
        "scheduler": type(teacher.scheduler).__name__,
        "teacher": digest(find_denoiser(teacher)),
        "student": digest(model),
        "prompts": list(prompts),
    }


def _timesteps(model: nn.Module, scheduler: Any, largest: float) -> list[float]:
    """The entries of the tables: those that the model's layers have already, else every timestep of the scheduler.

    Args:
        largest: timestep the denoiser was seen to take; some models take fractions of 1.
    """
    timed = next((m.timestep for m in model.modules() if isinstance(m, QuantizedLayer) and m.spec.over_time and m.timestep), None)
    if timed is not None:
        return list(timed.calibrated)
    count = int(scheduler.config.num_train_timesteps)
    return [index / count if largest <= 1 else float(index) for index in range(count)]


def _gamma(scheduler: Any, form: str, steps: int, timesteps: Sequence[float], seen: Sequence[float]) -> Tensor:
    """Denoising factors at the entries of the tables, with mean 1 over the timesteps of a trajectory."""
    factors = denoising_factors(scheduler, None if form == "auto" else form, steps)  # type: ignore[arg-type]
    stretch = len(factors) if max(seen) <= 1 else 1

    def index(times: Sequence[float]) -> list[int]:
        return [min(len(factors) - 1, math.floor(time * stretch + 0.5)) for time in times]

    return normalised(factors, index(seen))[index(timesteps)]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the codes, scales, shifts and tables of a model's trainable quantized layers, once packed."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, FakeQuant):
            timesteps = len(layer.timestep.calibrated) if layer.timestep is not None else 1
            shapes = packed_shapes(layer, layer.spec, layer.input_scale is not None, timesteps)  # type: ignore[arg-type]
            total += sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    return total
