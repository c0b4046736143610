"""Every architecture of the table, on a tiny random instance of the real class: quantized, streamed, saved, loaded, run."""

import pytest
import torch

import halfbyte as hb
from halfbyte.conversion import packed_layers, quantizable_layers
from halfbyte.layers import module_kind
from halfbyte.recipe import LAYER_GROUPS
from halfbyte.streaming.verb import quantize_folder
from halfbyte.targets import GROUPS, TARGETS, matches

# Layers that stay in float, by architecture, and a word of the reason.
IN_FLOAT = {
    "HunyuanDiT2DModel": ("time_extra_emb.pooler.", "reads its weights directly"),
    "WanTransformer3DModel": ("patch_embedding", "3-D convolutions"),
}
ORDER = ("modulation", "text", "skip")
# Layers of each group in the tiny models.
IN_GROUPS = {
    "UNet2DModel": (8, 0, 8),
    "UNet2DConditionModel": (8, 0, 8),
    "DiTTransformer2DModel": (2, 0, 0),
    "PixArtTransformer2DModel": (1, 2, 0),
    "SanaTransformer2DModel": (1, 2, 0),
    "SD3Transformer2DModel": (5, 14, 0),
    "FluxTransformer2DModel": (4, 10, 0),
    "AuraFlowTransformer2DModel": (4, 9, 0),
    "HunyuanDiT2DModel": (3, 2, 0),
    "CogVideoXTransformer3DModel": (5, 1, 0),
    "WanTransformer3DModel": (1, 2, 0),
    "LTXVideoTransformer3DModel": (1, 2, 0),
    "LuminaNextDiT2DModel": (3, 1, 0),
    "Lumina2Transformer2DModel": (4, 8, 0),
    "QwenImageTransformer2DModel": (5, 15, 0),
    "ZImageTransformer2DModel": (4, 8, 0),
    "Flux2Transformer2DModel": (4, 7, 0),
}


def output(model, arguments):
    with torch.no_grad():
        found = model(**arguments, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


@pytest.mark.parametrize("name", TARGETS)
def test_quantized_streamed_saved_loaded_and_run(build, call, tmp_path, name):
    exact = build(name)
    exact.save_pretrained(tmp_path / "float")
    model = type(exact).from_pretrained(tmp_path / "float")
    result = hb.quantize(model, "quartz-guarded-w4a4")
    prefix, reason = IN_FLOAT.get(name, ("none", ""))
    for layer in result.layers:
        kept = layer.spec is None
        assert kept == layer.name.startswith(prefix), (layer.name, layer.reason)
        assert not kept or reason in layer.reason
    hb.save(model, tmp_path / "out")
    quantize_folder(tmp_path / "float", tmp_path / "streamed", "quartz-guarded-w4a4")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes(), file.name
    loaded = hb.load(tmp_path / "streamed")
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    arguments = call(name)
    expected, found = output(exact, arguments), output(model, arguments)
    assert torch.equal(output(loaded, arguments), found)
    assert 0 < (found - expected).norm() < 0.6 * expected.norm()


@pytest.mark.parametrize("name", TARGETS)
def test_groups_hold_the_layers_they_are_named_for(build, name):
    layers = [layer for layer, module in build(name).named_modules() if module_kind(module) is not None]
    found = tuple(sum(matches(f"@{group}", layer) for layer in layers) for group in ORDER)
    assert found == IN_GROUPS[name], {group: [one for one in layers if matches(f"@{group}", one)] for group in GROUPS}


def test_the_groups_of_recipes_are_those_of_the_table():
    assert set(GROUPS) == set(LAYER_GROUPS) == set(ORDER)


def test_groups_leave_edges_alone_and_may_be_kept(build):
    model = build("FluxTransformer2DModel")
    hb.quantize(model, "quartz-guarded-w4a4")
    layers = packed_layers(model)
    assert layers["context_embedder"].spec == hb.PRESETS["quartz-guarded-w4a4"].edge
    assert layers["transformer_blocks.0.norm1.linear"].spec.describe() == "lzs4<<4/16 x int8"
    assert layers["transformer_blocks.0.attn.to_q"].spec.describe() == "lzs4<<4/16 x lzs4<<4/16"
    kept = build("FluxTransformer2DModel")
    hb.quantize(kept, hb.PRESETS["quartz-w4a4"].replace(keep=("@modulation",)))
    assert set(quantizable_layers(kept)) - set(packed_layers(kept)) == {name for name in layers if matches("@modulation", name)}
