"""The GPU backend: which packed layers the Triton kernels take, and the two torch operators they are reached by.

    halfbyte::triton_linear    x (..., K)       -> (..., N)          in the dtype of x; gelu = 1: its GELU, 2: approximated by tanh
    halfbyte::triton_conv2d    x (B, C, H, W)   -> (B, N, H', W')    in the dtype of x; channels-last or contiguous, as asked

Codes stay in the checkpoint's order. Nothing here waits for the GPU, so that CUDA graphs can hold a whole model.
"""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import get_grid
from halfbyte.layers import TRANSPOSED
from halfbyte.quantizers import FixedScale
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime.engine import DTYPES, LIBRARY
from halfbyte.runtime.geometry import Geometry, geometry_of, output_size

INTERPRET = "TRITON_INTERPRET"
INPUT_NUMBERS = 9  # of `Plan.grids`: what the input's grid takes; the rest is the weight's


@dataclass(frozen=True)
class Plan(Geometry):
    """How the kernels run one layer."""

    grids: tuple[int, ...]  # the fields of launches.InputGrid, then those of WeightGrid


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for: the kernels then run on the CPU, very slowly."""
    return os.environ.get(INTERPRET) == "1"


@cache
def missing() -> str | None:
    """Why the kernels cannot run in this process; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install 'halfbyte[triton]'"
    if not (torch.cuda.is_available() or interpreting()):
        return f"there is no GPU ({INTERPRET}=1 runs its kernels in an interpreter)"
    return None


@cache
def kernels() -> ModuleType:
    """The module that launches the kernels; importing it imports triton."""
    from halfbyte.runtime import launches

    return launches


def plan_for(layer: Any, spec: LayerSpec) -> Plan | str:
    """How the kernels run a packed layer, or why they do not and the reference backend does."""
    if isinstance(layer, TRANSPOSED):
        return "the GPU engine has no transposed convolutions"
    if spec.activation is None:
        return "its input stays in float"
    subgroups = [spec.weight.subgroup] * spec.weight.has_multipliers + [spec.activation.subgroup] * spec.activation.two_stage
    odd = [one for one in subgroups if one & (one - 1) or not 2 <= one <= 1024]
    if odd:
        return f"the GPU engine takes subgroups of 2, 4, 8 to 1024, not {odd[0]}"
    found = geometry_of(layer)
    if found.sizes[-1] != 1:
        return "the GPU engine has no grouped convolutions"
    return Plan(found.sizes, found.grow, found.grow_mode, (*input_numbers(spec.activation), *weight_numbers(spec.weight)))


def input_numbers(spec: ActivationSpec) -> tuple[int, ...]:
    """How an input is rounded, as the operators take it: the fields of launches.InputGrid."""
    grid = get_grid(spec.grid)
    mantissa = -1 if grid.contiguous else grid.mantissa_bits or 0
    steps = (spec.max_shift, spec.subgroup if spec.two_stage else 1, int(spec.rounding == "truncate"), spec.max_multiple)
    return grid.bottom, grid.top, mantissa, int(grid.signed), spec.top, *steps


def weight_numbers(spec: WeightSpec) -> tuple[int, ...]:
    """How codes become integers: the fields of launches.WeightGrid."""
    grid = get_grid(spec.grid)
    table = 0 if grid.coding == "twos-complement" else int.from_bytes(bytes(grid.magnitudes), "little")
    return grid.bits, table, spec.subgroup if spec.has_multipliers else 0, int(spec.max_multiple > 0)


def takes(x: Tensor) -> bool:
    """Whether the kernels take an input; the reference backend runs the others."""
    return x.dtype in DTYPES and (x.is_cuda or (interpreting() and x.device.type == "cpu"))


def forward(layer: Any, plan: Plan, x: Tensor, chosen: int = 0, fixed: FixedScale | None = None) -> Tensor:
    """A whole packed layer: float input to float output.

    Args:
        chosen: which set of weights, where there are several. fixed: the calibrated scale of the input, where it has one.
    Raises:
        PackedError: when the input does not have the layer's number of channels, or is smaller than its kernel.
    """
    plan.check(layer, x)
    codes, multipliers = layer.neutral()
    if layer.spec.weight.sets > 1:
        codes, multipliers = codes[chosen], None if multipliers is None else multipliers[chosen]
    calibrated = (None, None) if fixed is None else (fixed.scale, fixed.zero if layer.spec.activation.zero_point else None)
    weights = codes, multipliers, layer.weight_scale, layer.bias, plan.grids, *calibrated
    if isinstance(layer, nn.Linear):
        return torch.ops.halfbyte.triton_linear(x, *weights)  # type: ignore[no-any-return]
    return plan.over_images(layer, x, lambda images, last: torch.ops.halfbyte.triton_conv2d(images, plan.sizes, last, *weights))


_WEIGHTS = "Tensor codes, Tensor? multipliers, Tensor weight_scale, Tensor? bias, int[] grids, " + (
    "Tensor? scale=None, Tensor? zero=None"
)
LIBRARY.define(f"triton_linear(Tensor x, {_WEIGHTS}, int gelu=0) -> Tensor")
LIBRARY.define(f"triton_conv2d(Tensor x, int[] sizes, bool channels_last, {_WEIGHTS}) -> Tensor")


def _grids(numbers: Sequence[int]) -> tuple[Any, Any]:
    signed, truncate = bool(numbers[3]), bool(numbers[7])
    given = (*numbers[:3], signed, *numbers[4:7], truncate, *numbers[8:INPUT_NUMBERS])
    bits, table, subgroup, multiples = numbers[INPUT_NUMBERS:]
    return kernels().InputGrid(*given), kernels().WeightGrid(bits, table, subgroup, bool(multiples))


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever device its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _linear(
    x: Tensor, codes: Tensor, multipliers: Tensor | None, weight_scale: Tensor, bias: Tensor | None, grids: Sequence[int],
    scale: Tensor | None = None, zero: Tensor | None = None, gelu: int = 0,
) -> Tensor:  # fmt: skip
    if not x.numel():
        return _linear_output(x, codes)
    input_grid, weight_grid = _grids(grids)
    weights = kernels().Weights(codes, multipliers, weight_scale, bias, weight_grid)
    with _on_device_of(x):
        y = kernels().linear(x.reshape(-1, x.shape[-1]).contiguous(), weights, input_grid, (scale, zero), gelu)
    return y.view(*x.shape[:-1], len(codes))  # type: ignore[no-any-return]


def _linear_output(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _conv2d(
    x: Tensor, sizes: Sequence[int], channels_last: bool, codes: Tensor, multipliers: Tensor | None, weight_scale: Tensor,
    bias: Tensor | None, grids: Sequence[int], scale: Tensor | None = None, zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if not x.numel():
        return _conv2d_output(x, sizes, channels_last)
    input_grid, weight_grid = _grids(grids)
    weights = kernels().Weights(codes, multipliers, weight_scale, bias, weight_grid)
    shape = (*sizes[2:12], *output_size(x.shape[2:], sizes[2:4], sizes[4:6], sizes[6:8], sizes[8:12]))
    with _on_device_of(x):
        found = kernels().conv2d(x.permute(0, 2, 3, 1).contiguous(), shape, weights, input_grid, (scale, zero)).permute(0, 3, 1, 2)
    return found if channels_last else found.contiguous()  # type: ignore[no-any-return]


def _conv2d_output(x: Tensor, sizes: Sequence[int], channels_last: bool, *_: Any) -> Tensor:
    size = output_size(x.shape[2:], sizes[2:4], sizes[4:6], sizes[6:8], sizes[8:12])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], sizes[1], *size), dtype=x.dtype, device=x.device, memory_format=layout)


for _name, _run, _output in (("triton_linear", _linear, _linear_output), ("triton_conv2d", _conv2d, _conv2d_output)):
    LIBRARY.impl(_name, _run, "CUDA")
    LIBRARY.impl(_name, _run, "CPU")  # for the interpreter
    torch.library.register_fake(f"halfbyte::{_name}", _output, lib=LIBRARY)
