"""What a layer is charged with, against layers put back to float one at a time; and how a share is spent."""

import copy

import pytest
import torch

import halfbyte as hb
from halfbyte.heal.critical import Charge, charges, worst_layers
from halfbyte.heal.objective import mean_square
from halfbyte.heal.states import PoolSettings, StatePool, prediction
from halfbyte.layers import FakeQuant, apply_layer
from halfbyte.recipe import LayerSpec, Recipe, WeightSpec

INT4 = LayerSpec(WeightSpec("int4"))


@pytest.fixture
def batches(pipe):
    pool = StatePool(pipe, PoolSettings(batch=8, sampler_steps=4, reuse=4.0), range(8))
    return [pool.batch(step) for step in range(4)]


def loss(student, batches):
    with torch.no_grad():
        return sum(float(mean_square(prediction(student(*one.args, **one.kwargs)), one.target).mean()) for one in batches) / len(
            batches
        )


def towards(exact, part):
    """A hook that takes back part of a layer's error."""
    return lambda _, args, output: output + part * (exact(args[0]) - output)


def test_a_charge_is_what_the_loss_falls_by_without_the_layers_error(pipe, batches):
    """Each layer's error taken back by a hundredth: the loss falls by a hundredth of the charge, to first order."""
    student = copy.deepcopy(pipe.unet).double()
    hb.quantize(student, Recipe("w", INT4, edge=INT4), simulate=True)
    for one in batches:
        one.args = tuple(value.double() if value.ndim == 4 else value for value in one.args)
        one.target = one.target.double()
    teacher, student = copy.deepcopy(pipe.unet).double(), student.requires_grad_(False)
    found = charges(student, teacher, batches)
    assert sum(charge.loss for charge in found.values()) > 0.5 * loss(student, batches)
    before, part = loss(student, batches), 0.01
    for name in ("conv_out", "mid_block.resnets.0.conv1", "mid_block.resnets.1.time_emb_proj"):
        handle = student.get_submodule(name).register_forward_hook(towards(teacher.get_submodule(name), part))
        after = loss(student, batches)
        handle.remove()
        assert (before - after) / part == pytest.approx(found[name].loss, rel=0.1, abs=1e-6), name


def test_the_worst_layer_is_found(pipe, batches):
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, "int8-w8a8", simulate=True)
    bad = student.get_submodule("mid_block.resnets.0.conv2")
    bad.weight_scale = 40 * bad.weight_scale
    found = charges(student.requires_grad_(False), pipe.unet, batches)
    assert max(found, key=lambda name: found[name].loss) == "mid_block.resnets.0.conv2"
    assert "mid_block.resnets.0.conv2" in worst_layers(found, 1e6)[:8]


def test_charging_leaves_the_student_as_it_was(pipe, batches):
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, "int4-w4a4", simulate=True)
    student.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = charges(student, pipe.unet, batches)
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, FakeQuant)}
    assert found.keys() == layers.keys()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for model in (student, pipe.unet) for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())
    with torch.no_grad():
        layer, x = layers["conv_in"], batches[0].args[0]
        energies = [apply_layer(layer, one.args[0], layer.weight, layer.bias).square().mean() for one in batches]
    assert found["conv_in"].energy == pytest.approx(float(sum(energies)) / len(energies), rel=1e-4)
    assert found["conv_in"].weights == layers["conv_in"].weight.numel() + layers["conv_in"].bias.numel()
    assert x.shape[0] == 8


FOUND = {
    "a": Charge(4.0, 1, 100),
    "b": Charge(3.0, 1, 10),
    "c": Charge(1.0, 1, 20),
    "d": Charge(-1.0, 1, 1),
    "e": Charge(0.1, 1, 5),
}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, []),
        (9, ["e"]),
        (10, ["b"]),
        (34, ["b", "c"]),
        (35, ["b", "c", "e"]),
        (115, ["b", "c", "e"]),
        (1e9, ["b", "c", "a", "e"]),
    ],
)
def test_a_share_goes_to_what_is_charged_most_for_its_size(limit, expected):
    assert worst_layers(FOUND, limit) == expected
