"""`halfbyte.heal`: everything between a quantized student and a healed one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_origin, get_type_hints

import torch
from torch import nn

from halfbyte.api import RECIPE_ATTRIBUTE
from halfbyte.calibration import Call, Conditions, find_denoiser, record_calls, run_call
from halfbyte.conversion import SIMULATED_ATTRIBUTE
from halfbyte.errors import DivergedError, HealError, RecipeError, listed
from halfbyte.fields import check_type
from halfbyte.heal.alignment import SelectiveSettings, align
from halfbyte.heal.distill import Progress, distill
from halfbyte.heal.memory import peak_memory
from halfbyte.heal.objective import FORMS, Objective, objective_of
from halfbyte.heal.result import HealResult, stored_bytes
from halfbyte.heal.routing import LoRASettings
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import Batch, prediction, timestep_of
from halfbyte.heal.student import check_shapes, check_tables
from halfbyte.heal.talora import TALoRA
from halfbyte.layers import QuantizedLayer
from halfbyte.runs import digest

METHODS: dict[str, type] = {"lora": LoRASettings, "talora": LoRASettings, "quest": SelectiveSettings}
STEPS = 1000  # of a run that is given no end
CHECKED = 5  # states at which what was won is measured
LEARNING_RATES = {"talora": 2e-2, "lora": 2e-2, "quest": 5e-2}  # quantization steps that a weight may move at an optimizer step


@dataclass
class Job:
    """A call of `heal`, checked."""

    model: nn.Module
    teacher: Any
    method: str
    settings: Settings
    own: Any  # the method's settings
    dfa: str
    calls: list[Call]  # of the teacher, along one trajectory
    run: dict[str, Any]  # further arguments of the loop

    @property
    def seen(self) -> list[float]:
        """The timesteps of the trajectory."""
        return [timestep_of(call, find_denoiser(self.teacher)) for call in self.calls]


def heal(
    student: Any,
    teacher: Any,
    method: Literal["lora", "talora", "quest"] = "lora",
    *,
    steps: int | None = None,
    minutes: float | None = None,
    dfa: Literal["step", "auto", "ddpm", "ddim", "flow", "off"] = "step",
    prompts: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> HealResult:
    """Win back quality by a short fine-tune against the float model, without data; in place.

    Args:
        student: what `halfbyte.quantize(..., simulate=True)` left: a pipeline, or its denoiser.
        teacher: the float pipeline that the student was made from; its sampler makes the training states.
        method: lora: a LoRA a layer, melted into its weights; talora: several, chosen by timestep, of which each leaves weights of
            its own; quest: the weights of the time embedding and of the most sensitive layers, and all calibrated input scales.
        steps, minutes: where the run ends, the nearer of the two; neither: 1000 steps.
        dfa: what an error of the prediction counts: step: its square in the next sample, clipping included; ddpm, ddim or flow: a
            denoising factor of that form, auto: of the one that suits the scheduler; off: nothing but itself.
        prompts: for text-to-image pipelines.
        arguments: of the pipeline's call, such as guidance_scale: those you will sample with.
        output: folder for the run's state and log; `resume` continues it.
        progress: called with (what is being done, units done, units in all).
        options: fields of `halfbyte.heal.settings.Settings`, such as batch, learning_rate, seed, bf16, ema; and of the method's own
            settings: `LoRASettings` (loras, rank, routing) or `SelectiveSettings` (stages, share, local_weight, global_weight).
    Returns:
        A HealResult; `halfbyte.pack(result.model)` makes the healed student 4-bit.
    Raises:
        HealError and its kinds: see halfbyte.errors.
    """
    settings, own = read_settings(method, dfa, {**options, "steps": steps, "minutes": minutes})
    model = student if isinstance(student, nn.Module) else find_denoiser(student)
    if isinstance(teacher, nn.Module) or not hasattr(teacher, "components"):
        raise HealError(
            f"the teacher is a {type(teacher).__name__}; healing needs its whole pipeline, whose sampler makes the data"
        )
    float_model = find_denoiser(teacher)
    check_shapes(model, float_model)
    check_tables(model)
    if getattr(model, SIMULATED_ATTRIBUTE, None):
        raise HealError(f"this {type(model).__name__} cannot be healed: {getattr(model, SIMULATED_ATTRIBUTE)}; quantize it without")
    told = Conditions(prompts, arguments or {})
    identity = _identity(model, teacher, told)
    run = {"told": told, "folder": output, "resume": resume, "identity": identity, "progress": progress}
    calls = record_calls(teacher, 1, settings.sampler_steps, prompts=prompts, arguments=arguments)
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        float_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    job = Job(model, teacher, method, settings, own, dfa, calls, run)
    return _heal_quest(job) if method == "quest" else _heal_talora(job)


def _heal_talora(job: Job) -> HealResult:
    model, timesteps, before = job.model, _timesteps(job), stored_bytes(job.model)
    objective = _objective(job, timesteps)
    error = _error(job, objective)
    talora = TALoRA(model, timesteps, job.own, objective, job.settings.seed)
    known = dict(model.named_parameters())
    trained = sum(known[name].numel() for name in talora.trained())
    share = trained / sum(parameter.numel() for parameter in find_denoiser(job.teacher).parameters())
    try:
        log = distill(model, job.teacher, talora, job.settings, **job.run)
    except DivergedError:
        talora.melt()  # the student keeps the last good state
        raise
    except BaseException:
        talora.remove()  # the student is as it came, so that the same call with resume can go on
        raise
    choice = talora.melt()
    return HealResult(
        model,
        job.method,
        _used(job),
        log.rows,
        timesteps,
        choice,
        objective.gamma,
        stored_bytes(model),
        before,
        share,
        {},
        peak_memory(),
        _error(job, objective),
        error,
    )


def _heal_quest(job: Job) -> HealResult:
    before, timesteps = stored_bytes(job.model), _timesteps(job)
    objective = _objective(job, timesteps)
    error = _error(job, objective)
    done = align(job.model, job.teacher, job.settings, job.own, job.calls, objective=objective, **job.run)
    trained = {stage.name: {"weights": [*stage.weights], "scales": [*stage.scales]} for stage in done.stages}
    stored = stored_bytes(job.model)
    return HealResult(
        job.model,
        job.method,
        _used(job),
        done.log,
        timesteps,
        {},
        objective.gamma,
        stored,
        before,
        done.share,
        trained,
        peak_memory(),
        _error(job, objective),
        error,
    )


def _objective(job: Job, timesteps: Sequence[float]) -> Objective:
    denoiser, steps = find_denoiser(job.teacher), job.settings.sampler_steps
    return objective_of(job.dfa, job.teacher.scheduler, denoiser, steps, timesteps, job.seen)


@torch.no_grad()
def _error(job: Job, objective: Objective) -> float:
    """The mean of an objective over a few states of the recorded trajectory, from its noisy to its clean end."""
    teacher, device = find_denoiser(job.teacher), next(job.model.parameters()).device
    found = []
    for call, timestep in list(zip(job.calls, job.seen, strict=True))[:: -(-len(job.calls) // CHECKED)]:
        target = prediction(run_call(teacher, call))
        batch = Batch(call.args, call.kwargs, target, torch.full((len(target),), timestep), len(target)).to(device)
        found.append(float(objective(prediction(run_call(job.model, call)), batch).mean()))
    return sum(found) / len(found)


def _used(job: Job) -> dict[str, Any]:
    """All settings of a run, for its results."""
    return {**asdict(job.settings), **asdict(job.own), "dfa": job.dfa}


def read_settings(method: str, dfa: str, options: Mapping[str, Any]) -> tuple[Settings, Any]:
    """The loop's settings and the method's, from options of `heal` by name.

    Raises:
        HealError: when one is unknown, or its value is not allowed.
    """
    if method not in list(METHODS):  # a list, as a file may hold anything
        raise HealError(f"unknown method {method!r}; the methods are {listed(METHODS)}")
    if dfa not in list(FORMS):
        raise HealError(f"dfa must be one of {listed(FORMS)}, got {dfa!r}")
    if options.get("steps") is None and options.get("minutes") is None:
        options = {**options, "steps": STEPS}
    loop, own = ({item.name for item in fields(kind)} for kind in (Settings, METHODS[method]))
    unknown = set(options) - loop - own
    if unknown:
        raise HealError(f"heal has no option {listed(unknown)} for {method}; its options are {listed(loop | own)}")
    hints = {**get_type_hints(Settings), **get_type_hints(METHODS[method])}
    for name, value in options.items():
        if get_origin(hints[name]) is tuple:  # given as people like: its class reads it
            continue
        try:
            check_type(name, value, hints[name])
        except RecipeError as error:
            raise HealError(str(error)) from error
    mine = {key: value for key, value in options.items() if key in own}
    if method == "lora" and mine.setdefault("loras", 1) != 1:
        raise HealError(f"lora has one LoRA a layer, got loras={mine['loras']}; the method talora takes several")
    rest = {key: value for key, value in options.items() if key in loop}
    return Settings(**{"learning_rate": LEARNING_RATES[method], **rest}), METHODS[method](**mine)


def _identity(model: nn.Module, teacher: Any, told: Conditions) -> dict[str, Any]:
    recipe = getattr(model, RECIPE_ATTRIBUTE, None)
    return {
        "recipe": None if recipe is None else recipe.to_dict(),
        "scheduler": type(teacher.scheduler).__name__,
        "teacher": digest(find_denoiser(teacher)),
        "student": digest(model),
        "prompts": list(told.prompts),
        "arguments": {name: repr(value) for name, value in told.arguments.items()},
    }


def _timesteps(job: Job) -> list[float]:
    """The entries of the tables: those that the model's layers have already, else every timestep of the scheduler.

    Some models take timesteps as fractions of 1.
    """
    layers = (layer for layer in job.model.modules() if isinstance(layer, QuantizedLayer))
    timed = next((layer.timestep for layer in layers if layer.spec.over_time and layer.timestep), None)
    if timed is not None:
        return list(timed.calibrated)
    count = int(job.teacher.scheduler.config.num_train_timesteps)
    return [index / count if max(job.seen) <= 1 else float(index) for index in range(count)]
