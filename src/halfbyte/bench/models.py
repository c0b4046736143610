"""Denoisers of real shape, from their configs; nothing is downloaded. FLUX is cut to one block of each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model to time: how to build it, and the arguments of one step in a given dtype."""

    about: str
    build: Callable[[], nn.Module]
    arguments: Callable[[torch.dtype], dict[str, Any]]
    large: bool = False  # takes more memory or minutes than everybody has; run only when asked for by name


def _noise(*shape: int) -> Callable[[torch.dtype], Tensor]:
    """Random numbers; images (four axes) channels-last."""

    def make(dtype: torch.dtype) -> Tensor:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return made.to(memory_format=torch.channels_last) if made.ndim == 4 else made

    return make


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, name)(**config)
        return made

    return build


def _step(**shapes: Any) -> Callable[[torch.dtype], dict[str, Any]]:
    """Arguments of a call: makers of noise are called with the dtype, everything else is passed as it is."""
    return lambda dtype: {name: value(dtype) if callable(value) else value for name, value in shapes.items()}


def _sd15(size: int, images: int) -> Subject:
    build = _diffusers("UNet2DConditionModel", sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    step = _step(sample=_noise(images, 4, size, size), timestep=torch.tensor(500), encoder_hidden_states=_noise(images, 77, 768))
    return Subject(f"Stable Diffusion 1.5 UNet, {size * 8}x{size * 8}, {images} images (guidance)", build, step)


def _sdxl(size: int, images: int) -> Subject:
    build = _diffusers(
        "UNet2DConditionModel",
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )

    def step(dtype: torch.dtype) -> dict[str, Any]:
        made = _step(sample=_noise(images, 4, size, size), encoder_hidden_states=_noise(images, 77, 2048))(dtype)
        added = _step(text_embeds=_noise(images, 1280), time_ids=torch.ones(images, 6))(dtype)
        return {**made, "timestep": torch.tensor(500), "added_cond_kwargs": added}

    return Subject(f"SDXL UNet, {size * 8}x{size * 8}, {images} images (guidance)", build, step, large=True)


def _dit(images: int) -> Subject:
    build = _diffusers(
        "DiTTransformer2DModel",
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    time, labels = torch.full((images,), 500), torch.zeros(images, dtype=torch.long)
    step = _step(hidden_states=_noise(images, 4, 32, 32), timestep=time, class_labels=labels)
    return Subject(f"DiT-XL/2, 256x256, {images} images", build, step)


def _pixart(images: int) -> Subject:
    build = _diffusers(
        "PixArtTransformer2DModel",
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=128,
        patch_size=2,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    step = _step(
        hidden_states=_noise(images, 4, 128, 128),
        encoder_hidden_states=_noise(images, 300, 4096),
        timestep=torch.full((images,), 500),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return Subject(f"PixArt-Sigma, 1024x1024, {images} images (guidance)", build, step, large=True)


def _flux(tokens: int, words: int) -> Subject:
    build = _diffusers("FluxTransformer2DModel", num_layers=1, num_single_layers=1)
    step = _step(
        hidden_states=_noise(1, tokens, 64),
        encoder_hidden_states=_noise(1, words, 4096),
        pooled_projections=_noise(1, 768),
        timestep=_noise(1),
        guidance=None,
        img_ids=torch.zeros(tokens, 3),
        txt_ids=torch.zeros(words, 3),
    )
    return Subject(f"FLUX, one double and one single block, {tokens} + {words} tokens (1024x1024)", build, step)


def _ddpm(size: int, images: int) -> Subject:
    build = _diffusers(
        "UNet2DModel",
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        act_fn="silu",
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    step = _step(sample=_noise(images, 3, size, size), timestep=torch.tensor(500))
    return Subject(f"DDPM CIFAR-10 UNet, batch {images}", build, step)


SUBJECTS: dict[str, Subject] = {
    "sd15": _sd15(64, 2),
    "dit-xl": _dit(2),
    "ddpm": _ddpm(32, 64),
    "flux": _flux(4096, 512),
    "sdxl": _sdxl(128, 2),
    "pixart": _pixart(2),
}
SMOKE_SUBJECTS: dict[str, Subject] = {"ddpm": _ddpm(16, 1)}
