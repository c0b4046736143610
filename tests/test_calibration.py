"""Calibration: calls recorded from a pipeline; statistics of layer inputs, held against numpy and the layers' own arithmetic."""

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.calibration import (
    HESSIAN_ROWS,
    RESERVOIR,
    Call,
    Conditions,
    InputStatistics,
    collect,
    contraction_rows,
    find_denoiser,
    record_calls,
    sampler_arguments,
)
from halfbyte.errors import CalibrationError, NonFiniteError, SamplerError
from halfbyte.layers import weight_to_matrix


class Denoiser(nn.Module):
    """Two linear layers around a timestep; damages its input afterwards, as samplers that work in place do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, timestep):
        y = self.second(torch.tanh(self.first(x)) * timestep / 100)
        x.zero_()
        return y


class Pipe:
    """A sampler of `steps` denoiser calls a batch; `log` has the (batch, step) of each."""

    def __init__(self):
        torch.manual_seed(0)
        self.unet, self.log, self.batches = Denoiser(), [], 0

    def __call__(self, batch_size, num_inference_steps, generator):
        x = torch.stack([torch.randn(6, generator=one) for one in generator])
        assert len(x) == batch_size
        with torch.no_grad():
            for step in range(num_inference_steps):
                self.log.append((self.batches, step))
                x = x + self.unet(x.clone(), timestep=num_inference_steps - step)
        self.batches += 1


class Prompted(Pipe):
    def __call__(self, prompt, num_inference_steps, generator, output_type="pil"):
        self.prompts = [*getattr(self, "prompts", []), *prompt]
        assert output_type == "latent"
        super().__call__(len(prompt), num_inference_steps, generator)


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timestep_of(call):
    return int(call.kwargs["timestep"])


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.args[0], b.args[0]) and a.kwargs == b.kwargs for a, b in zip(one, other, strict=True)
    )


def test_calls_are_recorded_before_the_model_touches_them_and_repeat_bit_for_bit():
    calls = record_calls(Pipe(), trajectories=5, steps=3, seed=7, batch=2)
    assert [len(call.args[0]) for call in calls] == [2] * 6 + [1] * 3
    assert [timestep_of(call) for call in calls] == [3, 2, 1] * 3
    assert all(call.args[0].abs().min() > 0 for call in calls)  # copies: the model has set its own to zero
    assert same(calls, record_calls(Pipe(), trajectories=5, steps=3, seed=7, batch=2))
    assert not same(calls, record_calls(Pipe(), trajectories=5, steps=3, seed=8, batch=2))
    alone = record_calls(Pipe(), trajectories=5, steps=3, seed=7, batch=1)
    assert torch.equal(
        torch.cat([alone[0].args[0], alone[3].args[0]]), calls[0].args[0]
    )  # noise goes with the image, not the batch


@pytest.mark.parametrize(
    ("batches", "steps", "keep"), [(8, 5, 10), (4, 20, 8), (20, 4, 20), (7, 3, 20), (3, 7, 5), (2, 3, 6), (2, 3, 1)]
)
def test_kept_calls_are_spread_over_steps_and_batches(batches, steps, keep):
    pipe = Pipe()
    calls = record_calls(pipe, trajectories=batches, steps=steps, batch=1, keep=keep)
    everything = record_calls(Pipe(), trajectories=batches, steps=steps, batch=1, keep=10**6)
    assert len(everything) == batches * steps
    places = [next(i for i, one in enumerate(everything) if same([one], [call])) for call in calls]
    assert places == sorted(set(places))
    assert len(places) == min(keep, len(everything))
    per_step, per_batch = (np.bincount([pipe.log[i][axis] for i in places], minlength=n) for axis, n in ((1, steps), (0, batches)))
    assert per_step.max() - per_step.min() <= 1
    assert per_batch.max() - per_batch.min() <= 1


def test_the_hook_is_removed_also_when_the_sampler_fails():
    pipe = Pipe()
    with pytest.raises(ZeroDivisionError):
        record_calls(pipe, trajectories=2, progress=lambda done, total: done // 0)
    assert not pipe.unet._forward_pre_hooks
    seen = []
    record_calls(pipe, trajectories=3, steps=2, batch=2, progress=lambda *state: seen.append(state))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_prompts_are_used_in_turn_and_asked_for():
    pipe = Prompted()
    record_calls(pipe, trajectories=5, steps=1, batch=2, prompts=["a", "b", "c"])
    assert pipe.prompts == ["a", "b", "c", "a", "b"]
    with pytest.raises(CalibrationError, match="Prompted samples from prompts; give at least one"):
        record_calls(pipe, trajectories=1)


def test_class_labels_are_balanced_on_a_real_pipeline():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=2, patch_size=1
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=2)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    calls = record_calls(pipe, trajectories=4, steps=2, batch=2)
    labels = [call.kwargs["class_labels"].tolist() for call in calls]
    assert labels == [[0, 250, 1000, 1000]] * 2 + [[500, 750, 1000, 1000]] * 2  # 1000: no class, for guidance
    assert sampler_arguments(pipe, range(2), 2, 5, 0)["output_type"] == "pt"
    alone = record_calls(pipe, trajectories=4, steps=2, batch=2, arguments={"guidance_scale": 1.0})
    assert [call.kwargs["class_labels"].tolist() for call in alone] == [[0, 250]] * 2 + [[500, 750]] * 2


def test_arguments_that_a_sampler_does_not_take_are_named(pipe):
    with pytest.raises(SamplerError, match=r"Pipe takes no argument 'height', 'width'; it takes 'batch_size', "):
        sampler_arguments(Pipe(), range(2), 2, 5, 0, Conditions(arguments={"width": 1, "height": 1}))
    with pytest.raises(SamplerError, match=r"DDIMPipeline does not sample with these arguments: .*list of generators"):
        record_calls(pipe, trajectories=2, steps=1, arguments={"batch_size": 3})
    with pytest.raises(NonFiniteError, match="by a hook"):  # a ValueError too, but ours
        record_calls(pipe, trajectories=1, steps=1, progress=lambda *_: _refuse())


def _refuse():
    raise NonFiniteError("found by a hook")


def test_pipelines_without_a_denoiser_are_refused():
    class Strange:
        components = {"vae": 1, "scheduler": 2}  # noqa: RUF012

    with pytest.raises(CalibrationError, match=r"Strange has neither a 'unet' nor a 'transformer'.*vae, scheduler"):
        find_denoiser(Strange())
    with pytest.raises(CalibrationError, match="components: none"):
        find_denoiser(object())
    pipe = Pipe()
    pipe.transformer, pipe.unet = pipe.unet, None
    assert find_denoiser(pipe) is pipe.transformer


def test_statistics_are_those_of_numpy():
    torch.manual_seed(0)
    model = Denoiser()
    inputs = [(noisy(4, 6, seed=i) * (i + 1), step) for i, step in enumerate((900, 900, 20))]
    found = collect(model, [Call((x,), {"timestep": step}) for x, step in inputs], ["first", "second"], ["second"])
    first, everything = found["first"], torch.cat([x for x, _ in inputs]).double().numpy()
    assert first.count == everything.size
    assert first.ranges == {900.0: (everything[:8].min(), everything[:8].max()), 20.0: (everything[8:].min(), everything[8:].max())}
    assert first.range == (everything.min(), everything.max())
    assert first.total == pytest.approx(everything.sum())
    assert first.total_square == pytest.approx((everything**2).sum())
    assert first.channel_absmax.numpy() == pytest.approx(np.abs(everything).max(0))
    assert sorted(first.reservoir.tolist()) == sorted(everything.flatten().tolist())  # all of it: there was room
    assert first.hessian is None
    with torch.no_grad():
        hidden = torch.cat([torch.tanh(model.first(x)) * step / 100 for x, step in inputs]).double()
    torch.testing.assert_close(found["second"].hessian[0].double(), hidden.T @ hidden, rtol=1e-5, atol=1e-4)
    assert found["second"].hessian_rows == 12


def test_a_model_without_a_timestep_has_one_range():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    found = collect(model, [Call((noisy(2, 3, 3, 3, seed=i),), {}) for i in range(2)], ["0", "2"])
    assert set(found["0"].ranges) == {None}
    assert found["0"].channel_absmax.shape == (3,)


@pytest.mark.parametrize(
    "sizes", [(4096, 4096), (100, 100, 10_000), (20_000, 5_000, 5_000), (4000, 100, 4000), (1,) * 50 + (9000,)]
)
def test_the_reservoir_is_a_uniform_sample(sizes):
    generator, statistics, bins = torch.Generator().manual_seed(3), [InputStatistics() for _ in range(60)], 10
    values = torch.arange(float(sum(sizes))) / sum(sizes)  # where in the stream a value came from, 0 to 1
    counts = np.zeros(bins)
    for one in statistics:
        start = 0
        for size in sizes:
            one.update(values[start : start + size].view(-1, 1, 1), None, generator)
            start += size
        assert len(one.reservoir) == RESERVOIR
        counts += np.histogram(one.reservoir.numpy(), bins, (0, 1))[0]
    share = counts / counts.sum()
    assert share == pytest.approx(np.full(bins, 1 / bins), abs=0.012)  # 60 x 4096 draws, a few of them twice


def test_a_small_stream_is_kept_whole_and_apart_from_its_source():
    generator, one, x = torch.Generator().manual_seed(0), InputStatistics(), noisy(5, 1, 2)
    expected = sorted([*x.flatten().tolist(), *x.flatten().tolist()])
    one.update(x, 1.0, generator)
    one.update(x, 1.0, generator)
    one.update(x[:0], 2.0, generator)  # an empty batch tells nothing
    x.zero_()
    assert sorted(one.reservoir.tolist()) == expected
    assert set(one.ranges) == {1.0}


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 7, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (11, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d, reflected, stride, dilation": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=2, padding_mode="reflect"),
        (2, 4, 9),
    ),
    "conv1d, groups, unbatched": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 5, 3), (3, 6, 7)),
    "conv2d, stride and padding": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 3, 6, 7)),
    "conv2d, dilation": (lambda: nn.Conv2d(3, 5, (2, 3), dilation=(3, 1), padding=2), (2, 3, 6, 7)),
    "conv2d, same": (lambda: nn.Conv2d(3, 5, (5, 3), padding="same"), (2, 3, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 5, 2, padding="valid"), (2, 3, 6, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 7)),
    "conv2d, replicated, same": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="replicate"), (2, 3, 6, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, (3, 1), groups=3, stride=2), (2, 3, 7, 6)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_hessians_are_those_of_the_layers_own_operation(make, shape):
    """For every weight, the energy of the outputs is the sum over groups of trace(W H W^T)."""
    torch.manual_seed(0)
    layer, x = make().double(), noisy(*shape).double()
    model = nn.Sequential(layer)
    found = collect(model, [Call((x,), {})] * 2, ["0"], ["0"])["0"]
    layer.bias.data.zero_()
    rows = contraction_rows(layer, x)
    for seed in range(3):
        with torch.no_grad():
            layer.weight.copy_(noisy(*layer.weight.shape, seed=seed))
            energy = 2 * layer(x).square().sum()
            matrix = weight_to_matrix(layer, layer.weight).chunk(len(found.hessian))
        of_hessian = sum((w @ h.double() @ w.T).trace() for w, h in zip(matrix, found.hessian, strict=True))
        torch.testing.assert_close(of_hessian, energy, rtol=1e-5, atol=0)
        outputs = torch.stack([r @ w.T for r, w in zip(rows, matrix, strict=True)])
        torch.testing.assert_close(outputs.square().sum() * 2, energy)
    assert found.hessian_rows == 2 * rows.shape[1]


def test_hessians_take_a_bounded_number_of_rows():
    model = nn.Sequential(nn.Linear(3, 3))
    calls = [Call((noisy(HESSIAN_ROWS, 3, seed=i),), {}) for i in range(3)]
    found = collect(model, calls, ["0"], ["0"])["0"]
    assert found.hessian_rows == 3 * (HESSIAN_ROWS // 3)
    torch.testing.assert_close(found.hessian[0] / found.hessian_rows, torch.eye(3), atol=0.05, rtol=0)


def test_transposed_convolutions_have_no_hessian():
    with pytest.raises(CalibrationError, match="have no contraction rows here"):
        contraction_rows(nn.ConvTranspose2d(2, 2, 2), noisy(1, 2, 3, 3))


def test_the_same_seed_gives_the_same_bits_in_training_mode_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.BatchNorm1d(20), nn.Linear(20, 20)).train()
    model[2].eval()
    before, calls = {k: v.clone() for k, v in model.state_dict().items()}, [Call((noisy(500, 20, seed=i),), {}) for i in range(3)]
    one, two, other = (collect(model, calls, ["0", "3"], ["3"], seed=seed) for seed in (1, 1, 2))
    for name, statistics in one.items():
        assert torch.equal(statistics.reservoir, two[name].reservoir)
        assert not torch.equal(statistics.reservoir, other[name].reservoir)
    assert torch.equal(one["3"].hessian, two["3"].hessian)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_damaged_input_names_its_layer_and_leaves_no_hook(bad):
    model, x = Denoiser().train(), noisy(2, 6)
    with pytest.raises(NonFiniteError, match="the input of layer 'second' during calibration holds 8 NaN or infinite values of 16"):
        collect(model, [Call((x, torch.tensor([bad, 1.0])[:, None]), {})], ["first", "second"])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_to_calibrate_on_and_layers_no_input_reaches():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(CalibrationError, match="no calls to calibrate on"):
        collect(model, [], ["used"])
    with pytest.raises(CalibrationError, match=r"1 layers were never reached.*'idle'.*keep"):
        collect(model, [Call((noisy(2, 2),), {})], ["used", "idle"])
