"""The patterns of the architectures, against real models: every one matches, and what is called one-sided is."""

import pytest
import torch
from torch import nn

from halfbyte.layers import module_kind
from halfbyte.targets import TARGETS, Target


def layers(model):
    return {name: module for name, module in model.named_modules() if module_kind(module) is not None}


@pytest.mark.parametrize("name", TARGETS)
def test_every_edge_pattern_matches_one_layer(build, name):
    names = list(layers(build(name)))
    for pattern in TARGETS[name].edges:
        assert sum(Target((pattern,)).is_edge(layer) for layer in names) == 1, pattern


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_called_one_sided_are_outputs_of_silu_or_gelu(build, call, name):
    model, target, lowest = build(name), TARGETS[name], {}

    def watch(layer_name):
        def look(_: nn.Module, args):
            lowest[layer_name] = min(lowest.get(layer_name, 0.0), args[0].min().item())

        return look

    for layer_name, layer in layers(model).items():
        if target.is_after_silu(layer_name):
            layer.register_forward_pre_hook(watch(layer_name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # random weights are small: make activations leave the middle of the curve
        model(**call(name))
    assert lowest
    assert all(-0.2785 <= low <= 0 for low in lowest.values()), lowest


@pytest.mark.parametrize("name", TARGETS)
def test_every_one_sided_pattern_matches_a_layer(build, name):
    names = list(layers(build(name)))
    for pattern in TARGETS[name].after_silu:
        assert any(Target((), (pattern,)).is_after_silu(layer) for layer in names), pattern
