"""DFA: how much an error of the denoiser's prediction at timestep t moves the next sample (MSFP's denoising-factor loss).

Plain mean squared error treats all timesteps alike; the sampler does not. The weight gamma_t is the coefficient with which the
predicted quantity enters one sampling step. The paper's own expression is not public; three forms are offered:

    ddpm  (1 - alpha_t) / (sqrt(alpha_t) sqrt(1 - abar_t))                    posterior mean of DDPM (Ho et al. 2020, eq. 11)
    ddim  sqrt(abar_p (1 - abar_t) / abar_t) - sqrt(1 - abar_p - sigma_t^2)   one DDIM step to timestep p (Song et al. 2021, eq. 12)
    flow  |sigma_p - sigma_t|                                                 one Euler step of a flow-matching model

The first two are written for noise prediction. An error dv of a v-prediction is an error sqrt(abar) dv of the noise, an error dx of
a predicted sample is sqrt(abar / (1 - abar)) dx. Weights are scaled to mean 1 over the timesteps trained on, so that the learning
rate keeps its meaning.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import HealError

Form = Literal["ddpm", "ddim", "flow"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def denoising_factors(scheduler: Any, form: Form | None = None, steps: int = 20, eta: float = 0.0) -> Tensor:
    """gamma_t of every timestep of a diffusers scheduler, not normalised.

    Args:
        form: None: flow for flow-matching schedulers, ddpm for all others.
        steps: of the sampler; sets the step width of the forms ddim and flow.
        eta: noise that the form ddim adds: 0 none, 1 as much as DDPM.
    Returns:
        float64 (T,), T = num_train_timesteps of the scheduler; all > 0 and finite.
    Raises:
        HealError: when the scheduler's prediction type or form is none of those above, or a factor is infinite.
    """
    is_flow = not hasattr(scheduler, "alphas_cumprod")
    form = form or ("flow" if is_flow else "ddpm")
    if form not in ("ddpm", "ddim", "flow") or (form == "flow") != is_flow:
        allowed = "'flow'" if is_flow else "'ddpm' or 'ddim'"
        raise HealError(f"{type(scheduler).__name__} needs denoising factors of the form {allowed}, got {form!r}")
    if is_flow:
        return _flow_factors(scheduler, steps)
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise HealError(f"the denoising factors of a {prediction!r} prediction are not known; {', '.join(PREDICTIONS)} are")
    remaining = scheduler.alphas_cumprod.double()  # abar_t: the share of the image in the variance
    before = previous(scheduler, form, steps)
    of_velocity = _ddpm(remaining, before) if form == "ddpm" else _ddim(remaining, before, eta)
    factors: Tensor = of_velocity / {"epsilon": remaining.sqrt(), "v_prediction": 1.0, "sample": (1 - remaining).sqrt()}[prediction]
    if not factors.isfinite().all():
        raise HealError(
            f"a {prediction!r} prediction has no finite denoising factor at timestep {int((~factors.isfinite()).nonzero()[0])}, "
            "where the schedule leaves no signal; train without denoising factors"
        )
    return factors.clamp(min=torch.finfo(torch.float32).tiny)


def previous(scheduler: Any, form: Form, steps: int) -> Tensor:
    """abar of the timestep that a step leads to, float64 (T,): the one before for the form ddpm, else that of a sampler's step."""
    remaining = scheduler.alphas_cumprod.double()
    width = 1 if form == "ddpm" else max(1, len(remaining) // steps)
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).double() if form == "ddim" else torch.tensor(1.0).double()
    return torch.cat([last.expand(min(width, len(remaining))), remaining])[: len(remaining)]


def _ddpm(remaining: Tensor, before: Tensor) -> Tensor:
    """Of v: the noise's coefficient times sqrt(abar), written so that abar = 0 does no harm."""
    return (1 - remaining / before) * before.sqrt() / (1 - remaining).sqrt()


def _ddim(remaining: Tensor, before: Tensor, eta: float) -> Tensor:
    variance = eta**2 * (1 - before) / (1 - remaining) * (1 - remaining / before)
    direction = (1 - before - variance).clamp(min=0).sqrt()
    return (before * (1 - remaining)).sqrt() - remaining.sqrt() * direction


def _flow_factors(scheduler: Any, steps: int) -> Tensor:
    """Step widths in sigma at the sampler's timesteps, interpolated to all others."""
    own = type(scheduler).from_config(scheduler.config)
    shift = {"mu": own.config.max_shift} if own.config.get("use_dynamic_shifting") else {}
    own.set_timesteps(steps, **shift)
    times, widths = own.timesteps.double().flip(0), own.sigmas.double().diff().abs().flip(0)
    every = np.arange(own.config.num_train_timesteps)
    return torch.from_numpy(np.interp(every, times.numpy(), widths.numpy()))


def normalised(factors: Tensor, timesteps: Sequence[int] | Tensor | None = None) -> Tensor:
    """Factors scaled to mean 1 over some timesteps, or over all; float32 (T,)."""
    chosen = factors if timesteps is None else factors[torch.as_tensor(timesteps).long().clamp(0, len(factors) - 1)]
    return (factors / chosen.mean()).float()


def index_of(timesteps: Tensor, largest: float, count: int) -> Tensor:
    """Where timesteps, as the denoiser takes them, stand among `count`; some models, of largest 1, take fractions of 1."""
    stretch = count if largest <= 1 else 1
    return (timesteps.double() * stretch + 0.5).floor().long().clamp(0, count - 1)
