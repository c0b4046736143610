"""`halfbyte heal`: from a quantized folder to a healed one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte import api
from halfbyte.checkpoint import write_file
from halfbyte.errors import OutputExistsError
from halfbyte.heal.resume import STATE_FILE
from halfbyte.heal.student import denoiser_name, load_student
from halfbyte.heal.verb import HealResult, heal

RUN_SUFFIX = ".healing"  # the run's own folder lies beside the output: log, state while it runs, results at the end
RESULTS_FILE = "healing.json"


def heal_folder(
    model: Path, teacher: Path, output: Path, *, prompts: Sequence[str] = (), resume: bool = False, **options: Any
) -> str | None:
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
    result = heal(student, float_pipe, prompts=prompts, output=run, resume=resume, **options)
    if not PartialState().is_main_process:
        return None
    pipe.register_modules(**{denoiser_name(pipe): api.pack_model(result.model)})
    api.save(pipe, output)
    write_file(run / RESULTS_FILE, json.dumps(result.to_dict()).encode())
    (run / STATE_FILE).unlink(missing_ok=True)
    return _summary(result, output, run)


def run_folder(output: Path) -> Path:
    """Where a run keeps its state and log, beside the output."""
    return output.with_name(output.name + RUN_SUFFIX)


def _summary(result: HealResult, output: Path, run: Path) -> str:
    last = result.log[-1] if result.log else {"step": 0, "seconds": 0.0, "loss": float("nan")}
    several = sum(len(choice.unique()) > 1 for choice in result.choice.values())
    return (
        f"{last['step']} steps in {last['seconds'] / 60:.1f} minutes, loss {result.log[0]['loss'] if result.log else 0:.5f} to "
        f"{last['loss']:.5f}; {several} of {len(result.choice)} layers choose by timestep; {result.stored_bytes / 1e6:.2f} MB, "
        f"{result.stored_before / 1e6:.2f} MB before. Written to {output}, the log to {run}"
    )
