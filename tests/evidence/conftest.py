"""Tiny random pipelines of the classes that the ready tables are for."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch


def letters() -> Any:
    """A tokenizer of words, for text encoders that any tokenizer serves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def clip(folder: Any, kind: str = "CLIPTextModel", width: int = 16) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer."""
    import transformers

    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }
    ids = {"vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes, **ids)).eval(), tokenizer


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def vae(channels: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=8, **options).eval()


def ddim(build: Any, _: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return {"unet": build("UNet2DModel"), "scheduler": DDIMScheduler()}


def ldm(_: Any, __: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler, UNet2DModel, VQModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    unet = UNet2DModel(8, 3, 3, layers_per_block=1, norm_num_groups=8, **blocks).eval()
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16).eval()
    return {"vqvae": vqvae, "unet": unet, "scheduler": DDIMScheduler()}


def dit(_: Any, __: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    transformer = DiTTransformer2DModel(
        **heads, in_channels=4, out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=1000
    )
    return {"transformer": transformer.eval(), "vae": vae(), "scheduler": DDIMScheduler()}


def sd(build: Any, folder: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    text, tokenizer = clip(folder / "clip")
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {"vae": vae(), "text_encoder": text, "tokenizer": tokenizer, "unet": build("UNet2DConditionModel")}
    return {**parts, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), **unused}


def sdxl(_: Any, folder: Any) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    (text, tokenizer), (text_2, tokenizer_2) = clip(folder / "one"), clip(folder / "two", "CLIPTextModelWithProjection")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    texts = {"text_encoder": text, "text_encoder_2": text_2, "tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
    return {"vae": vae(), **texts, "unet": unet.eval(), "scheduler": EulerDiscreteScheduler(), "add_watermarker": False}


def flux(build: Any, folder: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    text, tokenizer = clip(folder / "clip", width=24)
    texts = {"text_encoder": text, "tokenizer": tokenizer, "text_encoder_2": t5(32), "tokenizer_2": letters()}
    parts = {"vae": vae(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)}
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), **parts, **texts, "transformer": build("FluxTransformer2DModel")}


def pixart(build: Any, _: Any) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler

    texts = {"tokenizer": letters(), "text_encoder": t5(24)}
    parts = {"transformer": build("PixArtTransformer2DModel"), "scheduler": DPMSolverMultistepScheduler()}
    return {**texts, "vae": vae(), **parts}


def sana(build: Any, _: Any) -> dict[str, Any]:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
    from transformers import Gemma2Config, Gemma2Model

    heads = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    text = Gemma2Model(Gemma2Config(hidden_size=24, intermediate_size=32, vocab_size=8, max_position_embeddings=512, **heads))
    both = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "EfficientViTBlock")),
            ("block_out_channels", (8, 8)),
            ("qkv_multiscales", ((), (5,))),
            ("layers_per_block", (1, 1)),
        )
    }
    autoencoder = AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, **both, scaling_factor=0.4)
    parts = {"transformer": build("SanaTransformer2DModel"), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return {"tokenizer": letters(), "text_encoder": text.eval(), "vae": autoencoder.eval(), **parts}


STAND_INS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "DDIMPipeline": ddim,
    "LDMPipeline": ldm,
    "DiTPipeline": dit,
    "StableDiffusionPipeline": sd,
    "StableDiffusionXLPipeline": sdxl,
    "FluxPipeline": flux,
    "PixArtSigmaPipeline": pixart,
    "SanaPipeline": sana,
}


@pytest.fixture
def stand_in(build: Callable[[str], Any], tmp_path: Any) -> Callable[[str], Any]:
    """stand_in(class name) -> a tiny random pipeline of that class."""
    import diffusers

    def make(name: str) -> Any:
        torch.manual_seed(0)
        pipe = getattr(diffusers, name)(**STAND_INS[name](build, tmp_path))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
