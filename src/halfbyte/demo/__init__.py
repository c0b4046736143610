"""The embedded model: a trained denoiser, its feature extractor, and the statistics of what it was trained on."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import MissingExtraError
from halfbyte.runtime.backends import describe

MODEL = Path(__file__).parent / "model"


def load_pipeline() -> Any:
    """The embedded DDIMPipeline in float32: an unconditional denoiser of Fashion-MNIST images, padded to 32x32."""
    from diffusers import DDIMPipeline

    pipe = DDIMPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def environment() -> dict[str, str]:
    """What the figures depend on: versions, threads, processor, backend."""
    versions = {name: importlib.metadata.version(name) for name in ("halfbyte", "torch", "diffusers")}
    return {
        **versions,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "backend": describe(),
    }


def check_extras() -> None:
    """Raises MissingExtraError before any work is done when the report or the metrics could not be made."""
    for module in ("torchmetrics", "PIL", "jinja2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f"the demo needs {module}; install it with: pip install 'halfbyte[eval,report]'")
