"""halfbyte: diffusion models in 4 bits, weights and activations; healed, measured, and run in exact integers.

    import halfbyte as hb
    result = hb.quantize(pipe, recipe="halfbyte-w4a4")
    hb.save(pipe, "model-4bit")
    pipe = DiffusionPipeline.from_pretrained("model-4bit")

Importing halfbyte imports neither torch nor diffusers; it only arranges that diffusers and transformers learn to load halfbyte
checkpoints when they are imported themselves.
"""

import importlib
from typing import TYPE_CHECKING, Any

from halfbyte import _import_hook

if TYPE_CHECKING:
    from halfbyte.api import load, quantize, save
    from halfbyte.api import pack_model as pack
    from halfbyte.diffusers_plugin import HalfbyteConfig
    from halfbyte.errors import HalfbyteError
    from halfbyte.heal.verb import heal
    from halfbyte.presets import PRESETS
    from halfbyte.recipe import Recipe
    from halfbyte.streaming.verb import quantize_folder

__version__ = "0.1.0"
__all__ = ["PRESETS", "HalfbyteConfig", "HalfbyteError", "Recipe", "heal", "load", "pack", "quantize", "quantize_folder", "save"]

_HOMES = {
    "heal": ("heal", None),  # the folder itself, which can be called
    "quantize": ("api", "quantize"),
    "quantize_folder": ("streaming.verb", "quantize_folder"),
    "pack": ("api", "pack_model"),
    "save": ("api", "save"),
    "load": ("api", "load"),
    "PRESETS": ("presets", "PRESETS"),
    "Recipe": ("recipe", "Recipe"),
    "HalfbyteError": ("errors", "HalfbyteError"),
    "HalfbyteConfig": ("diffusers_plugin", "HalfbyteConfig"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    room, attribute = _HOMES[name]
    module = importlib.import_module(f"halfbyte.{room}")
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_import_hook.install()
