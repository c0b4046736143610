"""One step of a whole denoiser, packed, against the float model in bfloat16 and float32."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbyte.bench.models import Subject
from halfbyte.bench.synthetic import float_model, packed_model
from halfbyte.bench.timing import Effort, medians
from halfbyte.conversion import memory_bytes
from halfbyte.presets import PRESETS
from halfbyte.runtime.intercept import attention_modules

LAYERS = (PRESETS["quartz-w4a8"], PRESETS["quartz-w4a4"])
WITH_ATTENTION = (*LAYERS, PRESETS["quartz-w4a8"].with_attention())  # where it is diffusers'
FLOATS = {"torch bf16": torch.bfloat16, "torch fp32": torch.float32}


def measure(name: str, subject: Subject, effort: Effort) -> list[dict[str, Any]]:
    """One row for each contestant. All models are in memory at once, so that they can take turns."""
    with torch.device("meta"):
        recipes = WITH_ATTENTION if attention_modules(subject.build()) else LAYERS
    models = {recipe.name: packed_model(subject.build, recipe) for recipe in recipes}
    packed = list(models)
    models |= {rival: float_model(subject.build, dtype) for rival, dtype in FLOATS.items()}
    runs = {kind: _bind(model, subject.arguments(FLOATS.get(kind, torch.bfloat16))) for kind, model in models.items()}
    seconds = medians(runs, effort)
    rows = [
        {
            "case": name,
            "about": subject.about,
            "contestant": kind,
            "seconds": seconds[kind],
            "ratio_to": {rival: seconds[rival] / seconds[kind] for rival in FLOATS if rival != kind},
            "weight_bytes_of_bf16": _share(models[kind]) if kind in packed else None,
        }
        for kind in seconds
    ]
    del models, runs
    gc.collect()
    return rows


def _bind(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], object]:
    return lambda: model(**arguments)


def _share(model: nn.Module) -> float:
    held, plain = memory_bytes(model)
    return held / plain
