"""LoRA hubs and their router: gradients against finite differences, merging against the trained layers, the choice over time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import CalibrationError, HealError
from halfbyte.heal.distill import distill
from halfbyte.heal.objective import Weighted
from halfbyte.heal.routing import LoRASettings, Routing, by_choice
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.heal.talora import ROUTING, TALoRA, last_of_runs
from halfbyte.layers import FAKE_QUANT, FakeQuant, apply_layer
from halfbyte.metrics import sqnr
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, WeightSpec

FP4 = Recipe("fp4", LayerSpec(WeightSpec("e2m1"), ActivationSpec("e2m1")))
TIMES = list(range(1000))


class Net(nn.Module):
    """Every kind of layer, grouped and dilated ones too, in a row."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.flat = nn.Linear(6, 5)
        self.line = nn.Conv1d(5, 7, 3, stride=2)
        self.last = nn.ConvTranspose1d(7, 4, 3)

    def forward(self, sample, timestep):
        x = self.up(self.depth(self.group(self.first(sample))))
        x = self.flat(x.flatten(2).transpose(1, 2))
        return (self.last(self.line(x.transpose(1, 2))),)


def healing(model, seed=0, **options):
    """A student with hubs whose B are random, so that LoRAs differ."""
    hb.quantize(model, FP4.replace(edge=FP4.inner), simulate=True)
    method = TALoRA(model, TIMES, LoRASettings(**{"rank": 4, **options}), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for layer in method.layers.values():
        layer.lora_b.data = 0.2 * torch.randn(layer.lora_b.shape, generator=draw)
    return method


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


INPUT = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([10, 900, 400, 600, 20, 999])


def test_a_new_hub_changes_nothing(build, call):
    model = build("UNet2DModel")
    hb.quantize(model, FP4, simulate=True)
    before = model(**call("UNet2DModel")).sample
    method = TALoRA(model, TIMES, LoRASettings(loras=3))
    assert torch.equal(model(**call("UNet2DModel")).sample, before)
    assert set(method.layers) == {name for name, layer in model.named_modules() if isinstance(layer, FakeQuant)} - {
        "conv_in",
        "conv_out",
    }


@pytest.mark.parametrize("loras", [1, 2, 3])
def test_mixed_timesteps_are_the_same_as_one_at_a_time(net, loras):
    method = healing(net, loras=loras)
    with torch.no_grad():
        mixed = net(INPUT, TIMESTEPS)[0]
        single = torch.cat([net(x[None], t)[0] for x, t in zip(INPUT, TIMESTEPS, strict=True)])
    assert torch.allclose(mixed, single, atol=1e-5)
    assert len(method.routing.table().unique()) == loras


def test_rows_of_one_timestep_are_neighbours():
    x, chosen = torch.arange(10.0)[:, None], torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 1, 2])
    assert by_choice(x, chosen, lambda part, number: part * 10**number).flatten().tolist() == [
        value * 10**number for value, number in zip(range(10), chosen.tolist(), strict=True)
    ]
    routing = Routing(1, TIMES, LoRASettings())
    with pytest.raises(CalibrationError, match="outside its denoiser"):
        routing.of(0, 4)
    routing._choose(None, (), {"": torch.tensor([0.0, 999.0])})
    assert routing.of(0, 6)[0].tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(CalibrationError, match="5 rows in a call with 2 timesteps"):
        routing.of(0, 5)


@pytest.mark.parametrize("name", ["first", "group", "depth", "up", "flat", "line", "last"])
def test_gradients_are_those_of_the_unrounded_layer(net, name, monkeypatch):
    """Straight through: as if Q were not there. Without rounding the same code must match finite differences."""
    method = healing(net, loras=2)
    monkeypatch.setattr(FakeQuant, "rounded_weight", lambda self, weight: weight)
    monkeypatch.setattr(FakeQuant, "rounded_input", lambda self, x: x)
    net.double()
    layer, routing = method.layers[name], method.routing
    routing.features, routing.prior, layer.unit = routing.features.double(), routing.prior.double(), layer.unit.double()
    x = torch.randn(4, *{"flat": (3, 6), "line": (5, 9), "last": (7, 5), "first": (4, 6, 6)}.get(name, (8, 6, 6))).double()
    target = torch.randn_like(layer_output(net, layer, x))

    def loss():
        return (layer_output(net, layer, x) * target).sum()

    loss().backward()
    for parameter in (layer.lora_a, layer.lora_b):
        for index in [(0, 0, 0), (1, 1, 2), (0, 2, 1)]:
            change = 1e-4
            values = []
            for sign in (1, -1):
                parameter.data[index] += sign * change
                values.append(float(loss().detach()))
                parameter.data[index] -= sign * change
            assert float(parameter.grad[index]) == pytest.approx((values[0] - values[1]) / (2 * change), rel=1e-5, abs=1e-8)


def layer_output(net, layer, x):
    """One layer within a call at two timesteps."""
    layer.routing._choose(None, (torch.tensor([10.0, 900.0]),), {"timestep": torch.tensor([10.0, 900.0])})
    return layer(x)


def test_straight_through_gradients_ignore_the_rounding(net):
    """With rounding: the gradient of the rounded layer's loss with respect to W + BA, carried on to A and B unrounded."""
    method = healing(net, loras=1)
    layer = method.layers["first"]
    y = layer_output(net, layer, INPUT[:4])
    y.square().sum().backward()
    rounded = layer.rounded_weight(layer.healed_weight(0)).detach().requires_grad_()
    apply_layer(layer, layer.rounded_input(INPUT[:4]), rounded, layer.bias).square().sum().backward()
    correction = layer.correction(0)
    expected = torch.autograd.grad(correction, [layer.lora_a, layer.lora_b], rounded.grad)
    for parameter, gradient in zip((layer.lora_a, layer.lora_b), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loras", [2, 3])
@pytest.mark.parametrize("name", ["first", "group", "up", "flat"])
def test_the_routers_gradient_is_that_of_the_weighted_sum(net, name, loras):
    """Oracle: every row its own weight W + sum_h w_h B_h A_h with w = onehot - p + p straight-through, rounding passed through."""
    method = healing(net, loras=loras)
    layer, routing = method.layers[name], method.routing
    routing.listening = True
    x = torch.randn(4, *{"flat": (3, 6), "first": (4, 6, 6)}.get(name, (8, 6, 6)))
    y = layer_output(net, layer, x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    found = {key: parameter.grad.clone() for key, parameter in routing.named_parameters()}
    routing.zero_grad()
    layer_output(net, layer, x)
    _, probability = routing.of(layer.number, 4)
    chosen = probability.detach().argmax(-1)
    weights = nn.functional.one_hot(chosen, loras) - probability.detach() + probability
    total, quantized = 0.0, layer.rounded_input(x)
    for row in range(4):
        weight = layer.weight + sum(weights[row, hub] * layer.correction(hub).detach() for hub in range(loras))
        total = (
            total + (apply_layer(layer, quantized[row : row + 1], layer.rounded_weight(weight), layer.bias) * direction[row]).sum()
        )
    total.backward()
    for key, parameter in routing.named_parameters():
        assert torch.allclose(found[key], parameter.grad, rtol=1e-3, atol=1e-5), key
    assert routing.outer.weight.grad.abs().sum() > 0


def test_a_router_that_does_not_listen_learns_nothing(net):
    method = healing(net, loras=2, router_every=3)
    heard = []
    for step in range(4):
        net.zero_grad(set_to_none=True)
        method.before_step(step)
        net(INPUT, TIMESTEPS)[0].square().sum().backward()
        heard.append(method.routing.outer.weight.grad is not None)
    assert heard == [True, False, False, True]


def choose(routing):
    """Make the router's choice differ from layer to layer."""
    draw = torch.Generator().manual_seed(3)
    routing.outer.weight.data = torch.randn(routing.outer.weight.shape, generator=draw)
    routing.outer.bias.data = torch.randn(routing.outer.bias.shape, generator=draw)


STATIC = FP4.replace(inner=LayerSpec(WeightSpec("e2m1"), ActivationSpec("ue2m2", zero_point=True, scale="static")))
TIMED = FP4.replace(inner=LayerSpec(WeightSpec("e2m1"), ActivationSpec("e2m1", scale="timestep")))


@pytest.mark.parametrize("recipe", [STATIC, TIMED])
@pytest.mark.parametrize("loras", [1, 3])
def test_learned_scales_and_biases_are_melted_too(pipe, recipe, loras):
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    hb.quantize(student, recipe, calibration=2, steps=4, simulate=True)
    unet, name = student.unet, "mid_block.resnets.0.conv1"
    before = copy.deepcopy(unet.get_submodule(name))
    times = list(before.timestep.calibrated) if recipe is TIMED else TIMES
    method = TALoRA(unet, times, LoRASettings(loras=loras, rank=4))
    if loras > 1:
        choose(method.routing)
    distill(unet, pipe, method, Settings(steps=4, batch=8, sampler_steps=4, learning_rate=0.05, warmup=1, reuse=4.0))
    layer, row = method.layers[name], method.routing.table()[method.layers[name].number]
    assert layer.log_scale.abs().max() > 1e-3
    assert not torch.equal(layer.bias, before.bias)
    sample, steps = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 250, 500, 990])
    with torch.no_grad():
        trained = [unet(sample, time).sample for time in steps]
    method.melt()
    healed = unet.get_submodule(name)
    with torch.no_grad():
        assert all(torch.equal(unet(sample, time).sample, one) for time, one in zip(steps, trained, strict=True))
    assert torch.equal(healed.bias, layer.bias)
    for time in (0, 333, 999):
        for one in (healed, before):
            if one.timestep is not None:
                one.timestep.set(time)
        hub = int(row[np.searchsorted(times, time).clip(max=len(times) - 1)])
        assert torch.equal(healed.fixed_scale().scale, before.fixed_scale().scale * layer.log_scale.detach()[hub].exp())
    packed = hb.pack(copy.deepcopy(unet))
    for key in method.layers:  # whole predictions may differ: one input at a midpoint moves all that follow
        layer, twin = unet.get_submodule(key), packed.get_submodule(key)
        assert torch.equal(twin.activation_scale, layer.activation_scale)
        for number in range(layer.spec.weight.sets):
            assert torch.equal(twin.levels(number), layer.quantized_weight(number).levels)
    with torch.no_grad():
        assert max(sqnr(one, packed(sample, time).sample) for time, one in zip(steps, trained, strict=True)) > 100


def test_gains_of_norms_are_learned_or_put_back(pipe):
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, FP4, simulate=True)
    known = {name: value.clone() for name, value in student.named_parameters() if "norm" in name}
    for leave in (TALoRA.remove, TALoRA.melt):
        method = TALoRA(student, TIMES, LoRASettings(rank=4))
        assert set(method.norms) == set(known)
        distill(student, pipe, method, Settings(steps=3, batch=4, sampler_steps=2, warmup=1))
        assert all(not torch.equal(student.get_parameter(name), value) for name, value in known.items())
        leave(method)
        same = {torch.equal(student.get_parameter(name), value) for name, value in known.items()}
        assert same == {leave is TALoRA.remove}


def test_scales_and_biases_stay_where_they_are_not_to_be_learned(pipe):
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    hb.quantize(student, STATIC, calibration=2, steps=2, simulate=True)
    method = TALoRA(student.unet, TIMES, LoRASettings(scale_rate=0, affine=False))
    assert {name.rpartition(".")[2] for name in method.trained()} == {"lora_a", "lora_b", "weight", "bias"}  # the last two: router
    assert all(name.startswith(ROUTING) for name in method.trained() if name.endswith(("weight", "bias")))


def test_tables_have_an_entry_for_each_run_of_equal_choices(build):
    table = torch.tensor([[0, 0, 1, 1, 1, 0], [2, 2, 2, 2, 0, 0]])
    assert last_of_runs(table).tolist() == [1, 3, 4, 5]
    assert last_of_runs(torch.zeros(3, 7)).tolist() == [6]
    model = build("UNet2DModel")
    method = healing(model, loras=2)
    choices = method.melt()
    layer = model.mid_block.resnets[0].conv1
    assert layer.timestep.calibrated == (499.0, 999.0)
    assert layer.weight_choice.tolist() == [0, 1]
    assert all(len(choice) == 1000 for choice in choices.values())


@pytest.mark.parametrize("loras", [1, 2, 4])
def test_melted_weights_are_the_trained_students_codes(build, call, loras):
    model = build("UNet2DModel")
    method = healing(model, loras=loras)
    if loras > 1:
        choose(method.routing)
    table, layers = method.routing.table(), dict(method.layers)
    trained = copy.deepcopy(model)
    choices = method.melt()
    several = 0
    for row, (name, layer) in zip(table, layers.items(), strict=True):
        healed = model.get_submodule(name)
        assert type(healed) in FAKE_QUANT.values()
        assert not hasattr(healed, "lora_a")
        several += healed.spec.weight.sets > 1
        for timestep in (0, 10, 499, 500, 999):
            hub, number = int(row[timestep]), int(choices[name][timestep])
            expected = layer.rounded_weight(layer.healed_weight(hub))
            found = healed.quantized_weight(number)
            assert torch.equal(healed.rounded_weight(healed.float_weight(number)), expected)
            assert torch.equal(found.scale, layer.weight_scale)
        assert healed.spec.weight.sets == len(row.unique())
    assert (several > 5) == (loras > 1)
    arguments = call("UNet2DModel")
    for timestep in (3, 250, 777):
        arguments["timestep"] = torch.tensor(timestep)
        with torch.no_grad():
            assert torch.equal(model(**arguments).sample, trained(**arguments).sample)


def test_packed_the_healed_model_gives_the_same_codes_and_images(build, call):
    model = build("UNet2DModel")
    method = healing(model, loras=2)
    choose(method.routing)
    method.melt()
    packed = hb.pack(copy.deepcopy(model))
    for name, layer in model.named_modules():
        if isinstance(layer, FakeQuant):
            twin = packed.get_submodule(name)
            for number in range(layer.spec.weight.sets):
                assert torch.equal(twin.levels(number), layer.quantized_weight(number).levels), name
    arguments = call("UNet2DModel")
    for timestep in (0, 499, 500, 999):
        arguments["timestep"] = torch.tensor(timestep)
        with torch.no_grad():
            expected = model(**arguments).sample
            assert sqnr(expected, packed(**arguments).sample) > 25  # float rounding may move an input across a midpoint


def test_splits_and_routers_start_with_equal_parts():
    for routing in ("split", "router"):
        table = Routing(3, TIMES, LoRASettings(loras=4, routing=routing)).table()
        assert table.shape == (3, 1000)
        assert (table == torch.arange(1000) // 250).all()
    assert not Routing(3, TIMES, LoRASettings(loras=4, routing="split")).learns
    assert not Routing(3, TIMES, LoRASettings(loras=1)).learns
    fractions = Routing(2, [t / 1000 for t in TIMES], LoRASettings())
    assert torch.allclose(fractions.features, Routing(2, TIMES, LoRASettings()).features, atol=1e-3)


@pytest.mark.slow
def test_the_router_finds_the_timesteps_that_need_different_weights(pipe):
    """Two tasks: below timestep 300 the teacher's prediction is flipped. A split in the middle must move there."""
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, Recipe("w", LayerSpec(WeightSpec("e2m1")), edge=None), simulate=True)

    class Flipped(TALoRA):
        def loss(self, model, batch):
            flip = torch.where(batch.timesteps < 300, -1.0, 1.0).view(-1, 1, 1, 1)
            batch.target = batch.target * flip
            return super().loss(model, batch)

    method = Flipped(student, TIMES, LoRASettings(rank=8, router_every=1, router_rate=1.0))
    settings = Settings(steps=120, batch=8, sampler_steps=20, learning_rate=3e-2, reuse=4.0)
    log = distill(student, pipe, method, settings)
    table = method.routing.table().float()
    at = table.mean(0)  # the share of layers that use LoRA 1
    assert at[100] < at[700]
    assert log.rows[-1]["loss"] < log.rows[0]["loss"]
    middle = (table[:, 250:500].mean(1) > 0.5).float().mean()
    assert middle > 0.3, "many layers serve 300..500 with the LoRA of the noisy end"


def test_refusals(build):
    with pytest.raises(HealError, match=r"no trainable quantized layers; run halfbyte\.quantize with simulate=True"):
        TALoRA(build("UNet2DModel"), TIMES, LoRASettings())
    model = build("UNet2DModel")
    hb.quantize(model, "int8-w8a8", simulate=True)
    with pytest.raises(HealError, match="none of the 51 quantized layers has weights of fewer than 8 bits"):
        TALoRA(model, TIMES, LoRASettings())
    for options, words in [
        ({"loras": 0}, "loras must be 1"),
        ({"rank": -1}, "rank must"),
        ({"scale_rate": -1}, "scale_rate must be >= 0"),
        ({"routing": "x"}, "'router' or 'split'"),
    ]:
        with pytest.raises(HealError, match=words):
            LoRASettings(**options)
    healed = build("UNet2DModel")
    healing(healed).melt()
    with pytest.raises(HealError, match="holds several weights already"):
        TALoRA(healed, TIMES, LoRASettings())


def test_scales_over_time_are_each_rows_own(pipe):
    recipe = FP4.replace(inner=LayerSpec(WeightSpec("e2m1"), ActivationSpec("e2m1", scale="timestep")))
    student = copy.copy(pipe)
    student.register_modules(unet=copy.deepcopy(pipe.unet))
    hb.quantize(student, recipe, calibration=2, steps=3, simulate=True)
    times = list(student.unet.mid_block.resnets[0].conv1.timestep.calibrated)
    method = TALoRA(student.unet, times, LoRASettings(rank=4))
    sample, steps = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 990, 400, 400])
    with torch.no_grad():
        mixed = student.unet(sample, steps).sample
        alone = torch.cat([student.unet(one[None], time).sample for one, time in zip(sample, steps, strict=True)])
    assert torch.allclose(mixed, alone, atol=1e-4)
    distill(student.unet, pipe, method, Settings(steps=2, batch=4, sampler_steps=4))
    method.melt()
    assert hb.pack(student.unet)(sample, steps).sample.isfinite().all()


def test_gamma_weighs_the_loss_by_timestep(pipe):
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, FP4, simulate=True)
    gamma = torch.linspace(0.5, 1.5, 1000)
    plain = TALoRA(student, TIMES, LoRASettings())
    batch = StatePool(pipe, PoolSettings(batch=4, sampler_steps=4), range(4)).batch(0)
    with torch.no_grad():
        losses = plain.loss(student, batch)
        plain.objective = Weighted(TIMES, gamma)
        weighed = plain.loss(student, batch)
    assert torch.allclose(weighed, losses * gamma[batch.timesteps.long()])
