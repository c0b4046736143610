"""QuEST's two stages, one after the other: what carries the timestep, then what the loss is due to, with the scales of all inputs.

    temporal     the time embedding and its projections into the blocks, with their input scales
    critical     the layers charged most for their size (`critical.py`), with the input scales of all layers but the temporal ones,
                 all biases, and the gains and offsets of norms
    full         every quantized layer and all scales, in one stage: what selective tuning is compared with

Weights, biases and scales of both stages together stay within `share` of the model's parameters; where the layers of the time
embedding alone would take more than a quarter of it, those charged least are left as they are.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.calibration import Call, Conditions, find_denoiser
from halfbyte.errors import DivergedError, HealError, StoppedError, listed
from halfbyte.heal.critical import Charge, charges, worst_layers
from halfbyte.heal.distill import TICKS, Progress, distill
from halfbyte.heal.method import Method
from halfbyte.heal.objective import Objective
from halfbyte.heal.scales import norm_parameters
from halfbyte.heal.selective import LossWeights, Selective, Stage, parameters_of, quantized_layers
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.heal.talora import restore
from halfbyte.heal.temporal import temporal_layers

STAGES = ("temporal", "critical", "full")
TEMPORAL_PART = 0.25  # of the share that the temporal layers may take
TEMPORAL_TIME = 0.1  # of the run, where both stages are run
CHARGED_BATCHES, CHARGED_BATCH = 8, 8  # states that layers are charged on
SILENT = 1e-12  # least energy of an output that errors are divided by: layers may start at zero


@dataclass(frozen=True)
class SelectiveSettings(LossWeights):
    """What is trained, and what for.

    Raises:
        HealError: for values that make no sense.
    """

    stages: tuple[str, ...] = ("temporal", "critical")
    share: float = 0.07  # of the model's parameters: most that may be trained; 0: no weights are
    affine: bool = True  # learn all biases, and the gains and offsets of norms, too; not in the temporal stage

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", (self.stages,) if isinstance(self.stages, str) else tuple(self.stages))
        if not self.stages or len({*self.stages}) < len(self.stages) or not {*self.stages} <= {*STAGES}:
            raise HealError(f"stages must be one or several of {listed(STAGES)}, got {listed(self.stages) or 'none'}")
        if "full" in self.stages and len(self.stages) > 1:
            raise HealError("the stage 'full' trains all there is; give it alone")
        if not 0 <= self.share <= 1:
            raise HealError(f"share must be 0 to 1, got {self.share!r}")
        super().__post_init__()


@dataclass
class Alignment:
    """What the stages trained, and how it went."""

    log: list[dict[str, Any]]  # rows of `distill`, with the stage; steps and seconds run on
    stages: list[Stage]
    share: float  # of the model's parameters that were trained


def align(
    student: nn.Module,
    pipe: Any,
    settings: Settings,
    selective: SelectiveSettings,
    calls: Sequence[Call],
    *,
    objective: Objective = Method.objective,
    told: Conditions | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Run the stages on a student, in place. Arguments and errors as `distill` has them; each stage has a folder in `folder`.

    Args:
        calls: of the teacher, along one trajectory.
        objective: what an error of the prediction counts.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    layers = quantized_layers(student)
    pipe.to(PartialState().device)
    student.to(PartialState().device)
    stages = plan(student, pipe, settings, selective, calls, told)
    share = parameters_of(student, stages) / sum(parameter.numel() for parameter in find_denoiser(pipe).parameters())
    rows: list[dict[str, Any]] = []
    with _as_it_came(student, layers):
        for number, stage in enumerate(stages):
            method = Selective(student, find_denoiser(pipe), stage, selective, objective)
            try:
                log = distill(
                    student,
                    pipe,
                    method,
                    _part(settings, stage, stages),
                    told=told,
                    folder=None if folder is None else Path(folder) / stage.name,
                    resume=resume,
                    identity=identity,
                    progress=None if progress is None else partial(_report, progress, stage, number, len(stages)),
                )
            except DivergedError:
                method.melt()  # the student keeps the last good state
                raise
            except BaseException:
                method.remove()
                raise
            method.melt()
            rows += _follow(rows[-1] if rows else None, log.rows, stage)
            late = max(gather_object([log.signal]))  # it came with the stage's last step
            if late and stage is not stages[-1]:
                raise StoppedError(f"stopped after the {stage.name} stage; continue with resume (--resume)", late)
    return Alignment(rows, stages, share)


@contextmanager
def _as_it_came(student: nn.Module, layers: Mapping[str, Any]) -> Iterator[None]:
    """Take back what was learned where a run does not end, so that the same call with resume can go on; not where it diverged."""
    kept = {name: (layer.weight, layer.bias, layer.activation_scale) for name, layer in layers.items()}
    norms = {name: student.get_parameter(name).detach().clone() for name in norm_parameters(student)}
    try:
        yield
    except DivergedError:
        raise
    except BaseException:
        for name, layer in layers.items():
            layer.weight, layer.bias, layer.activation_scale = kept[name]
        restore(student, norms)
        raise


def plan(
    student: nn.Module,
    pipe: Any,
    settings: Settings,
    selective: SelectiveSettings,
    calls: Sequence[Call],
    told: Conditions | None = None,
) -> list[Stage]:
    """What each stage will train; the same in all processes.

    Raises:
        HealError: when a stage would train nothing, or minimise nothing.
    """
    from accelerate.utils import broadcast_object_list

    layers = quantized_layers(student)
    found = _charged(student, pipe, settings, told)
    energy = {name: max(charge.energy, SILENT) for name, charge in found.items()}
    timed = {name for name in temporal_layers(find_denoiser(pipe), calls[len(calls) // 2], calls[0]) if name in layers}
    calibrated = {name for name, layer in layers.items() if layer.activation_scale is not None and selective.scale_rate}
    affine = selective.affine and {*selective.stages} != {"temporal"}
    small = parameters_of(student, [Stage("all", (), tuple(calibrated), affine)])
    limit = selective.share * sum(parameter.numel() for parameter in find_denoiser(pipe).parameters()) - small
    both = {"temporal", "critical"} <= {*selective.stages}
    temporal = _fitting(found, timed, limit * (TEMPORAL_PART if both else 1.0))
    used = sum(found[name].weights for name in temporal) if both else 0
    others = {name: charge for name, charge in found.items() if name not in timed}
    weights = {"temporal": temporal, "critical": worst_layers(others, limit - used), "full": list(layers)}
    scales = {"temporal": [*timed], "critical": [*others], "full": list(layers)}
    stages = []
    for name in selective.stages:
        chosen = tuple(sorted(weights[name])), tuple(sorted({*scales[name]} & calibrated))
        if not any(chosen) and not (selective.affine and name != "temporal"):
            raise HealError(
                f"the stage {name!r} has nothing to train: no layer fits into a share of {selective.share:g}, no scale is "
                "calibrated; raise the share, or take a recipe with static or timestep scales"
            )
        if not chosen[0] and not selective.global_weight:
            raise HealError(f"the stage {name!r} trains no weights, so it has no local loss; set global_weight above 0")
        stages.append(Stage(name, *chosen, selective.affine and name != "temporal", energy))
    return broadcast_object_list(stages)  # type: ignore[no-any-return]


def _charged(student: nn.Module, pipe: Any, settings: Settings, told: Conditions | None) -> dict[str, Charge]:
    pool = PoolSettings(CHARGED_BATCH, settings.sampler_steps, depth=1, reuse=CHARGED_BATCHES, seed=settings.seed)
    states = StatePool(pipe, pool, range(CHARGED_BATCH), told)
    student.requires_grad_(False).eval()
    device = next(student.parameters()).device
    return charges(student, find_denoiser(pipe), (states.batch(step).to(device) for step in range(CHARGED_BATCHES)))


def _fitting(found: Mapping[str, Charge], names: set[str], limit: float) -> list[str]:
    """All of some layers where they fit into a limit of parameters, else those charged most for their size."""
    if sum(found[name].weights for name in names) <= limit:
        return [*names]
    return worst_layers({name: found[name] for name in names}, limit)


def _part(settings: Settings, stage: Stage, stages: Sequence[Stage]) -> Settings:
    """The settings of one stage: its part of the steps and minutes, where there are several."""
    if len(stages) == 1:
        return settings
    temporal = stage.name == "temporal"
    steps, minutes = settings.steps, settings.minutes
    if steps is not None:
        early = max(1, round(TEMPORAL_TIME * steps))
        steps = early if temporal else max(1, steps - early)
    if minutes is not None:
        minutes *= TEMPORAL_TIME if temporal else 1 - TEMPORAL_TIME
    return replace(settings, steps=steps, minutes=minutes)


def _report(progress: Progress, stage: Stage, number: int, count: int, what: str, done: int, total: int) -> None:
    progress(f"{stage.name} stage, {what.removeprefix('healing, ')}", (number * total + done) // count, TICKS)


def _follow(last: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], stage: Stage) -> list[dict[str, Any]]:
    """The rows of a stage, with steps and seconds that go on where the stage before ended."""
    start = {key: 0 if last is None else last[key] for key in ("step", "seconds")}
    return [
        {**row, "step": start["step"] + row["step"], "seconds": round(start["seconds"] + row["seconds"], 3), "stage": stage.name}
        for row in rows
    ]
