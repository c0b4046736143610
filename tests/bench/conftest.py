"""A tiny pipeline in the layout of DiT: a class-conditional transformer on the latents of an autoencoder, with guidance."""

from typing import Any

import pytest
import torch


@pytest.fixture
def dit() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=4, patch_size=1,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (8,), latent_channels=4, norm_num_groups=4, sample_size=4
    )
    made = DiTPipeline(transformer.eval(), autoencoder.eval(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made
