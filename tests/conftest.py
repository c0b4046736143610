"""Tiny, randomly initialised models of the real classes, shared by tests."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which torch may do

import pytest
import torch

from halfbyte.runtime import backends, engine

# Tests multiply small tensors: a second thread gains nothing, and where cores are busy waiting for it costs fifteen times as much.
torch.set_num_threads(1)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    return UNet2DModel(**{**options, **changes})


def _sd_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _model(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import diffusers

        return getattr(diffusers, name)(**options)

    return build


def _transformer(name: str, **options: Any) -> Callable[[], Any]:
    return _model(name, **{"num_attention_heads": 2, "attention_head_dim": 16, **options})


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TIME = torch.tensor([500.0, 500.0])
# class name -> (builder, arguments of one forward call)
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (_unet, lambda: {"sample": _tokens(2, 1, 8, 8), "timestep": TIME}),
    "UNet2DConditionModel": (
        _sd_unet,
        lambda: {"sample": _tokens(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": _tokens(2, 5, 16)},
    ),
    "DiTTransformer2DModel": (
        _transformer(
            "DiTTransformer2DModel",
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
        lambda: {"hidden_states": _tokens(2, 4, 8, 8), "timestep": TIME.long(), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        _transformer(
            "PixArtTransformer2DModel",
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=24,
        ),
        lambda: {
            "hidden_states": _tokens(2, 4, 8, 8),
            "encoder_hidden_states": _tokens(2, 5, 24),
            "timestep": TIME,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SanaTransformer2DModel": (
        _transformer(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        lambda: {"hidden_states": _tokens(2, 4, 8, 8), "encoder_hidden_states": _tokens(2, 5, 24), "timestep": TIME},
    ),
    "SD3Transformer2DModel": (
        _transformer(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
        ),
        lambda: {
            "hidden_states": _tokens(2, 4, 8, 8),
            "encoder_hidden_states": _tokens(2, 5, 32),
            "pooled_projections": _tokens(2, 24),
            "timestep": TIME,
        },
    ),
    "FluxTransformer2DModel": (
        _transformer(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            axes_dims_rope=[4, 4, 8],
        ),
        lambda: {
            "hidden_states": _tokens(2, 16, 4),
            "encoder_hidden_states": _tokens(2, 5, 32),
            "pooled_projections": _tokens(2, 24),
            "timestep": TIME / 1000,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "AuraFlowTransformer2DModel": (
        _transformer(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        lambda: {"hidden_states": _tokens(2, 4, 8, 8), "encoder_hidden_states": _tokens(2, 5, 24), "timestep": TIME / 1000},
    ),
    "HunyuanDiT2DModel": (
        _transformer(
            "HunyuanDiT2DModel",
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            cross_attention_dim=24,
            cross_attention_dim_t5=40,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=7,
        ),
        lambda: {
            "hidden_states": _tokens(2, 4, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": _tokens(2, 5, 24),
            "text_embedding_mask": torch.ones(2, 5),
            "encoder_hidden_states_t5": _tokens(2, 7, 40),
            "text_embedding_mask_t5": torch.ones(2, 7),
            "image_meta_size": torch.ones(2, 6),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        },
    ),
    "CogVideoXTransformer3DModel": (
        _transformer(
            "CogVideoXTransformer3DModel",
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=24,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=6,
        ),
        lambda: {"hidden_states": _tokens(2, 2, 4, 8, 8), "encoder_hidden_states": _tokens(2, 6, 24), "timestep": TIME},
    ),
    "WanTransformer3DModel": (
        _transformer(
            "WanTransformer3DModel",
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        lambda: {"hidden_states": _tokens(2, 4, 2, 8, 8), "encoder_hidden_states": _tokens(2, 5, 24), "timestep": TIME},
    ),
    "LTXVideoTransformer3DModel": (
        _transformer(
            "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=24
        ),
        lambda: {
            "hidden_states": _tokens(2, 32, 4),
            "encoder_hidden_states": _tokens(2, 5, 24),
            "timestep": TIME,
            "encoder_attention_mask": torch.ones(2, 5),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "LuminaNextDiT2DModel": (
        _model(
            "LuminaNextDiT2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=24,
        ),
        lambda: {
            "hidden_states": _tokens(2, 4, 8, 8),
            "timestep": TIME / 1000,
            "encoder_hidden_states": _tokens(2, 5, 24),
            "encoder_mask": torch.ones(2, 5),
            "image_rotary_emb": torch.polar(torch.ones(384, 384, 8), torch.zeros(384, 384, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": (
        _model(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(32, 32, 32),
            cap_feat_dim=24,
        ),
        lambda: {
            "hidden_states": _tokens(2, 4, 8, 8),
            "timestep": TIME / 1000,
            "encoder_hidden_states": _tokens(2, 5, 24),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "QwenImageTransformer2DModel": (
        _transformer(
            "QwenImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": _tokens(2, 16, 16),
            "encoder_hidden_states": _tokens(2, 5, 24),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
            "timestep": TIME / 1000,
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "ZImageTransformer2DModel": (
        _model(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 4, 8],
            axes_lens=[256, 32, 32],
        ),
        lambda: {"x": [*_tokens(2, 4, 1, 8, 8)], "t": TIME / 1000, "cap_feats": [*_tokens(2, 5, 24)]},
    ),
    "Flux2Transformer2DModel": (
        _transformer(
            "Flux2Transformer2DModel",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda: {
            "hidden_states": _tokens(2, 16, 4),
            "encoder_hidden_states": _tokens(2, 5, 24),
            "timestep": TIME / 1000,
            "img_ids": torch.zeros(2, 16, 4),
            "txt_ids": torch.zeros(2, 5, 4),
            "guidance": torch.ones(2),
        },
    ),
}


@pytest.fixture
def build() -> Callable[[str], Any]:
    """build(class name) -> a tiny model of that class in evaluation mode, always with the same weights."""

    def make(name: str) -> Any:
        torch.manual_seed(0)
        return MODELS[name][0]().eval()

    return make


@pytest.fixture
def call() -> Callable[[str], dict[str, Any]]:
    """call(class name) -> keyword arguments of one forward call of that model."""
    return lambda name: MODELS[name][1]()


@pytest.fixture
def pipe(build: Callable[[str], Any]) -> Any:
    """A DDIMPipeline around the tiny UNet."""
    from diffusers import DDIMPipeline, DDIMScheduler

    made = DDIMPipeline(build("UNet2DModel"), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def _force(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[str]:
    if name == "cpu" and engine.MISSING:
        pytest.skip(f"the C++ engine cannot run: {engine.MISSING}")
    monkeypatch.setenv(backends.VARIABLE, name)
    backends.backend.cache_clear()
    yield name
    backends.backend.cache_clear()


@pytest.fixture(params=("cpu", "reference"))  # the GPU's has tests of its own
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs once with every backend; gives its name."""
    yield from _force(monkeypatch, request.param)


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _force(monkeypatch, "reference")


@pytest.fixture
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _force(monkeypatch, "cpu")


@pytest.fixture
def etas(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The argument `eta` of every call of a DDIM pipeline from now on."""
    from diffusers import DDIMPipeline

    seen: list[float | None] = []
    plain = DDIMPipeline.__call__

    @functools.wraps(plain)
    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("eta"))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DDIMPipeline, "__call__", record)
    return seen
