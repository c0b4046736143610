"""Tables over time: scales and weight sets chosen by timestep, in trainable and packed layers, copied, cast, saved and loaded."""

import copy
import json

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibration import Call
from halfbyte.conversion import packed_layers
from halfbyte.errors import CalibrationError, CorruptError
from halfbyte.formats import get_grid, round_to_grid
from halfbyte.layers import FakeQuant, follow_timesteps
from halfbyte.presets import PRESETS
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

STEPS = [10.0, 20.0, 40.0]
GRIDS = [ActivationSpec("int4", scale="timestep"), ActivationSpec("ue1m3", zero_point=True, scale="timestep")]


class Denoiser(nn.Module):
    """Its inner layer sees inputs that grow with the timestep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, timestep):
        return self.last(self.inner(self.first(x) * timestep))


def recipe(activation):
    return Recipe("over-time", LayerSpec(WeightSpec("int8", scale="absmax"), activation), edge=None)


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
CALLS = [Call((X, step), {}) for step in (40.0, 10.0, 20.0)]


def made(activation, simulated=False):
    model = Denoiser()
    hb.quantize(model, recipe(activation), calibration=CALLS, simulate=simulated)
    return model


@pytest.mark.parametrize("activation", GRIDS, ids=lambda spec: spec.grid)
@torch.no_grad()
def test_every_timestep_has_the_scale_of_least_error(activation):
    model, plain = made(activation), Denoiser()
    layer = model.inner
    assert layer.activation_scale.shape == (3,)
    for row, step in enumerate(STEPS):
        seen = plain.first(X) * step
        grid, zero = get_grid(activation.grid), 0 if layer.activation_zero is None else int(layer.activation_zero[row])
        scales = seen.abs().max() * torch.linspace(0.02, 0.4, 300)[:, None, None]
        errors = ((round_to_grid(seen / scales + zero, grid) - zero) * scales - seen).square().mean((1, 2))
        found = layer.activation_scale[row]
        error = ((round_to_grid(seen / found + zero, grid) - zero) * found - seen).square().mean()
        assert error <= errors.min() * 1.02
        assert found == pytest.approx(layer.activation_scale[0].item() * step / STEPS[0], rel=1e-4)
    for step, row in ((1.0, 0), (10.0, 0), (10.5, 1), (20.0, 1), (21.0, 2), (40.0, 2), (999.0, 2)):
        model(X, step)
        assert layer.fixed_scale().scale == layer.activation_scale[row], step


@pytest.mark.parametrize("activation", GRIDS, ids=lambda spec: spec.grid)
@torch.no_grad()
def test_trainable_and_packed_layers_choose_alike(activation):
    trainable, packed = made(activation, simulated=True), made(activation)
    outputs = [packed(X, step) for step in STEPS]
    for step, output in zip(STEPS, outputs, strict=True):
        torch.testing.assert_close(trainable(X, step), output, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(outputs[0] * 2, outputs[1], rtol=1e-2)


@torch.no_grad()
def test_copies_and_loaded_models_follow_their_own_calls(tmp_path):
    model = made(GRIDS[0])
    loaded = hb.load(hb.save(model, tmp_path / "out"), into=Denoiser())
    models = [model, copy.deepcopy(model), loaded]
    expected = {step: model(X, step) for step in STEPS}
    for one, step in zip(models, STEPS, strict=True):
        assert torch.equal(one(X, step), expected[step])
    assert [one.inner.timestep.value for one in models] == STEPS
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["timesteps"] == STEPS


def test_scales_stay_float32_and_zero_points_integers_in_every_cast():
    layer = made(GRIDS[1]).to(torch.bfloat16).inner
    assert (layer.activation_scale.dtype, layer.activation_zero.dtype) == (torch.float32, torch.uint8)


def test_a_layer_that_follows_nobody_says_so():
    layer = made(GRIDS[0]).inner
    layer.timestep = None
    with pytest.raises(CalibrationError, match="tables over 3 timesteps but follows no denoiser"):
        layer(X)
    with pytest.raises(CalibrationError, match="no timestep is known yet"):
        made(GRIDS[0]).inner(X)
    with pytest.raises(CalibrationError, match="has no argument named timestep"):
        follow_timesteps(nn.Sequential(nn.Linear(2, 2)), STEPS)


@pytest.mark.parametrize("name", ["quartz-w4a4", "int4-w4a4", "int8-w8a8"])
@torch.no_grad()
def test_weight_sets_are_chosen_by_timestep_and_share_nothing_else(name, tmp_path):
    model = Denoiser()
    hb.quantize(model, name, simulate=True)
    model.inner.set_weights(torch.stack([model.inner.weight, -model.inner.weight]), torch.tensor([1, 0, 1]))
    follow_timesteps(model, STEPS)
    plain = Denoiser()
    hb.quantize(plain, name)
    trainable = copy.deepcopy(model)
    hb.pack(model)
    assert model.inner.weight_codes.shape == (2, *plain.inner.weight_codes.shape)
    loaded = hb.load(hb.save(model, tmp_path / "out"), into=Denoiser())
    for step, chosen in zip(STEPS, (1, 0, 1), strict=True):
        hidden = plain.first(X) * step
        product = plain.inner(hidden) - plain.inner.bias
        expected = plain.last((-product if chosen else product) + plain.inner.bias)
        assert torch.equal(model(X, step), loaded(X, step))
        torch.testing.assert_close(model(X, step), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trainable(X, step), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(trainable.inner, FakeQuant)
    assert packed_layers(loaded)["inner"].spec.describe().split(" x ")[0].endswith("x2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timesteps": []}, "it lists no timesteps"),
        ({"timesteps": [1, 1, 2]}, "list of ascending numbers"),
        ({"timesteps": "soon"}, "list of ascending numbers"),
        ({"timesteps": [1.0, float("inf"), 3.0]}, "list of ascending numbers"),
        ({"timesteps": [1.0, 2.0]}, r"activation_scale is F32 of shape \(3,\); the config asks for F32 of shape \(2,\)"),
    ],
)
def test_a_config_that_does_not_fit_its_tables_is_refused(tmp_path, change, words):
    folder = hb.save(made(GRIDS[0]), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=words):
        hb.load(folder, into=Denoiser())


@torch.no_grad()
def test_a_search_of_grids_leaves_scales_for_every_timestep():
    class OneSided(Denoiser):
        def forward(self, x, timestep):
            return self.last(self.inner(nn.functional.silu(self.first(x)) * 1.0 + 0.0 * timestep) * timestep)

    model = OneSided()
    result = hb.quantize(model, PRESETS["quest-w4a4"].replace(edge=None), calibration=CALLS)
    layers = {layer.name: layer for layer in result.layers}
    assert layers["inner"].spec.activation.grid == "ue1m3"  # skewed, though the trace ends at the product
    assert model.inner.activation_scale.shape == model.inner.activation_zero.shape == (3,)
    outputs = [model(X, step) for step in STEPS]
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
def test_a_pipeline_with_scales_over_time_runs_any_sampler(pipe, tmp_path):
    from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

    hb.quantize(pipe, Recipe("t", LayerSpec(WeightSpec("int4"), GRIDS[0])), calibration=2, steps=4)
    loaded = hb.load(hb.save(pipe, tmp_path / "out"))
    assert len(loaded.unet.mid_block.resnets[0].conv1.activation_scale) == 4
    for scheduler, steps in ((pipe.scheduler, 3), (pipe.scheduler, 9), (DPMSolverMultistepScheduler(), 5)):
        images = [
            DDPMPipeline(one.unet, scheduler)(2, torch.Generator().manual_seed(0), steps, output_type="np").images
            for one in (pipe, loaded)
        ]
        assert (images[0] == images[1]).all()
        assert images[0].std() > 0


SAMPLERS = {
    "DDIM, few steps": ("DDIMScheduler", 3),
    "DDIM, many steps": ("DDIMScheduler", 50),
    "ancestral": ("DDPMScheduler", 7),
    "DPM-Solver": ("DPMSolverMultistepScheduler", 8),
    "Euler, fractions of steps": ("EulerDiscreteScheduler", 6),
}


@pytest.fixture(scope="module")
def quest():
    """A packed denoiser whose preset was calibrated at four timesteps of DDIM."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    pipe = DDIMPipeline(UNet2DModel(8, 1, 1, layers_per_block=1, **blocks).eval(), DDIMScheduler())
    hb.quantize(pipe, "quest-w4a8", calibration=2, steps=4)
    return pipe.unet


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
@pytest.mark.parametrize(("kind", "steps"), SAMPLERS.values(), ids=SAMPLERS)
@torch.no_grad()
def test_in_any_sampler_every_call_has_the_scales_of_the_nearest_timestep_at_or_above(quest, kind, steps):
    import diffusers

    layer, scheduler = quest.mid_block.resnets[0].conv1, getattr(diffusers, kind)()
    calibrated = list(layer.timestep.calibrated)
    assert len(calibrated) == len(layer.activation_scale.unique()) == 4
    scheduler.set_timesteps(steps)
    assert not set(scheduler.timesteps.tolist()) <= set(calibrated)
    sample = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        made = quest(scheduler.scale_model_input(sample, timestep), timestep).sample
        above = [row for row, known in enumerate(calibrated) if known >= timestep]
        assert layer.fixed_scale().scale == layer.activation_scale[above[0] if above else -1], timestep
        sample = scheduler.step(made, timestep, sample).prev_sample
    assert sample.isfinite().all()


def test_a_checkpoint_without_one_of_its_tables_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = hb.save(made(GRIDS[0]), tmp_path / "out")
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    del tensors["inner.activation_scale"]
    save_file(tensors, shard)
    with pytest.raises(CorruptError, match="truncated or altered"):
        hb.load(folder, into=Denoiser())
