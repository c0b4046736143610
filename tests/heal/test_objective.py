"""What errors count: by the next sample, as diffusers' own sampler makes it, and by factors."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from halfbyte.errors import HealError
from halfbyte.heal.dfa import denoising_factors
from halfbyte.heal.objective import NextSample, Objective, Weighted, mean_square, objective_of
from halfbyte.heal.states import Batch

SEEN = [951.0, 701.0, 451.0, 201.0, 51.0, 1.0]
ENTRIES = [float(time) for time in range(1000)]


class Denoiser(nn.Module):
    def forward(self, sample, timestep):
        raise NotImplementedError


def ddim(**options):
    return DDIMScheduler(steps_offset=1, set_alpha_to_one=False, **options)


def batch_of(times=SEEN, channels=3, extra=0, named=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(times), channels, 4, 4, generator=generator)
    target = torch.randn(len(times), channels + extra, 4, 4, generator=generator)
    times = torch.tensor(times)
    given = ((), {"sample": x, "timestep": times}) if named else ((x, times), {})
    return Batch(*given, target, times, len(times))


def guess(batch, size=0.3):
    return batch.target + size * torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(1))


def moved(scheduler, predicted, batch, steps=20):
    """By diffusers, row by row."""
    scheduler.set_timesteps(steps)
    rows = zip(predicted, batch.timesteps, batch.args[0], strict=True)
    return torch.stack([scheduler.step(one[None], int(time), x[None]).prev_sample[0] for one, time, x in rows])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [{"clip_sample": False}, {}, {"clip_sample_range": 0.5}], ids=str)
def test_the_error_of_what_the_sampler_makes(prediction, clip):
    scheduler, batch = ddim(prediction_type=prediction, **clip), batch_of()
    found = NextSample(scheduler, Denoiser(), 20, ENTRIES, SEEN)
    exact = mean_square(moved(scheduler, guess(batch), batch), moved(scheduler, batch.target, batch))
    ratio = found(guess(batch), batch) / exact
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=2e-3, atol=0)
    factors = denoising_factors(scheduler, "ddim", 20)[torch.tensor(SEEN).long()]
    assert float(ratio[0]) == pytest.approx(1 / float(factors.square().mean()), rel=2e-3)


def test_clipping_takes_errors_away_and_makes_others_worse():
    scheduler, batch = ddim(prediction_type="sample"), batch_of([451.0])
    found = NextSample(scheduler, Denoiser(), 20, ENTRIES, SEEN)
    plain = NextSample(ddim(prediction_type="sample", clip_sample=False), Denoiser(), 20, ENTRIES, SEEN)
    batch.target = torch.full_like(batch.target, -0.5)
    assert float(found(batch.target + 0.1, batch)) == pytest.approx(float(plain(batch.target + 0.1, batch)), rel=1e-5)
    batch.target = torch.full_like(batch.target, -1.5)
    only_noise = float(found(batch.target + 0.1, batch))
    assert only_noise != pytest.approx(float(plain(batch.target + 0.1, batch)), rel=0.1)
    beyond = (batch.target - 0.2).requires_grad_()
    found(beyond, batch).sum().backward()
    assert (beyond.grad < 0).all()  # the noise still pulls it back


@pytest.mark.parametrize("named", [False, True])
def test_what_is_said_of_the_variance_counts_by_its_factor(named):
    scheduler, batch = ddim(prediction_type="epsilon"), batch_of(extra=3, named=named)
    found, predicted = NextSample(scheduler, Denoiser(), 20, ENTRIES, SEEN), guess(batch)
    first = Batch(batch.args, batch.kwargs, batch.target[:, :3], batch.timesteps, batch.samples)
    rest = found.gamma[batch.timesteps.long()] * mean_square(predicted[:, 3:], batch.target[:, 3:])
    torch.testing.assert_close(found(predicted, batch), (found(predicted[:, :3], first) + rest) / 2)


def test_of_a_flow_it_is_the_width_of_the_step():
    scheduler, times = FlowMatchEulerDiscreteScheduler(), [999.0, 500.0, 100.0]
    batch = batch_of(times)
    found = NextSample(scheduler, Denoiser(), 10, ENTRIES, times)
    expected = denoising_factors(scheduler, steps=10)[torch.tensor(times).long()].square()
    ratio = found(guess(batch), batch) / mean_square(guess(batch), batch.target) / expected
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["off", "auto", "ddpm", "ddim", "step"])
def test_names(form):
    batch = batch_of()
    made = objective_of(form, ddim(), Denoiser(), 20, ENTRIES, SEEN)
    assert type(made) is {"off": Objective, "step": NextSample}.get(form, Weighted)
    losses = made(guess(batch), batch)
    assert losses.shape == (len(SEEN),)
    assert (losses > 0).all()
    assert (made.gamma is None) == (form == "off")
    if made.gamma is not None:
        assert float(made.gamma[torch.tensor(SEEN).long()].mean()) == pytest.approx(1, rel=1e-3)
    assert made.identity() == objective_of(form, ddim(), Denoiser(), 20, ENTRIES, SEEN).identity()


def test_fractions_of_one():
    scheduler = FlowMatchEulerDiscreteScheduler()
    whole = objective_of("step", scheduler, Denoiser(), 10, ENTRIES, [999.0, 500.0])
    parts = objective_of("step", scheduler, Denoiser(), 10, [time / 1000 for time in ENTRIES], [0.999, 0.5])
    torch.testing.assert_close(whole.gamma, parts.gamma)
    batch, small = batch_of([500.0, 100.0]), batch_of([0.5, 0.1])
    torch.testing.assert_close(whole(guess(batch), batch), parts(guess(small), small))


def test_a_form_that_does_not_suit_the_scheduler():
    with pytest.raises(HealError, match="form 'flow', got 'ddpm'"):
        objective_of("ddpm", FlowMatchEulerDiscreteScheduler(), Denoiser(), 10, ENTRIES, SEEN)
