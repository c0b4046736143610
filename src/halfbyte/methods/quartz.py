"""QuaRTZ, the paper's dataflow in plain integers: what the fast kernels must equal, written to be read beside the paper.

QuaRTZ (residual truncation and zero suppression, arXiv 2509.26436) stores an activation in four bits in two steps. Quantized to
8-bit integers first, outliers keep their place. Then neighbours share a shift: where the largest of 16 is small, so are all, their
leading bits are zeros, and the four bits kept are the low ones; where it is large, low bits go. The scale may stay coarse, one a
token, because the shift is fine.

    x  --stage1-->  x_hat, s, z  --suppress-->  x4, FLAG  --paper_product-->  integers  --times s-->  y
                    8 bits                      4 bits + 3 per subgroup      (restore: x4 << FLAG)

| paper | here | meaning |
|---|---|---|
| x_hat | `Stage1.x_hat` | 8-bit integers, x about s * (x_hat - z) |
| s, z | `Stage1.s`, `Stage1.z` | scale and zero point of stage 1, one a token; z is 0 on signed grids |
| G_s | `spec.subgroup` | neighbouring channels that share a shift: 16, or 32 |
| m | `largest_bits` | bitwise OR of the magnitudes of a subgroup: its top bit is the top bit of the largest |
| FLAG | `flags` | bit length of m less the bits kept (3 beside a sign, 4 without), at least 0: 0 to 4 |

**The product.** Operands stay at 4 bits: each subgroup's partial sum is a sum of 4-bit products, and is shifted LEFT by the FLAGs
of its two sides before it is added to the others (the draft's wording has it the other way round). Shifting each operand before
the multiplication gives the same integers, which is how the kernels here do it: nibble and shift become an int8 by one look-up,
and one int8 product does the rest. `paper_product` is the former, `restore` with a plain integer product the latter; that they
agree is a test.

**What it maps to.** stage1 is `quantizers.quantize_activation` on an 8-bit grid; suppress is `subgroups.round_with_shifts`; both
at once is `quantize_activation` with a shifted grid. Nothing in this module rounds by itself.

**Variants**, as presets of `recipe.PRESETS`:

- `quartz-w4a4`: ours. Largest value at 112 = 7 << 4, so that the top code exists; round to nearest; FLAG + 1 where it errs less.
- `quartz-paper-w4a4`: the paper's text. Largest value at 127, plain right shift (truncation), always FLAG.
- `quartz-authors-w4a4`: the authors' repository. Stage 1 in groups of 64 channels at 127, G_s 32, INT4 weights in groups of 64.
  Their kernel lets 7.5 round to an 8 that four bits cannot hold; here it saturates. `bench/quartz_rounding.py` measures the gap.
- `quartz-unsigned-w4a4`: after SiLU and GELU, unsigned 8 bits with a zero point (min-max), four magnitude bits and no sign.
- `quartz-w4a8`: weights in this format, activations left at stage 1.

Equation 1 of the paper, clamp(round(x / s + z), -127, 127) with s = (max - min) / 255, does not fit itself: z moves values to
0..255. Here min-max goes with unsigned levels, absmax with signed ones.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import RecipeError
from halfbyte.formats import get_grid
from halfbyte.quantizers import minmax_scale, quantize_activation, spread
from halfbyte.recipe import ActivationSpec, WeightSpec
from halfbyte.subgroups import round_with_shifts


class Stage1(NamedTuple):
    """8-bit integers of some tokens: x is about s * (x_hat - z)."""

    x_hat: Tensor  # int32 (T, K): -top..top, or 0..top with a zero point; top is spec.top
    s: Tensor  # float32 (T, 1)
    z: Tensor  # int32 (T, 1)


def stage1(x: Tensor, spec: ActivationSpec) -> Stage1:
    """The first step: tokens to 8-bit integers, with a scale (and where the spec says so a zero point) each.

    Args:
        x: float (T, K), finite. For stage-1 scales of 64 channels, cut the tokens into rows of 64 first.
    Raises:
        RecipeError: when the spec has channel groups.
    """
    if spec.group:
        raise RecipeError(f"stage1 takes one scale a row, the spec has groups of {spec.group}; cut the tokens into such rows first")
    eight_bits = ActivationSpec("uint8" if spec.zero_point else "int8", zero_point=spec.zero_point, peak=spec.top)
    integers, s = quantize_activation(x[:, None], eight_bits)
    z = minmax_scale(x.float(), spec.top)[1] if spec.zero_point else x.new_zeros(len(x))
    z = z.to(torch.int32)[:, None]
    return Stage1(integers[:, 0].to(torch.int32) + z, s[:, 0], z)


def largest_bits(x_hat: Tensor, subgroup: int) -> Tensor:
    """m: the bitwise OR of the magnitudes of each subgroup, int32 (..., ceil(K / subgroup)). The tail counts as zeros."""
    padded = F.pad(x_hat.abs(), (0, -x_hat.shape[-1] % subgroup))
    m = torch.zeros_like(padded[..., ::subgroup])
    for member in padded.unflatten(-1, (-1, subgroup)).unbind(-1):
        m |= member
    return m


def flags(x_hat: Tensor, spec: ActivationSpec | WeightSpec) -> Tensor:
    """FLAG = max(bit length of m - bits kept, 0), at most the spec's largest shift.

    Args:
        x_hat: int32 (..., K).
    Returns:
        int32 (..., ceil(K / subgroup)).
    """
    m = largest_bits(x_hat, spec.subgroup)
    bit_length = torch.stack([m >> bit > 0 for bit in range(8)]).sum(0, dtype=torch.int32)
    kept = get_grid(spec.grid).top.bit_length()
    return (bit_length - kept).clamp(0, spec.max_shift)


def suppress(x_hat: Tensor, spec: ActivationSpec | WeightSpec) -> tuple[Tensor, Tensor]:
    """The second step: 8-bit integers to 4-bit ones and a FLAG for each subgroup, as the spec rounds.

    Args:
        x_hat: int32 (T, K), of stage 1.
    Returns:
        x4, int32 (T, K), levels of the 4-bit grid, and FLAG, int32 (T, ceil(K / subgroup)). Truncation takes the FLAG of `flags`;
        rounding to nearest takes one more where that errs less.
    """
    grid, truncate = get_grid(spec.grid), spec.rounding == "truncate"
    shifted, shift = round_with_shifts(x_hat.float(), grid, spec.max_shift, spec.subgroup, truncate)
    flag = shift.to(torch.int32)
    return shifted.to(torch.int32) >> spread(flag, x_hat.shape[-1], spec.subgroup), flag


def restore(x4: Tensor, flag: Tensor, subgroup: int) -> Tensor:
    """x4 << FLAG: 8-bit integers (int32) again, without the bits that were dropped."""
    return x4 << spread(flag, x4.shape[-1], subgroup)


def paper_product(
    x4: Tensor, x_flags: Tensor, w4: Tensor, w_flags: Tensor | None = None, x_subgroup: int = 16, w_subgroup: int = 16
) -> Tensor:
    """x times w transposed, by 4-bit products whose partial sums are shifted left by the FLAGs of both sides, then added.

    With a zero point, take z * restore(w4).sum() of each output off the result.

    Args:
        x4: int32 (M, K), levels of a 4-bit grid. w4: the same (N, K).
        x_flags: int32 (M, ceil(K / x_subgroup)). w_flags: int32 (N, ceil(K / w_subgroup)); None: weights without shifts.
    Returns:
        int32 (M, N): sum over k of (x4 << x_flag) * (w4 << w_flag).
    """
    total = x4.new_zeros(len(x4), len(w4))
    run = math.gcd(x_subgroup, w_subgroup)  # neighbours that share both flags
    for start in range(0, x4.shape[1], run):
        partial = x4[:, start : start + run] @ w4[:, start : start + run].T
        shift = x_flags[:, start // x_subgroup, None]
        if w_flags is not None:
            shift = shift + w_flags[:, start // w_subgroup]
        total += partial << shift
    return total
