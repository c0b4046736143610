"""Denoising factors against the numbers derived for the schedules of DDPM and LDM, and against what a sampler does."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from halfbyte.errors import HealError
from halfbyte.heal.dfa import denoising_factors, normalised

LINEAR = DDIMScheduler(steps_offset=1, set_alpha_to_one=False)
LDM = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
TIMES = [0, 10, 50, 100, 250, 500, 750, 999]
DDPM_NUMBERS = {
    "linear": (LINEAR, [0.0100, 0.0064, 0.0063, 0.0065, 0.0074, 0.0105, 0.0152, 0.0202]),
    "scaled linear": (LDM, [0.0388, 0.0122, 0.0067, 0.0057, 0.0059, 0.0085, 0.0133, 0.0197]),
}


@pytest.mark.parametrize(("scheduler", "numbers"), DDPM_NUMBERS.values(), ids=DDPM_NUMBERS)
def test_posterior_mean_coefficients(scheduler, numbers):
    assert denoising_factors(scheduler)[TIMES].tolist() == pytest.approx(numbers, abs=6e-5)


def test_ddim_coefficients():
    found = denoising_factors(LINEAR, "ddim", steps=100)[torch.tensor([0, 10, 25, 50, 75, 99]) * 10 + 1]
    assert found.tolist() == pytest.approx([0.0048, 0.0326, 0.0372, 0.0537, 0.0785, 0.1049], abs=5.1e-5)
    found = denoising_factors(LINEAR, "ddim", steps=20)[torch.tensor([0, 19]) * 50 + 1]
    assert found.tolist() == pytest.approx([0.0048, 0.597], abs=5.1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("form", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("timestep", [1, 51, 501, 951])
def test_factors_are_what_a_step_of_the_sampler_does_with_an_error(prediction, form, eta, timestep):
    """An error in the prediction, pushed through one step of diffusers' own sampler."""
    kind = DDPMScheduler if form == "ddpm" else DDIMScheduler
    options = {"steps_offset": 1, "set_alpha_to_one": False} if kind is DDIMScheduler else {"variance_type": "fixed_small"}
    scheduler = kind(prediction_type=prediction, clip_sample=False, **options)
    scheduler.set_timesteps(1000 if form == "ddpm" else 20)
    sample, predicted = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error, moved = 1e-3, []
    for guess in (predicted, predicted + error):
        more = {"eta": eta} if kind is DDIMScheduler else {}
        step = scheduler.step(guess, timestep, sample, generator=torch.Generator().manual_seed(1), **more)
        moved.append(step.prev_sample)
    effect = float((moved[1] - moved[0]).abs().mean()) / error
    assert float(denoising_factors(scheduler, form, 20, eta)[timestep]) == pytest.approx(effect, rel=1e-4)


def test_flow_matching_takes_the_widths_of_euler_steps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    factors = denoising_factors(scheduler, steps=10)
    scheduler.set_timesteps(10)
    widths = scheduler.sigmas.diff().abs()
    inside = scheduler.timesteps < 999
    at = scheduler.timesteps[inside].long()
    assert factors[at].tolist() == pytest.approx(widths[inside].tolist(), abs=2e-3)
    assert factors.shape == (1000,)
    assert (factors > 0).all()


def test_no_signal_at_the_end():
    terminal = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for form in ("ddpm", "ddim"):
        assert denoising_factors(DDIMScheduler(**terminal), form).isfinite().all()
    exact = DDIMScheduler(**terminal | {"prediction_type": "epsilon"})
    exact.alphas_cumprod[-1] = 0.0
    with pytest.raises(HealError, match="no finite denoising factor at timestep 999"):
        denoising_factors(exact)


def test_mean_is_one_over_the_timesteps_trained_on():
    factors = denoising_factors(LINEAR)
    assert float(normalised(factors).mean()) == pytest.approx(1)
    assert float(normalised(factors, [1, 51, 101])[[1, 51, 101]].mean()) == pytest.approx(1)
    ratio = normalised(factors) / factors
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)


def test_refusals():
    with pytest.raises(HealError, match="form 'ddpm' or 'ddim', got 'flow'"):
        denoising_factors(LINEAR, "flow")
    with pytest.raises(HealError, match="form 'flow', got 'ddpm'"):
        denoising_factors(FlowMatchEulerDiscreteScheduler(), "ddpm")
    with pytest.raises(HealError, match="'other' prediction are not known"):
        denoising_factors(DDIMScheduler(prediction_type="other"))
