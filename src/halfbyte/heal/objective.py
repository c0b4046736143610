"""What an error of the denoiser's prediction counts: just itself, by a factor for its timestep, or by what a step makes of it.

A step of DDIM is linear in the prediction, but for one thing: samplers of pixels clip the image that they foresee. With y the
prediction, x the sample, and the image x0 = p x + q y and the noise r x + s y that they mean,

    next sample = sqrt(abar') clip(x0) + sqrt(1 - abar') (r x + s y)

An error that clipping takes from the image stays in the noise, where the image no longer makes up for most of it; and errors of no
bias become a bias, as half of them is cut: backgrounds turn grey. No factor sees that. `NextSample` is the squared error of the
next sample itself. Without clipping it is the squared error times the square of the factor of the form ddim.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.heal.dfa import denoising_factors, index_of, normalised, previous
from halfbyte.heal.states import Batch

FORMS = ("step", "auto", "ddpm", "ddim", "flow", "off")


class Objective:
    """The mean squared error of every row."""

    gamma: Tensor | None = None  # what an error counts at the entries of the tables, float32 (T,); None: all alike

    def __call__(self, predicted: Tensor, batch: Batch) -> Tensor:
        """float32 (rows,)."""
        return mean_square(predicted, batch.target)

    def identity(self) -> Any:
        """For the fingerprint; plain JSON."""
        return None if self.gamma is None else [round(float(self.gamma[index]), 5) for index in (0, len(self.gamma) // 2, -1)]


class Weighted(Objective):
    """The mean squared error times a factor for the timestep.

    Args:
        timesteps: ascending, as the denoiser takes them. gamma: float32 (T,), the factor from the timestep before up to each.
    """

    def __init__(self, timesteps: Sequence[float], gamma: Tensor) -> None:
        self.timesteps, self.gamma = torch.tensor(timesteps, dtype=torch.float32), gamma

    def __call__(self, predicted: Tensor, batch: Batch) -> Tensor:
        assert self.gamma is not None
        times = self.timesteps.to(predicted.device)
        index = torch.searchsorted(times, batch.timesteps.to(times)).clamp(max=len(times) - 1)
        return mean_square(predicted, batch.target) * self.gamma.to(predicted.device)[index]


class NextSample(Objective):
    """The mean squared error of the sample that a step makes of the prediction, of 1 on average where errors are 1.

    Args:
        scheduler: of diffusers. denoiser: takes the sample as its first argument. steps: of the sampler.
        timesteps: the entries of the tables. seen: timesteps along a trajectory, as the denoiser takes them.
    Raises:
        HealError: as `denoising_factors`.
    """

    def __init__(self, scheduler: Any, denoiser: nn.Module, steps: int, timesteps: Sequence[float], seen: Sequence[float]) -> None:
        flow = not hasattr(scheduler, "alphas_cumprod")
        factors = denoising_factors(scheduler, None if flow else "ddim", steps)
        self.sample, self.largest = next(iter(inspect.signature(denoiser.forward).parameters)), max(seen)
        self.mean = float(factors[self._index(torch.tensor(seen), len(factors))].square().mean())
        self.factors = (factors / self.mean**0.5).float()
        self.gamma = normalised(factors.square(), self._index(torch.tensor(seen), len(factors)))[
            self._index(torch.tensor(timesteps), len(factors))
        ]
        self.range = (
            0.0 if flow or not scheduler.config.get("clip_sample") else float(scheduler.config.get("clip_sample_range", 1.0))
        )
        if self.range:
            self.terms = _terms(scheduler, steps)

    def _index(self, timesteps: Tensor, count: int) -> Tensor:
        return index_of(timesteps, self.largest, count)

    def __call__(self, predicted: Tensor, batch: Batch) -> Tensor:
        device = predicted.device
        index = self._index(batch.timesteps, len(self.factors)).to(device)
        shape = (-1, *[1] * (predicted.ndim - 1))
        error = (predicted.float() - batch.target.float()) * self.factors.to(device)[index].view(shape)
        if self.range:
            x = batch.kwargs[self.sample] if self.sample in batch.kwargs else batch.args[0]
            p, q, image, noise = (term.to(device)[index].view(shape) for term in self.terms)
            channels = x.shape[1]  # what is predicted of the variance follows
            foreseen, exact = (
                (p * x.float() + q * one[:, :channels].float()).clamp(-self.range, self.range) for one in (predicted, batch.target)
            )
            apart = predicted[:, :channels].float() - batch.target[:, :channels].float()
            moved = (image * (foreseen - exact) + noise * apart) / self.mean**0.5
            error = torch.cat([moved, error[:, channels:]], 1)
        losses: Tensor = error.square().flatten(1).mean(1)
        return losses

    def identity(self) -> Any:
        return {"gamma": super().identity(), "range": self.range}


def _terms(scheduler: Any, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, sqrt(abar') and s sqrt(1 - abar') of every timestep, float32 (T,)."""
    now, before = scheduler.alphas_cumprod.double(), previous(scheduler, "ddim", steps)
    signal, noise, one = now.sqrt(), (1 - now).sqrt(), torch.ones_like(now)
    p, q, s = {
        "epsilon": (1 / signal, -noise / signal, one),
        "v_prediction": (signal, -noise, signal),
        "sample": (0 * one, one, -signal / noise),
    }[scheduler.config.prediction_type]
    return p.float(), q.float(), before.sqrt().float(), (s * (1 - before).sqrt()).float()


def objective_of(
    form: str, scheduler: Any, denoiser: nn.Module, steps: int, timesteps: Sequence[float], seen: Sequence[float]
) -> Objective:
    """The objective of a name.

    Args:
        form: off, step, or as `denoising_factors` has them; auto: ddpm or flow.
        The others: as `NextSample` has them.
    Raises:
        HealError: for a name that is none, or does not suit the scheduler.
    """
    if form == "off":
        return Objective()
    if form == "step":
        return NextSample(scheduler, denoiser, steps, timesteps, seen)
    factors = denoising_factors(scheduler, None if form == "auto" else form, steps)  # type: ignore[arg-type]
    seen_at, wanted = (index_of(torch.tensor(times), max(seen), len(factors)) for times in (seen, timesteps))
    return Weighted(timesteps, normalised(factors, seen_at)[wanted])


def mean_square(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every row, float32 (rows,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
