"""Tiny, randomly initialised models of the real classes, shared by tests."""

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


def _transformer(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import diffusers

        heads = {"num_attention_heads": 2, "attention_head_dim": 16}
        return getattr(diffusers, name)(**{**heads, **options})

    return build


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
