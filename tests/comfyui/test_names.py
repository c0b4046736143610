"""ComfyUI's names: diffusers' own converters, written by others, find the model's tensors under them again."""

import pytest
import torch

from halfbyte.comfyui.names import LAYOUTS, placer
from halfbyte.errors import ModelError


def renamed(model, tensors):
    """The tensors under ComfyUI's names, joined and swapped as the places say."""
    place, groups = placer(model), {}
    for key, tensor in tensors.items():
        groups.setdefault(place(key).name, []).append((place(key), tensor))
    made = {}
    for name, parts in groups.items():
        whole = torch.cat([tensor for _, tensor in sorted(parts, key=lambda entry: entry[0].part)])
        made[name] = torch.cat(whole.chunk(2)[::-1]) if parts[0][0].swapped else whole
    return made


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


SDXL = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
SD15 = {"block_out_channels": (16, 16, 32, 32)}


@pytest.mark.parametrize("changes", [SD15, SDXL], ids=["SD 1.5", "SDXL"])
def test_unets(changes):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = UNet2DConditionModel(cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8, **changes)
    state = model.state_dict()
    named = {f"model.diffusion_model.{key}": tensor for key, tensor in renamed(model, state).items()}
    assert same(convert_ldm_unet_checkpoint(named, dict(model.config)), state)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux(guidance):
    """Of FLUX's own width, which diffusers' converter takes for granted; a column is enough to tell rows apart."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    state = {key: torch.randn(len(tensor), *[1] * (tensor.ndim - 1)) for key, tensor in model.state_dict().items()}
    assert same(convert_flux_transformer_checkpoint_to_diffusers(renamed(model, state)), state)


def test_names_that_stay(build):
    place = placer(build("QwenImageTransformer2DModel"))
    name = "transformer_blocks.0.attn.add_q_proj.weight"
    assert place(name) == (name, 0, False)


def test_what_has_no_name_is_refused(build):
    with pytest.raises(ModelError, match="SanaTransformer2DModel are not known here; known are 'FluxTransformer2DModel'"):
        placer(build("SanaTransformer2DModel"))
    with pytest.raises(ModelError, match=r"no place for 'conv_in\.extra\.weight' of a UNet2DConditionModel"):
        placer(build("UNet2DConditionModel"))("conv_in.extra.weight")
    model = build("UNet2DConditionModel")
    model.register_to_config(up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"))
    with pytest.raises(ModelError, match="no names for a UNet with 'ResnetUpsampleBlock2D' in up_block_types"):
        placer(model)
    assert set(LAYOUTS) >= {"UNet2DConditionModel", "FluxTransformer2DModel", "T5EncoderModel"}
