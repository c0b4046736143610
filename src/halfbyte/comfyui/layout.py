"""A quantized layer as ComfyUI stores it: which of its formats holds a weight exactly, and the bytes of that format.

A layer NAME is `NAME.weight`, its scales, and `NAME.comfy_quant`: JSON as uint8, whose `format` says how to read the others.

    int8_tensorwise    weight int8 (O, K); weight_scale float32 (O, 1)
                       value = weight * weight_scale
    nvfp4              weight uint8 (O, K / 2), e2m1 codes, the earlier one in the high nibble;
                       weight_scale float8_e4m3fn, one for 16 values, in tiles; weight_scale_2 float32 ()
                       value = e2m1 * (weight_scale_2 * weight_scale)

Source: ComfyUI's QUANTIZATION.md and quant_ops.py, comfy-kitchen's layouts, August 2026. Their other 4-bit formats cannot hold a
weight of ours: convrot_w4a4 and asym_w4a8_int8 store rotated weights, and the scales of awq_w4a16 have 16 bits.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.formats import get_grid, levels_to_codes
from halfbyte.quantizers import spread
from halfbyte.recipe import LayerSpec, WeightSpec

INT8, NVFP4 = "int8_tensorwise", "nvfp4"
MARK = "comfy_quant"
BLOCK = 16  # values that share a scale of nvfp4
TILE = (128, 4)  # rows and blocks in a tile of its scales
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Matrix:
    """A quantized weight: `levels` float32 whole numbers (O, K), shifts applied; `scale` float32 (O, 1), or (O, groups)."""

    levels: Tensor
    scale: Tensor
    spec: WeightSpec

    def values(self) -> Tensor:
        """float32 (O, K)."""
        return self.levels * spread(self.scale, self.levels.shape[1], self.spec.group)


def format_of(spec: WeightSpec) -> str | None:
    """The format that holds weights of a spec exactly, their shape permitting; None where there is none."""
    grid = get_grid(spec.grid)
    if not spec.group and not grid.simulated_only:
        return INT8
    return NVFP4 if (spec.grid, spec.group, spec.group_scale) == ("e2m1", BLOCK, "e4m3") else None


def loss(spec: LayerSpec, smoothed: bool) -> str | None:
    """What ComfyUI's formats would lose of a layer, in words (None: nothing)."""
    weight = spec.weight
    if weight.sets > 1:
        return f"all but one of its {weight.sets} sets of weights, which are chosen by timestep"
    if spec.low_rank:
        return f"its branch of rank {spec.low_rank}"
    if smoothed:
        return "the factors that smooth its input"
    if format_of(weight) is None:
        held = f"one scale an output channel, or {BLOCK} e2m1 values under an e4m3 scale"
        return f"its weights, {weight.describe()}: what can be held is {held}"
    return None


def fits(kind: str, rows: int, count: int) -> bool:
    """Whether a format takes a weight (O, K) of that shape; nvfp4 takes others padded only."""
    return kind == INT8 or (rows % BLOCK == 0 and count % BLOCK == 0)


def mark(kind: str, float_input: bool) -> Tensor:
    """The JSON of a layer. A float input means that its product must not round it to 8 or 4 bits."""
    entry = {"format": kind, "full_precision_matrix_mult": True} if float_input else {"format": kind}
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def sizes(kind: str, rows: int, count: int) -> Sizes:
    """Shapes and dtypes of a layer's tensors, its mark and bias aside."""
    if kind == INT8:
        return {"weight": ((rows, count), torch.int8), "weight_scale": ((rows, 1), torch.float32)}
    tiled = (-(-rows // TILE[0]) * TILE[0], -(-count // BLOCK // TILE[1]) * TILE[1])
    return {
        "weight": ((rows, count // 2), torch.uint8),
        "weight_scale": (tiled, torch.float8_e4m3fn),
        "weight_scale_2": ((), torch.float32),
    }


def int8_tensors(matrix: Matrix) -> dict[str, Tensor]:
    return {"weight": matrix.levels.to(torch.int8), "weight_scale": matrix.scale}


def nvfp4_tensors(matrix: Matrix) -> dict[str, Tensor]:
    """Their e2m1 counts in halves where ours counts in whole numbers, so that the one float32 scale doubles: exactly."""
    codes = levels_to_codes(matrix.levels, get_grid("e2m1"))
    small, whole = _factors(matrix.scale)
    return {
        "weight": codes[:, 0::2] << 4 | codes[:, 1::2],
        "weight_scale": to_tiles(small),
        "weight_scale_2": 2 * whole,
    }


TENSORS: dict[str, Callable[[Matrix], dict[str, Tensor]]] = {INT8: int8_tensors, NVFP4: nvfp4_tensors}


def _factors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Group scales (O, groups) as float8_e4m3fn times one float32, whose products are the very same numbers.

    The largest is 448 times the float32 by construction (`quantizers.round_group_scale`), but a quotient of floats may be the
    neighbour of the number that made the product.
    """
    near = scale.amax() / 448
    for whole in (near, torch.nextafter(near, near * 2), torch.nextafter(near, near * 0)):
        small = (scale / whole).to(torch.float8_e4m3fn)
        if torch.equal(small.float() * whole, scale):
            return small, whole
    raise ModelError("the group scales of layers that ComfyUI joins are no e4m3 multiples of one float32, the only form it holds")


def to_tiles(scale: Tensor) -> Tensor:
    """Block scales (O, K / 16) in the order that Blackwell's matrix units read them, zeros where a tile is not full.

    Tiles of 128 rows by 4 blocks follow one another along K, then down the rows. A tile holds 32 rows of 16 bytes: row r of it
    has the 4 scales of rows r, r + 32, r + 64 and r + 96 side by side. Source: cuBLAS, "1D block scaling factors layout".
    """
    rows, blocks = scale.shape
    down, along = -(-rows // TILE[0]), -(-blocks // TILE[1])
    padded = torch.zeros((down * TILE[0], along * TILE[1]), dtype=torch.uint8)
    padded[:rows, :blocks] = scale.contiguous().view(torch.uint8)
    quarters = padded.view(down, 4, 32, along, TILE[1])  # tile row, quarter, row of it, tile column, block
    return quarters.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(torch.float8_e4m3fn)
