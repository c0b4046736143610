"""LoRA for packed FLUX models: diffusers' loader compares shapes with float weights that it looks up in the state dict.

Packed layers have none there, so the loader is handed the model with a state dict of stand-ins, which have shapes and no values.
Everything else about adapters works through `runtime.layers.PackedWeight`. Imported when `diffusers.loaders.lora_pipeline` is.
"""

from typing import Any

from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from torch import Tensor

from halfbyte.conversion import packed_layers


class Shapes:
    """A model whose state dict also answers for the weights of packed layers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and stand-ins; the packed codes are not touched."""
        packed = {f"{name}.weight": layer.weight for name, layer in packed_layers(self.model).items()}
        return {**dict(self.model.named_parameters()), **packed}


_expand: Any = FluxLoraLoaderMixin.__dict__["_maybe_expand_lora_state_dict"].__func__


def _expand_packed(cls: Any, transformer: Any, lora_state_dict: Any) -> Any:
    return _expand(cls, Shapes(transformer) if packed_layers(transformer) else transformer, lora_state_dict)


FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(_expand_packed)
