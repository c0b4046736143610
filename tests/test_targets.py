"""The patterns of the architectures, against real models: every one matches, and what is called one-sided is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from halfbyte.conversion import quantizable_layers
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


class Activations(TorchFunctionMode):
    """Notes the memory of every output of SiLU and GELU; keeps the tensors, so that no later one can take their place."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (F.silu, F.gelu):
            self.kept.append(made)
        return made

    def made(self, x):
        return any(x.data_ptr() == one.data_ptr() and x.numel() == one.numel() for one in self.kept)


def _sdxl():
    """Stable Diffusion XL embeds text and sizes beside the time."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    return model, {"added_cond_kwargs": {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}}


def _flux_dev():
    """FLUX.1-dev embeds a guidance strength beside the time."""
    from diffusers import FluxTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24}
    counts = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 4, 8]}
    return FluxTransformer2DModel(**sizes, **counts, guidance_embeds=True), {"guidance": torch.ones(2)}


VARIANTS = {"UNet2DConditionModel, SDXL": _sdxl, "FluxTransformer2DModel, dev": _flux_dev}


@pytest.mark.parametrize("name", [*TARGETS, *VARIANTS])
def test_the_layers_called_one_sided_are_just_those_that_read_a_silu_or_gelu(build, call, name):
    kind = name.partition(",")[0]
    model, more = VARIANTS[name]() if name in VARIANTS else (build(kind), {})
    seen, mode = {}, Activations()
    for layer_name, layer in layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, key=layer_name: seen.update({key: mode.made(args[0])}))
    with torch.no_grad(), mode:
        model.eval()(**call(kind), **more)
    assert seen.keys() >= quantizable_layers(model).keys()  # all but those whose weights are read without a call
    assert sorted(key for key in seen if TARGETS[kind].is_after_silu(key)) == sorted(key for key, after in seen.items() if after)
