"""AdaRound of whole blocks: found by structure, each better by its output, the same bits for the same seed."""

import copy

import pytest
import torch
from torch import nn

from halfbyte import api
from halfbyte.calibration import Call, collect
from halfbyte.conversion import hessian_layers, simulate, specs_of
from halfbyte.errors import CalibrationError
from halfbyte.layers import FakeQuant
from halfbyte.methods.blocks import find_blocks, reconstruct_blocks
from halfbyte.recipe import ActivationSpec, LayerSpec, Recipe, Reconstruction, WeightSpec

QUICK = Reconstruction("block", iterations=60, learning_rate=0.1)
RECIPE = Recipe("block", LayerSpec(WeightSpec("int4", rounding="adaround"), ActivationSpec("int8")), reconstruction=QUICK)


class Block(nn.Module):
    """A residual block with dropout, given its input by keyword and returning a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(24, 48), nn.Linear(48, 24), nn.Dropout(0.5)
        self.unused = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, *, extra: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.second(self.dropout(torch.nn.functional.silu(self.first(x * extra)))), None


class Net(nn.Module):
    """Two blocks between two layers, with a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 24)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(x) + timestep / 1000
        for block in self.blocks:
            x, _ = block(x, extra=torch.ones(()))
        return self.leave(x)


def net_and_calls():
    torch.manual_seed(0)
    mix = torch.randn(8, 8)
    calls = [Call((torch.randn(32, 8) @ mix, torch.tensor(float(t))), {}) for t in (900, 500, 100)]
    return Net(), calls


def error(model, teacher, calls):
    with torch.no_grad():
        return float(sum((model(*call.args) - teacher(*call.args)).square().mean() for call in calls))


def rounded(recipe, seed=0, training=False):
    """A simulated copy of the net under a recipe, its result, and its error."""
    net, calls = net_and_calls()
    teacher = copy.deepcopy(net).eval()
    net.train(training)
    kept = recipe.replace(keep=("unused",))
    statistics = collect(net, calls, specs_of(net, kept), hessian_layers(net, kept))
    result = simulate(net, kept, statistics, calls=calls, seed=seed)
    assert net.training == training
    return net, result, error(net.eval(), teacher, calls)


@pytest.mark.parametrize("scale", ["dynamic", "timestep"])
def test_recipes_by_block_beat_nearest(scale):
    recipe = RECIPE.replace(inner=RECIPE.inner.replace(activation=ActivationSpec("int8", scale=scale)))
    weight = recipe.inner.weight.replace(rounding="nearest")
    plain = recipe.replace(inner=recipe.inner.replace(weight=weight), reconstruction=None)
    model, result, found = rounded(recipe, training=True)
    assert found < 0.8 * rounded(plain)[2]
    notes = {layer.name: layer.reason for layer in result.layers}
    assert "of nearest's output error" in notes["blocks.0.first"]
    assert ", as a block " in notes["blocks.0.first"]
    assert notes["blocks.0.first"].rpartition(",")[2] == notes["blocks.0.second"].rpartition(",")[2]
    assert "AdaRound" not in notes["enter"]  # an edge
    layer = model.blocks[1].second
    assert torch.equal(layer.quantized_weight().dequantize(), layer.weight)  # rounded for good
    assert "rounded_weight" not in vars(layer)
    assert next(row for row in result.layers if row.name == "blocks.1.second").weight_sqnr > 10


def test_choices_of_a_block_are_revised_where_that_helps_its_output():
    teacher, calls = net_and_calls()
    student = copy.deepcopy(teacher)
    simulate(student, Recipe("nearest", LayerSpec(WeightSpec("int4"), ActivationSpec("int8")), keep=("unused",)))
    layers = {f"blocks.{i}.{name}": student.get_submodule(f"blocks.{i}.{name}") for i in (0, 1) for name in ("first", "second")}
    exact = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():  # as if rounding one by one had ended here
            layer.weight.copy_(layer.quantized_weight().dequantize())
    before = error(student.eval(), teacher.eval(), calls)
    notes = reconstruct_blocks(student, teacher, ["blocks.1", "blocks.0"], calls, exact, Reconstruction("block", iterations=150))
    assert list(notes) == ["blocks.0", "blocks.1"]  # in the order they run
    assert all(float(note.split()[3]) < 0.8 for note in notes.values()), notes
    assert error(student, teacher, calls) < 0.8 * before


def test_a_replayed_call_is_at_its_own_timesteps():
    net, calls = net_and_calls()
    mixed = [Call((call.args[0], torch.full((32, 1), float(call.args[1]))), {}) for call in calls]
    results = []
    for given in (calls, mixed):  # one timestep a call, or the same one for every row
        model = copy.deepcopy(net)
        recipe = RECIPE.replace(inner=RECIPE.inner.replace(activation=ActivationSpec("int8", scale="timestep")), keep=("unused",))
        statistics = collect(model, calls, specs_of(model, recipe), hessian_layers(model, recipe))
        simulate(model, recipe, statistics, calls=given)
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_the_same_seed_gives_the_same_bits_and_another_others():
    first, same, other = (rounded(RECIPE, seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_block_that_gains_nothing_stays_as_it_is_and_says_so():
    teacher, calls = net_and_calls()
    student = copy.deepcopy(teacher)
    simulate(student, Recipe("nearest", LayerSpec(WeightSpec("int8")), edge=None, keep=("unused",)))
    layers = {name: student.get_submodule(name) for name in ("blocks.0.first", "blocks.0.second")}
    exact = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(layer.quantized_weight().dequantize())
        for name, layer in layers.items():  # a float model whose weights are on the grid: nothing can be better
            teacher.get_submodule(name).weight.copy_(layer.weight)
    before = layers["blocks.0.first"].weight.clone()
    assert reconstruct_blocks(student, teacher, ["blocks.0"], calls, exact, QUICK) == {
        "blocks.0": "as a block nothing better was found"
    }
    assert torch.equal(layers["blocks.0.first"].weight, before)
    assert reconstruct_blocks(student, teacher, ["blocks.0"], calls, {}, QUICK) == {"blocks.0": "no layer to round"}


def test_blocks_of_real_models_are_residual_and_transformer_blocks(build):
    unet = find_blocks(build("UNet2DModel"))
    assert {"down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.1"} < set(unet)
    assert not any(name.endswith("to_out.0") or "samplers" in name for name in unet)
    assert find_blocks(build("DiTTransformer2DModel")) == ["transformer_blocks.0", "transformer_blocks.1"]


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "SanaTransformer2DModel"])
def test_real_models_can_be_reconstructed(name, build, call):
    model, arguments = build(name), call(name)
    quick = Reconstruction("block", iterations=2)
    result = api.quantize(model, RECIPE.replace(reconstruction=quick), [arguments], simulate=True)
    assert sum(", as a block " in layer.reason for layer in result.layers) > 10
    assert all(layer.weight.isfinite().all() for layer in model.modules() if isinstance(layer, FakeQuant))


def test_bad_input_is_refused():
    net, calls = net_and_calls()
    with pytest.raises(CalibrationError, match="blocks are reconstructed on calls of the model; pass calibration="):
        reconstruct_blocks(net, net, ["blocks.0"], [], {}, QUICK)
    net.blocks.append(Block())
    net.forward = lambda x, timestep: net.leave(net.enter(x) + 0 * timestep)
    with pytest.raises(CalibrationError, match=r"3 blocks were never reached by the calibration inputs, 'blocks\.0'"):
        reconstruct_blocks(net, net, find_blocks(net), calls, {}, QUICK)
