"""`halfbyte heal`: from a quantized folder to a healed one."""

import json
from pathlib import Path
from typing import Any

from halfbyte import api
from halfbyte.checkpoint import write_file
from halfbyte.errors import OutputExistsError
from halfbyte.heal.result import HealResult
from halfbyte.heal.resume import STATE_FILE
from halfbyte.heal.student import denoiser_name, load_student
from halfbyte.heal.verb import heal

RUN_SUFFIX = ".healing"  # the run's own folder lies beside the output: log, state while it runs, results at the end
RESULTS_FILE = "healing.json"


def heal_folder(model: Path, teacher: Path, output: Path, *, resume: bool = False, **options: Any) -> str | None:
    """Heal a quantized folder and save the result packed; OUTPUT.healing keeps log and choices.

    Args:
        options: of `halfbyte.heal`.
    Returns:
        What was done, in a sentence; None in all processes but the first.
    Raises:
        OutputExistsError: when the output exists. HealError and its kinds, CheckpointError: see halfbyte.errors.
    """
    from accelerate import PartialState

    if output.exists():
        raise OutputExistsError(f"{output} exists already; choose another output folder or remove it first")
    run = run_folder(output)
    float_pipe = api.load_float(teacher)
    pipe, student = load_student(model, float_pipe)
    result = heal(student, float_pipe, output=run, resume=resume, **options)
    if not PartialState().is_main_process:
        return None
    pipe.register_modules(**{denoiser_name(pipe): api.pack_model(result.model)})
    api.save(pipe, output)
    write_file(run / RESULTS_FILE, json.dumps(result.to_dict()).encode())
    for state in run.rglob(STATE_FILE):  # quest has one for each stage
        state.unlink()
    return _summary(result, output, run)


def run_folder(output: Path) -> Path:
    """Where a run keeps its state and log, beside the output."""
    return output.with_name(output.name + RUN_SUFFIX)


def _summary(result: HealResult, output: Path, run: Path) -> str:
    last = result.log[-1] if result.log else {"step": 0, "seconds": 0.0, "loss": float("nan")}
    several = sum(len(choice.unique()) > 1 for choice in result.choice.values())
    chosen = f"{several} of {len(result.choice)} layers choose by timestep" if result.choice else _stages(result)
    advice = " (NO BETTER than before: compare both models, or try a lower --learning-rate)"
    return (
        f"{last['step']} steps in {last['seconds'] / 60:.1f} minutes, error at a few states {result.error_before:.4g} to "
        f"{result.error:.4g}{'' if result.error < result.error_before else advice}. {100 * result.share:.1f} % of the parameters "
        f"trained; {chosen}; {result.stored_bytes / 1e6:.2f} MB, {result.stored_before / 1e6:.2f} MB before; at most "
        f"{result.peak_bytes / 1e9:.1f} GB of memory. Written to {output}, the log to {run}"
    )


def _stages(result: HealResult) -> str:
    """How many layers each stage of quest trained."""
    return ", ".join(
        f"{stage} stage: weights of {len(parts['weights'])} layers, scales of {len(parts['scales'])}"
        for stage, parts in result.trained.items()
    )
