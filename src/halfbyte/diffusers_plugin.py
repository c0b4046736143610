"""halfbyte as a quantization backend of diffusers: `from_pretrained`, `save_pretrained`, `PipelineQuantizationConfig`.

diffusers has no entry point for third parties, so importing this module writes into its two tables; `import
halfbyte` arranges that it is imported as soon as diffusers is, before or after halfbyte.
"""

from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from halfbyte.checkpoint import METHOD
from halfbyte.hub import LayoutConfig, after_loading, before_loading, quantize_loaded, refuse_calibration
from halfbyte.recipe import Recipe
from halfbyte.runtime.between import LATER, StandIns
from halfbyte.unpacking import unpack_layers


class HalfbyteConfig(LayoutConfig, QuantizationConfigMixin):
    """`quantization_config` of a diffusers model; `HalfbyteConfig("halfbyte-w4a4")` quantizes while loading."""


class HalfbyteQuantizer(DiffusersQuantizer):
    """Loads packed layers, or packs a float model once it is loaded."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = bool(quantization_config.layers)  # `from_single_file` does not say
        self.checkpoint_files: list[str] = []

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Remember the shards; the keys stay."""
        files = checkpoint_files or []
        self.checkpoint_files = [files] if isinstance(files, str) else list(files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            before_loading(model, self.quantization_config, self.checkpoint_files, kwargs.get("keep_in_fp32_modules"))
        else:
            refuse_calibration(self.quantization_config.recipe)
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        if self.pre_quantized:
            after_loading(model)
            run_channels_last(model)
        else:
            quantize_loaded(model, self.quantization_config.recipe)
            attach(model, self.quantization_config.recipe)
        return model

    def dequantize(self, model: Any) -> Any:
        """The model as a plain float one, in place, in the type of its other parameters."""
        unpack_layers(model, model.dtype)
        detach(model)
        return model


def attach(model: Any, recipe: Recipe) -> None:
    """Make a packed diffusers model save itself as one."""
    config = HalfbyteConfig.from_model(model, recipe)
    quantizer = HalfbyteQuantizer(config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    model.register_to_config(quantization_config=config)
    run_channels_last(model)


def detach(model: Any) -> None:
    """Take off what makes diffusers treat a model as quantized."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = type(model._internal_dict)(entries)


def run_channels_last(model: nn.Module) -> None:
    """Have convolutions give channels-last outputs, the order the C++ engine reads; all of diffusers works with it."""
    for module in model.modules():  # not the model as a whole: torch refuses where it holds a 3-D convolution
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]


def engine_blocks() -> StandIns:
    """Blocks that our engine runs faster: modules that cannot be imported yet while diffusers is."""
    from halfbyte.diffusers_blocks import ENGINE_BLOCKS

    return ENGINE_BLOCKS


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether a module is a diffusers model, one that can save and load itself."""
    from diffusers import ModelMixin

    return isinstance(model, ModelMixin)


LATER.append(engine_blocks)
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HalfbyteConfig
AUTO_QUANTIZER_MAPPING[METHOD] = HalfbyteQuantizer
