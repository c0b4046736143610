"""States to learn from: right answers in every row, guidance included, and the same ones however the work is split or continued."""

import pytest
import torch

from halfbyte.calibration import Conditions
from halfbyte.errors import HealError
from halfbyte.heal.states import Batch, PoolSettings, StatePool, draw

SETTINGS = PoolSettings(batch=4, sampler_steps=4, depth=2, reuse=1.0, seed=3)
NO_CLASS = 1000  # the label of DiTPipeline's unconditional pass


@pytest.fixture(scope="module")
def guided():
    """A tiny DiT pipeline; its default guidance scale is above 1, so every sampler step has two passes in one call."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=2, patch_size=1
    )
    for parameter in transformer.parameters():  # diffusers starts some layers at zero
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=2)
    return DiTPipeline(transformer.eval(), vae, DDIMScheduler())


def by_row(batch: Batch) -> list[tuple[float, int, list[float]]]:
    """Timestep, label and target of every row, in an order that does not depend on how the batch was put together."""
    rows = zip(batch.timesteps.tolist(), batch.kwargs["class_labels"].tolist(), batch.target.flatten(1).tolist(), strict=True)
    return sorted(rows)


def test_with_guidance_each_pass_is_a_row_with_its_own_answer(guided):
    batch = StatePool(guided, SETTINGS, range(4)).batch(0)
    assert batch.samples == 4
    assert len(batch.timesteps) == len(batch.target) == len(batch.args[0]) == 8
    labels = batch.kwargs["class_labels"].view(4, 2)
    assert (labels[:, 0] < NO_CLASS).all()
    assert (labels[:, 1] == NO_CLASS).all()
    pairs = batch.timesteps.view(4, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert torch.equal(batch.args[0][0::2], batch.args[0][1::2])  # both passes see the same latents
    assert not torch.equal(batch.target[0::2], batch.target[1::2])
    with torch.no_grad():
        answer = guided.transformer(*batch.args, **batch.kwargs, return_dict=False)[0]
    torch.testing.assert_close(answer, batch.target)


def test_the_sampler_is_told_what_the_user_will_tell_it(guided):
    batch = StatePool(guided, SETTINGS, range(4), Conditions(arguments={"guidance_scale": 1.0})).batch(0)
    assert (batch.samples, len(batch.target)) == (4, 4)
    assert (batch.kwargs["class_labels"] < NO_CLASS).all()


def test_any_split_into_lanes_gives_the_same_rows(guided):
    whole = StatePool(guided, SETTINGS, range(4)).batch(7)
    parts = [StatePool(guided, SETTINGS, lanes).batch(7) for lanes in (range(1), range(1, 4))]
    split = sorted(row for part in parts for row in by_row(part))
    for (timestep, label, target), expected in zip(split, by_row(whole), strict=True):
        assert (timestep, label) == expected[:2]
        assert target == pytest.approx(expected[2], rel=1e-4, abs=1e-5)


def test_a_pool_that_starts_late_gives_what_one_that_ran_all_along_gives(guided):
    pool = StatePool(guided, SETTINGS, range(4))
    for step in range(10):
        last = pool.batch(step)
    assert by_row(StatePool(guided, SETTINGS, range(4)).batch(9)) == by_row(last)
    assert len(pool.generations) == SETTINGS.depth


def test_timesteps_mix_within_a_batch_and_numbers_of_steps_differ(guided):
    pool = StatePool(guided, SETTINGS, range(4))
    assert any(len(set(pool.batch(step).timesteps.tolist())) > 1 for step in range(4))
    assert len({SETTINGS.steps_of(generation) for generation in range(20)}) > 1
    assert {PoolSettings(sampler_steps=1).steps_of(generation) for generation in range(5)} == {1}


class Denoiser(torch.nn.Module):
    def forward(self, x, timestep):
        return x * timestep


class OneShort:
    """A sampler that shows its denoiser all images but one."""

    def __init__(self):
        self.unet = Denoiser()

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, batch_size, num_inference_steps, generator):
        self.unet(torch.zeros(batch_size - 1, 2), timestep=1)


def test_predictions_that_cannot_be_told_apart_are_refused():
    with pytest.raises(HealError, match="OneShort made 3 predictions for 4 images; it cannot be told whose they are"):
        StatePool(OneShort(), SETTINGS, range(4)).batch(0)


def test_draws_depend_on_every_part_of_the_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63 - 1, 5), (-1, 5)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert all(0 <= draw(*key) < 2**63 for key in keys)
