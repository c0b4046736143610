"""Single layers against what else runs them: the shapes of the models, both QuaRTZ recipes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.bench.rivals import Contestants, float_rivals, onednn_conv, onednn_linear, openvino_rivals
from halfbyte.bench.synthetic import packed_twin
from halfbyte.bench.timing import Effort, medians
from halfbyte.presets import PRESETS
from halfbyte.recipe import LayerSpec

SPECS: dict[str, LayerSpec] = {name: PRESETS[name].inner for name in ("quartz-w4a8", "quartz-w4a4")}

# M, K, N: rows of the input, contraction, outputs
LINEAR = ((4096, 3072, 3072), (1024, 1152, 4608), (256, 2048, 2048), (1, 3072, 3072), (8, 3072, 3072), (32, 3072, 3072))
SMOKE_LINEAR = ((4, 64, 48), (1, 64, 48))

# batch, channels in, channels out, side, kernel, stride
CONV = (
    (2, 320, 320, 64, 3, 1),
    (2, 640, 640, 32, 3, 1),
    (2, 1280, 1280, 16, 3, 1),
    (64, 128, 128, 32, 3, 1),
    (64, 256, 256, 16, 3, 1),
    (2, 320, 320, 64, 3, 2),
    (2, 640, 320, 64, 1, 1),
)
SMOKE_CONV = ((1, 16, 32, 8, 3, 1), (1, 16, 32, 8, 3, 2), (1, 16, 32, 8, 1, 1))


@dataclass(frozen=True)
class Case:
    """One layer, its bfloat16 input, and how many integer operations a call takes (a multiply-add is two)."""

    name: str
    layer: Any
    x: Tensor
    operations: int


def linear_case(rows: int, inner: int, columns: int) -> Case:
    layer = nn.Linear(inner, columns)
    return Case(f"linear {rows}x{inner}x{columns}", layer, torch.randn(rows, inner).bfloat16(), 2 * rows * inner * columns)


def conv_case(batch: int, channels: int, out: int, side: int, kernel: int, stride: int) -> Case:
    layer = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2)
    x = torch.randn(batch, channels, side, side).bfloat16().to(memory_format=torch.channels_last)
    pixels = batch * ((side - 1) // stride + 1) ** 2
    name = f"conv {kernel}x{kernel}/{stride} {batch}x{channels}x{side}x{side} -> {out}"
    return Case(name, layer, x, 2 * pixels * kernel * kernel * channels * out)


def measure(case: Case, effort: Effort, limit: float | None) -> list[dict[str, Any]]:
    """One row for each contestant of a case.

    Args:
        limit: operations a second of this machine's integer instructions, where known.
    """
    packed = {name: packed_twin(case.layer, spec) for name, spec in SPECS.items()}
    ours: Contestants = {name: _bind(layer, case.x) for name, layer in packed.items()}
    onednn = onednn_linear if isinstance(case.layer, nn.Linear) else onednn_conv
    others = float_rivals(case.layer, case.x) | onednn(case.layer, case.x) | openvino_rivals(case.layer, case.x)
    seconds = medians(ours | others, effort)
    plain = 2 * case.layer.weight.numel()
    return [
        {
            "case": case.name,
            "contestant": name,
            "seconds": seconds[name],
            "tops": case.operations / seconds[name] / 1e12,
            "share_of_limit": case.operations / seconds[name] / limit if limit else None,
            "ratio_to": {other: seconds[other] / seconds[name] for other in others if other != name},
            "weight_bytes_of_bf16": _weight_bytes(packed[name]) / plain if name in packed else None,
        }
        for name in seconds
    ]


def _bind(layer: nn.Module, x: Tensor) -> Any:
    return lambda: layer(x)


def _weight_bytes(layer: nn.Module) -> int:
    """What a packed layer holds in memory, bias aside."""
    return sum(buffer.nbytes for buffer in layer.buffers())
