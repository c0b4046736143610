"""halfbyte as a quantization backend of transformers, for text encoders.

An unregistered method is ignored there without a word and the model loads wrong weights, so this module must be imported before
`from_pretrained`, which writes into the tables of methods; `import halfbyte` arranges it.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.checkpoint import METHOD
from halfbyte.hub import LayoutConfig, after_loading, before_loading, quantize_loaded, refuse_calibration
from halfbyte.recipe import Recipe
from halfbyte.unpacking import unpack_layers


class HalfbyteConfig(LayoutConfig, QuantizationConfigMixin):
    """`quantization_config` of a transformers model; `HalfbyteConfig("halfbyte-w4a4")` quantizes while loading."""


class HalfbyteHfQuantizer(HfQuantizer):
    """Loads packed layers, or packs a float model once it is loaded."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            before_loading(
                model, self.quantization_config, kwargs.get("checkpoint_files") or [], kwargs.get("keep_in_fp32_modules")
            )
        else:
            refuse_calibration(self.quantization_config.recipe)
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        if self.pre_quantized:
            after_loading(model)
        else:
            quantize_loaded(model, self.quantization_config.recipe)
            attach(model, self.quantization_config.recipe)
        return model

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """The model as a plain float one, in place, in the given type or that of its other parameters."""
        unpack_layers(model, dtype or model.dtype)
        detach(model)
        return model


def attach(model: Any, recipe: Recipe) -> None:
    """Make a packed transformers model save itself as one."""
    config = HalfbyteConfig.from_model(model, recipe)
    model.hf_quantizer, model.is_quantized = HalfbyteHfQuantizer(config, pre_quantized=True), True
    model.config.quantization_config = config


def detach(model: Any) -> None:
    """Take off what makes transformers treat a model as quantized."""
    for name in ("hf_quantizer", "is_quantized"):
        vars(model).pop(name, None)
    del model.config.quantization_config


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a module is a transformers model, one that can save and load itself."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HalfbyteConfig
AUTO_QUANTIZER_MAPPING[METHOD] = HalfbyteHfQuantizer
