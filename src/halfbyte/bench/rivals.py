"""What else runs the same layer on this machine: torch in float32 and bfloat16, oneDNN's int8 products, OpenVINO where installed.

oneDNN's are given their input in uint8 and their weights prepacked: the best that kernel can do, without the quantization of the
input that ours does in every call.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Contestants = dict[str, Callable[[], object]]
FLOATS = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}


def float_rivals(layer: nn.Module, x: Tensor) -> Contestants:
    """The float layer itself in float32 and in bfloat16; convolutions channels-last, which is their fastest layout."""
    found: Contestants = {}
    for name, dtype in FLOATS.items():
        found[name] = _bind(copy.deepcopy(layer).to(dtype).to(memory_format=torch.channels_last), x.to(dtype))  # type: ignore[call-overload]
    return found


def _bind(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def onednn_linear(layer: nn.Linear, x: Tensor) -> Contestants:
    """oneDNN's int8 linear, prepacked; empty where this torch has none."""
    if not _has_onednn("qlinear_prepack", "qlinear_pointwise"):
        return {}
    ops: Any = torch.ops.onednn
    rows = x.reshape(-1, x.shape[-1])
    given = torch.randint(0, 256, rows.shape, dtype=torch.uint8)
    weight, scales, zeros = _int8_weight(layer.weight)
    packed = ops.qlinear_prepack(weight, list(rows.shape))
    arguments: Any = (1.0, 0, _output_type(), "none", [], "")
    return {"oneDNN int8": lambda: ops.qlinear_pointwise(given, 0.02, 128, packed, scales, zeros, layer.bias, *arguments)}


def onednn_conv(layer: nn.Conv2d, x: Tensor) -> Contestants:
    """oneDNN's int8 convolution, prepacked, channels-last; empty where this torch has none."""
    if not _has_onednn("qconv_prepack", "qconv2d_pointwise"):
        return {}
    ops: Any = torch.ops.onednn
    given = torch.randint(0, 256, x.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight, scales, zeros = _int8_weight(layer.weight)
    places = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    packed = ops.qconv_prepack(weight, scales, 0.02, 128, *places, list(x.shape))
    arguments: Any = (*places, 1.0, 0, _output_type(), "none", [], "")
    return {"oneDNN int8": lambda: ops.qconv2d_pointwise(given, 0.02, 128, packed, scales, zeros, layer.bias, *arguments)}


def _has_onednn(*names: str) -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in names)


def _output_type() -> torch.dtype:
    """bfloat16 where oneDNN has kernels for it; elsewhere its products would run in reference code, thousands of times slower."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _int8_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights of a layer, float32 scales and int32 zero points (O,)."""
    matrix = weight.detach().float()
    scales = matrix.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    shape = (-1, *(1 for _ in matrix.shape[1:]))
    return (matrix / scales.view(shape)).round().to(torch.int8), scales, torch.zeros(len(scales), dtype=torch.int32)


def openvino_rivals(layer: nn.Module, x: Tensor) -> Contestants:
    """OpenVINO's bf16, and int8 and int4 weights; empty where openvino or nncf is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return {}
    import openvino as ov

    def compiled(model: Any) -> Callable[[], object]:
        hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        made = ov.compile_model(model, "CPU", hints)
        given = x.float().numpy()
        return lambda: made(given)

    def converted() -> Any:
        return ov.convert_model(layer.float(), example_input=x.float())

    found = {"OpenVINO bf16": compiled(converted())}
    if importlib.util.find_spec("nncf") is not None and isinstance(layer, nn.Linear):
        import nncf

        modes = {"int8": nncf.CompressWeightsMode.INT8_SYM, "int4": nncf.CompressWeightsMode.INT4_SYM}
        for name, mode in modes.items():
            found[f"OpenVINO {name} weights"] = compiled(nncf.compress_weights(converted(), mode=mode))
    return found
