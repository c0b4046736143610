"""The one teacher-student loop: a quantized student learns to predict what its float teacher predicts, without data.

    while the clock runs:   batch = pool(step)    loss = method.loss(student, batch)    AdamW on what the method trains

A `Method` says what is trained and what is minimised; the loop knows neither. States come from the teacher's own sampler
(`states.py`). A run is a function of its settings alone: batches and random numbers depend on (seed, step), so a run that was
stopped or killed continues to the same last bit, and several processes (`accelerate launch`) follow the same loss curve as one.

The state is saved just before an update, with gradients known to be finite: what is on disk has always been seen to work.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import Conditions, find_denoiser
from halfbyte.errors import DivergedError, HealError, StoppedError
from halfbyte.heal.diagnose import culprit
from halfbyte.heal.method import Method
from halfbyte.heal.resume import Log, RunFolder
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import Batch, PoolSettings, StatePool, draw
from halfbyte.runs import StopSignal

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
TICKS = 1000  # units of progress of a whole run


def distill(
    student: nn.Module,
    pipe: Any,
    method: Method,
    settings: Settings,
    *,
    told: Conditions | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Log:
    """Train a student in place.

    Args:
        student: takes the arguments of the teacher's denoiser.
        pipe: the float pipeline whose denoiser is the teacher.
        told: prompts and further arguments of the pipeline's call.
        folder: for the state and the log; None: nothing is written.
        resume: continue the run in that folder, if there is one.
        identity: what identifies model and recipe; a run with another one is not continued.
    Returns:
        The log: rows of step, loss (the mean since the row before), gradient norm, learning rate, seconds of training.
    Raises:
        HealError: when settings, processes and model do not fit together.
        DivergedError: when the loss is no longer finite; the student is put back to the last saved state.
        ResumeError: when the folder's run has another identity; names the field.
        StoppedError: on SIGTERM or Ctrl-C, with the state saved (only with a folder).
    """
    return Run(student, pipe, method, settings, told, folder, resume, dict(identity or {}), progress).go()


class Run:
    """One run of the loop; everything that is saved hangs here."""

    def __init__(
        self,
        student: nn.Module,
        pipe: Any,
        method: Method,
        settings: Settings,
        told: Conditions | None,
        folder: str | os.PathLike[str] | None,
        resume: bool,
        identity: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.student, self.method, self.settings, self.progress = student, method, settings, progress
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.fingerprint = {**identity, "method": method.identity(), "settings": settings.identity()}
        self.folder = self._folder(folder, resume)
        self.stop = StopSignal()
        self.step, self.seconds, self.saved = 0, 0.0, 0.0
        self.sums = [0.0, 0.0, 0.0]  # of loss and gradient norm since the last row of the log, and how many steps that were
        self._prepare(pipe, told)
        self.kept = self.capture()
        found = None if self.folder is None else self.folder.load(self.fingerprint)
        if found is not None:
            self.kept = found
            self.restore()
        self.log = Log(self.folder.path if self.folder and self.accelerator.is_main_process else None, self.step)

    def _folder(self, path: str | os.PathLike[str] | None, resume: bool) -> RunFolder | None:
        if path is None:
            return None
        with self.accelerator.main_process_first():  # the others find the folder made
            return RunFolder(Path(path), resume or not self.accelerator.is_main_process)

    def _prepare(self, pipe: Any, told: Conditions | None) -> None:
        settings, accelerator = self.settings, self.accelerator
        parts = accelerator.num_processes * settings.accumulate
        if settings.batch % parts:
            raise HealError(
                f"a batch of {settings.batch} cannot be shared by {accelerator.num_processes} processes in {settings.accumulate} "
                f"parts each; make it a multiple of {parts}"
            )
        rates = self.method.trained()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in rates)
            parameter.grad = None  # of whatever was done with the student before
        if settings.recompute:
            if not hasattr(self.student, "enable_gradient_checkpointing"):
                raise HealError(f"{type(self.student).__name__} cannot recompute activations; train without recompute")
            self.student.enable_gradient_checkpointing()  # type: ignore[operator]
        device = accelerator.device
        find_denoiser(pipe).requires_grad_(False)
        pipe.to(device)
        known = dict(self.student.named_parameters())
        groups = [
            {"params": [known[name] for name in rates if rates[name] == rate], "rate": rate} for rate in sorted({*rates.values()})
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.model, self.optimizer = accelerator.prepare(self.student.eval(), optimizer)
        live = dict(accelerator.unwrap_model(self.model).named_parameters())
        self.parameters = {name: live[name] for name in rates}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.ema else {}
        share = settings.batch // accelerator.num_processes
        first = accelerator.process_index * share
        part = share // settings.accumulate
        self.lanes = [range(start, start + part) for start in range(first, first + share, part)]
        pool = PoolSettings(settings.batch, settings.sampler_steps, settings.depth, settings.reuse, settings.seed)
        self.pool = StatePool(pipe, pool, range(first, first + share), told, self._check)

    @property
    def done(self) -> float:
        """The share of the run that is over: of steps or of minutes, whichever is further."""
        steps, minutes = self.settings.steps, self.settings.minutes
        return max(self.step / steps if steps else 0.0, self.seconds / 60 / minutes if minutes else 0.0)

    @property
    def rate(self) -> float:
        """The learning rate of this step: linear warm-up, then half a cosine down to 0."""
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        return self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done)))

    def go(self) -> Log:
        """Run to the end of the clock."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
            if self.folder is not None:
                stack.enter_context(self.stop)
            while self.done < 1:
                started = time.perf_counter()
                self._one_step()
                self.seconds += time.perf_counter() - started
                self._report()
            self._finish()
        self.log.signal = self.stop.number
        return self.log

    def _one_step(self) -> None:
        torch.manual_seed(draw(self.settings.seed, 3, self.step, self.accelerator.process_index))
        self.method.before_step(self.step)
        batches, losses = self._backward()
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        loss = torch.stack([part.mean() for part in losses]).mean().detach()
        stop, bad, save, self.seconds = self._agree(self.stop.number, not (loss.isfinite() and norm.isfinite()))
        if bad:
            self._diverged(float(loss), batches, losses)
        if stop or save:
            self._save()
        if stop:
            self._stopped(int(stop))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step += 1
        self.sums = [self.sums[0] + float(self.accelerator.reduce(loss, "mean")), self.sums[1] + float(norm), self.sums[2] + 1]

    def _backward(self) -> tuple[list[Batch], list[Tensor]]:
        """Gradients of the mean loss of this step's batch; the parts it was taken in, and their losses a row."""
        batches, losses = [], []
        for lanes in self.lanes:
            batch = self.pool.batch(self.step, lanes).to(self.accelerator.device)
            waits = lanes is not self.lanes[-1]
            with self.accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
                with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16):
                    loss = self.method.loss(self.model, batch)
                self.accelerator.backward(loss.mean() / self.settings.accumulate)
            batches.append(batch)
            losses.append(loss.detach())
        return batches, losses

    def _agree(self, stop: int, bad: bool) -> tuple[float, float, float, float]:
        """The same decisions in every process: stop signal, failure, whether to save, seconds of training."""
        save = self.seconds - self.saved > 60 * self.settings.save_minutes
        if self.accelerator.num_processes == 1:
            return stop, bad, save, self.seconds
        main = self.accelerator.is_main_process
        own = torch.tensor([stop, bad, save * main, self.seconds * main], device=self.accelerator.device, dtype=torch.float64)
        every = self.accelerator.gather(own[None]).amax(0).tolist()
        return every[0], every[1], every[2], every[3]

    def _average(self) -> None:
        if self.settings.ema is not None:
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), 1 - decay)

    def _report(self) -> None:
        """A row of the log every so often, and the progress."""
        loss = self.sums[0] / max(1, self.sums[2])
        if self.step % self.settings.log_every == 0 or (self.done >= 1 and self.sums[2]):
            row = {"step": self.step, "loss": loss, "gradient_norm": self.sums[1] / self.sums[2], "learning_rate": self.rate}
            self.log.add({**row, "seconds": round(self.seconds, 3)})
            self.sums = [0.0, 0.0, 0.0]
        if self.progress:
            known = self.log.rows[-1]["loss"] if self.log.rows else loss
            self.progress(f"healing, step {self.step}, loss {known:.5f}", int(TICKS * min(1.0, self.done)), TICKS)

    def _finish(self) -> None:
        """Averaged weights in place of the trained ones, after a last save."""
        self._save(finished=True)
        for name, average in self.average.items():
            self.parameters[name].detach().copy_(average)
        self.student.requires_grad_(False)

    def _check(self) -> None:
        """Stop also while the teacher samples; several processes stop together, at the end of a step."""
        if self.stop.number and self.accelerator.num_processes == 1:
            self._save()
            self._stopped(self.stop.number)

    def _stopped(self, number: int) -> None:
        where = "" if self.folder is None else f", saved in {self.folder.path}"
        raise StoppedError(f"stopped at step {self.step}{where}; continue with resume (--resume)", number)

    def _diverged(self, loss: float, batches: Sequence[Batch], losses: Sequence[Tensor]) -> None:
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16):
            reason = culprit(self.accelerator.unwrap_model(self.model), batches, losses)
        failed, kept = self.step, self.kept[1]["step"]
        self.restore()
        raise DivergedError(
            f"the loss became {loss:g} at step {failed}: {reason}. The student is back at step {kept}, the last one saved; "
            "try a smaller learning rate, or train without bf16"
        )

    def _save(self, finished: bool = False) -> None:
        self.saved = self.seconds
        self.kept = self.capture(finished)
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.save(*self.kept)

    def capture(self, finished: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a continued run needs, on the CPU."""
        tensors = {f"parameter/{name}": _whole(parameter) for name, parameter in self.parameters.items()}
        tensors |= {f"average/{name}": _whole(average) for name, average in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{key}/{name}": _whole(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
        entries = {
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "finished": finished,
            "fingerprint": self.fingerprint,
        }
        return tensors, entries

    @torch.no_grad()
    def restore(self) -> None:
        """Take up the state that is kept."""
        tensors, entries = self.kept
        self.step, self.seconds, self.sums = entries["step"], entries["seconds"], list(entries["sums"])
        self.saved = self.seconds
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            parameter.copy_(_like(tensors[f"parameter/{name}"], parameter))
            if name in self.average:
                self.average[name].copy_(_like(tensors[f"average/{name}"], parameter))
            moments = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if moments:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else _like(value, parameter).clone() for key, value in moments.items()
                }


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered where the processes hold a part each."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).to("cpu", copy=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the given one lies: on its device, in its parts."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
