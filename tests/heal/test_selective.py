"""QuEST's stage as a method: what it trains, its gradients, its loss, and what it leaves."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import HealError
from halfbyte.heal import selective
from halfbyte.heal.distill import distill
from halfbyte.heal.memory import step_peaks
from halfbyte.heal.selective import LossWeights, Selective, SelectiveLayer, Stage, parameters_of, quantized_layers
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.layers import FAKE_QUANT
from halfbyte.metrics import sqnr
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

TIMED = LayerSpec(WeightSpec("int4"), ActivationSpec("int4", scale="timestep"))
RECIPE = Recipe("timed", TIMED)
TRAINED = ("mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.time_emb_proj", "mid_block.attentions.0.to_q")
SHORT = {"batch": 8, "sampler_steps": 4, "learning_rate": 2e-2, "log_every": 2, "warmup": 2}
MADE = []
MEGA = 1 << 20


@pytest.fixture
def student(pipe):
    """The tiny denoiser, quantized with a scale for each of four timesteps."""
    if not MADE:
        made = copy.copy(pipe)
        made.register_modules(unet=copy.deepcopy(pipe.unet))
        hb.quantize(made, RECIPE, calibration=4, steps=4, simulate=True)
        MADE.append(made.unet)
    return copy.deepcopy(MADE[0])


def method_of(student, pipe, weights=TRAINED, scales=None, affine=False, **options):
    timed = tuple(name for name, layer in quantized_layers(student).items() if layer.activation_scale is not None)
    stage = Stage("test", tuple(weights), timed if scales is None else tuple(scales), affine, dict.fromkeys(weights, 0.5))
    return Selective(student, pipe.unet, stage, LossWeights(**options))


@pytest.fixture
def batch(pipe):
    return StatePool(pipe, PoolSettings(batch=8, sampler_steps=4), range(8)).batch(0)


def prepare(student, method):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in method.trained())


def test_nothing_changes_until_something_is_learned(student, pipe, batch):
    with torch.no_grad():
        before = student(*batch.args).sample
        method = method_of(student, pipe)
        assert torch.equal(student(*batch.args).sample, before)
        assert all(isinstance(layer, SelectiveLayer) for layer in method.layers.values())
        method.remove()
        assert torch.equal(student(*batch.args).sample, before)
    assert not any(isinstance(layer, SelectiveLayer) or layer._forward_hooks for layer in student.modules())


def test_only_what_is_chosen_has_gradients_and_optimizer_state(student, pipe):
    kept = {name: value.clone() for name, value in student.state_dict().items()}
    scales = ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2")
    method, seen = method_of(student, pipe, scales=scales), {}

    wanted = {f"{name}.{part}" for name in TRAINED for part in ("weight", "bias")} | {f"{name}.log_scale" for name in scales}
    assert set(method.trained()) == wanted

    def progress(*_):
        seen.update({name: parameter.grad is not None for name, parameter in student.named_parameters() if parameter.requires_grad})

    distill(student, pipe, method, Settings(steps=6, **SHORT), progress=progress)
    assert set(seen) == wanted
    method.melt()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed == {f"{name}.{part}" for name in TRAINED for part in ("weight", "bias")} | {
        f"{name}.activation_scale" for name in scales
    }
    assert all(type(layer) in FAKE_QUANT.values() for layer in quantized_layers(student).values())


def test_biases_and_norms_are_learned_and_put_back(student, pipe):
    kept = {name: value.clone() for name, value in student.state_dict().items()}
    wanted = {name for name in kept if name.endswith(".bias") or ".norm" in name or "group_norm" in name or "norm_out" in name}
    assert wanted > {"conv_in.bias", "mid_block.resnets.0.norm1.weight", "mid_block.attentions.0.group_norm.weight"}
    for leave in (Selective.melt, Selective.remove):
        method = method_of(student, pipe, weights=(), scales=(), affine=True, local_weight=0)
        assert set(method.trained()) == wanted
        assert parameters_of(student, [method.stage]) == sum(kept[name].numel() for name in wanted)
        distill(student, pipe, method, Settings(steps=6, **SHORT))
        leave(method)
        changed = {name for name, value in student.state_dict().items() if not torch.equal(value, kept[name])}
        assert changed == (wanted if leave is Selective.melt else set())
        student.load_state_dict(kept)


class Net(nn.Module):
    """Every kind of layer in a row."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.flat = nn.Linear(6, 5)
        self.line = nn.Conv1d(5, 7, 3, stride=2)

    def forward(self, sample, timestep):
        x = self.flat(self.up(self.group(self.first(sample))).flatten(2).transpose(1, 2))
        return (self.line(x.transpose(1, 2)),)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    hb.quantize(
        model, Recipe("timed", TIMED, edge=TIMED), [{"sample": INPUT[:, :], "timestep": t} for t in (100, 500, 999)], simulate=True
    )
    return model


INPUT = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([10, 900, 400, 600, 20, 999])
KINDS = ("first", "group", "up", "flat", "line")


class Teacher:
    """As much of a pipeline as the method looks at."""

    def __init__(self, unet):
        self.unet = unet


@pytest.mark.parametrize("weights", [(), KINDS[1::2], KINDS])
def test_rounding_inputs_again_for_the_backward_pass_changes_no_gradient(net, monkeypatch, weights):
    method_of(net, Teacher(copy.deepcopy(net)), weights, scales=KINDS)
    names = [f"{name}.weight" for name in weights] + [f"{name}.log_scale" for name in KINDS]
    learned = [net.get_parameter(name).requires_grad_() for name in names]
    gradients = []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr(selective, "_instead_of", lambda *_: nullcontext())
        gradients.append(torch.autograd.grad(net(INPUT, TIMESTEPS)[0].square().sum(), learned))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("held", [False, True])
def test_gradients_of_inputs_do_not_depend_on_what_is_kept(net, held):
    """Frozen layers keep no rounded input; the gradients that pass through them are the same, to the last bit."""
    plain = copy.deepcopy(net)
    method_of(net, Teacher(plain), weights=() if held else KINDS, scales=())
    gradients = []
    for model in (net, plain):
        x = INPUT.clone().requires_grad_()
        model(x, TIMESTEPS)[0].square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_of_a_scale_is_lsqs_for_the_rows_at_its_timestep(net, name):
    method = method_of(net, Teacher(copy.deepcopy(net)), weights=(), scales=(name,))
    layer = method.layers[name]
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs = net(INPUT, TIMESTEPS)[0]
    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    (outputs * direction).sum().backward()
    found, x = layer.log_scale.grad, seen[0]
    entries = layer.timestep.rows(6)
    assert set(entries.tolist()) == {0, 1, 2}
    count = x[0].numel() * layer.spec.activation.top
    for entry in range(3):  # oracle: the same rounding written out, with the other rows' scales fixed
        scale = layer.activation_scale[entry].clone().requires_grad_()
        own = (entries.repeat_interleave(len(x) // 6) == entry).nonzero().flatten()
        units = x[own] / scale
        levels = units.detach().round().clamp(-8, 7)
        inside = (units >= -8) & (units <= 7)
        passed = torch.where(inside, units + (levels - units).detach(), levels)
        rounded = layer.rounded_input(x).detach().clone()
        rounded[own] = passed * scale
        later = dict(net.named_children())
        after = list(later)[list(later).index(name) + 1 :]
        y = nn.functional.linear(rounded, layer.held, layer.bias) if name == "flat" else operate(layer, rounded)
        y = onwards(net, name, y, after)
        (y * direction).sum().backward()
        assert float(found[entry]) == pytest.approx(float(scale.grad * scale.detach()) / count**0.5, rel=1e-3, abs=1e-4), entry


def operate(layer, x):
    if isinstance(layer, nn.ConvTranspose2d):
        return nn.functional.conv_transpose2d(x, layer.held, layer.bias, layer.stride, groups=layer.groups)
    return layer._conv_forward(x, layer.held, layer.bias)


def onwards(net, name, y, after):
    """What the rest of the net makes of a layer's output."""
    for step in after:
        y = y.flatten(2).transpose(1, 2) if step == "flat" else y.transpose(1, 2) if step == "line" else y
        y = getattr(net, step)(y)
    return y


def test_the_loss_is_local_and_global(student, pipe, batch):
    with torch.no_grad():
        exact, found = outputs(pipe.unet, batch), outputs(student, batch)
        method = method_of(student, pipe, local_weight=3.0, global_weight=2.0)
        losses = method.loss(student, batch)
    local = sum((found[name] - exact[name]).square().flatten(1).mean(1) / 0.5 for name in TRAINED[:2])
    tokens = (found[TRAINED[2]] - exact[TRAINED[2]]).square().flatten(1).mean(1) / 0.5
    whole = (found["conv_out"] - batch.target).square().flatten(1).mean(1)
    assert losses.shape == (8,)
    assert torch.allclose(losses, 2.0 * whole + (local + tokens), rtol=1e-4)


def outputs(model, batch):
    found = {}
    names = [*TRAINED, "conv_out"]
    handles = [model.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: found.__setitem__(n, y)) for n in names]
    model(*batch.args)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("options", [{"local_weight": 0}, {"global_weight": 0}])
def test_parts_of_the_loss_can_be_left_out(student, pipe, batch, options):
    method = method_of(student, pipe, **options)
    prepare(student, method)
    method.loss(student, batch).mean().backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert f"{TRAINED[0]}.weight" in reached
    last = student.get_parameter(
        "up_blocks.1.resnets.1.conv2.log_scale"
    ).grad  # behind all chosen layers: only the prediction tells
    told = last is not None and bool(last.abs().sum() > 0)
    assert told == ("global_weight" not in options)


def test_weights_flip_in_both_directions(student, pipe):
    before = {name: layer.quantized_weight().codes() for name, layer in quantized_layers(student).items()}
    method = method_of(student, pipe)
    distill(student, pipe, method, Settings(steps=12, **{**SHORT, "learning_rate": 0.1}))
    method.melt()
    moved = {name: layer.quantized_weight().levels for name, layer in quantized_layers(student).items()}
    for name, layer in quantized_layers(student).items():
        assert torch.equal(layer.quantized_weight().codes(), before[name]) == (name not in TRAINED), name
    twin = FAKE_QUANT[nn.Conv2d].from_float(pipe.unet.get_submodule(TRAINED[0]), student.get_submodule(TRAINED[0]).spec)
    change = (moved[TRAINED[0]] - twin.quantized_weight().levels).sign()
    assert (change > 0).any()
    assert (change < 0).any()


def test_packed_the_healed_student_has_its_codes_and_scales(student, pipe, batch):
    method = method_of(student, pipe)
    distill(student, pipe, method, Settings(steps=6, ema=0.5, accumulate=2, **SHORT))
    with torch.no_grad():
        trained = {name: (layer.rounded_weight(layer.weight), layer.activation_scale) for name, layer in method.layers.items()}
        learned = {name: layer.learned_scale() for name, layer in method.layers.items() if layer.log_scale is not None}
        expected = student(*batch.args).sample
        method.melt()
        assert torch.equal(student(*batch.args).sample, expected)
        packed = hb.pack(copy.deepcopy(student))
        for name, layer in quantized_layers(student).items():
            twin = packed.get_submodule(name)
            assert torch.equal(twin.levels(), layer.quantized_weight().levels), name
            assert torch.equal(layer.rounded_weight(layer.weight), trained[name][0]), name
            if name in learned:
                assert torch.equal(twin.activation_scale, learned[name])
                assert not torch.equal(twin.activation_scale, trained[name][1])
        assert sqnr(expected, packed(*batch.args).sample) > 25  # float rounding may move an input across a midpoint


def test_memory_stays_below_16_tenths_of_a_float_step(pipe):
    """Bar of the design; on images large enough that outputs, not weights, are what is held."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (16, 32)}
    large = DDIMPipeline(UNet2DModel(32, 1, 1, layers_per_block=1, norm_num_groups=8, **blocks).eval(), DDIMScheduler())
    student = copy.copy(large)
    student.register_modules(unet=copy.deepcopy(large.unet))
    hb.quantize(
        student, Recipe("static", LayerSpec(TIMED.weight, ActivationSpec("int4", scale="static"))), 4, steps=3, simulate=True
    )
    for model in (student.unet, large.unet):
        model.to(memory_format=torch.channels_last)
    batch = StatePool(large, PoolSettings(batch=16, sampler_steps=3), range(16)).batch(0)
    method = method_of(student.unet, large, weights=("down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv2"))
    healing, plain = step_peaks(method, student.unet, large.unet, batch)
    assert MEGA < healing <= 1.6 * plain


def test_refusals(pipe, student):
    with pytest.raises(HealError, match="no trainable quantized layers"):
        quantized_layers(pipe.unet)
    layer = quantized_layers(student)[TRAINED[0]]
    layer.set_weights(torch.stack([layer.weight.detach()] * 2), torch.zeros(4))
    with pytest.raises(HealError, match="holds several weights already"):
        quantized_layers(student)
    for options, words in [
        ({"local_weight": -1}, "local_weight must be >= 0, got -1"),
        ({"scale_rate": float("inf")}, "scale_rate must be >= 0, got inf"),
        ({"local_weight": 0, "global_weight": 0}, "leaves nothing to minimise"),
    ]:
        with pytest.raises(HealError, match=words):
            LossWeights(**options)
