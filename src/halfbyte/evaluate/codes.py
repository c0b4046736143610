"""How a layer's numbers use the codes of a small grid: inputs on its levels, and the entropy of the codes of inputs and weights.

Entropies stand beside those of plain INT4, one scale a channel or token, as in QuaRTZ's figure 4. Grids of more than 6 bits have
more levels than anybody can look at and are left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.formats import Grid, get_grid, levels_to_codes
from halfbyte.layers import FakeQuant, QuantizedLayer, input_to_rows, matrix_shape, scale_input, weight_to_matrix
from halfbyte.packing import unpack_nibbles
from halfbyte.presets import get_recipe
from halfbyte.quantizers import (
    FixedScale,
    minmax_scale,
    quantize_activation,
    quantize_weight,
    spread,
    weight_scale,
)
from halfbyte.recipe import ActivationSpec, largest_multiplier
from halfbyte.splitting import owner_of
from halfbyte.subgroups import round_with_multiples, round_with_shifts

BINS = 64
MOST_BITS = 6  # of grids that are looked at
VALUES = 1 << 18  # of one input that are looked at: whole tokens or images, one at least
MARGIN = 0.25  # shown on both sides of a calibrated grid, as a share of its length; what lies further out is in the last bins
PLAIN = get_recipe("int4-w4a4").inner


def entropy(counts: Tensor) -> float:
    """Shannon entropy in bits of what was counted; 0 where nothing was."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(-torch.xlogy(share, share).sum() / math.log(2)) + 0.0


class InputCodes:
    """Counts of one layer's input, in steps of its scale: where the values lie, and which codes and shifts they get.

    Args:
        spec: of the input; its grid has few bits.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        self.spec, self.grid = spec, get_grid(spec.grid)
        levels = sorted(level * largest_multiplier(spec) for level in self.grid.levels)
        self.ends = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
        beyond = MARGIN * (levels[-1] - levels[0]) if spec.scale != "dynamic" else 0.0
        self.low, self.high = self.ends[0] - beyond, max(self.ends[1] + beyond, spec.peak)
        self.low = min(self.low, 0.0 if spec.zero_point else -spec.peak)
        self.bins = torch.zeros(BINS, dtype=torch.int64)
        self.codes = torch.zeros(2**self.grid.bits, dtype=torch.int64)
        self.plain = torch.zeros(16, dtype=torch.int64)
        self.shifts = torch.zeros(spec.max_multiple or spec.max_shift + 1, dtype=torch.int64)  # multiples from 1
        self.outside = 0
        self.steps: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def add(self, rows: Tensor, fixed: FixedScale | None) -> None:
        """Take in an input, or evenly spread rows of it where it is large.

        Args:
            rows: any float dtype (r, p, c), as `layers.input_to_rows` gives them. fixed: their calibrated scale.
        """
        every = max(1, min(len(rows), -(-rows.numel() // VALUES)))
        rows = rows[::every].float()
        if fixed is not None and fixed.scale.ndim:
            fixed = FixedScale(fixed.scale[::every], fixed.zero[::every])
        if not rows.numel() or not rows.isfinite().all():  # figures say so already
            return
        integers, scale = quantize_activation(rows, self.spec, fixed)
        zero = self._zero(rows, fixed)
        units, levels = (rows * scale.reciprocal() + zero).flatten(), integers + zero
        place = ((units - self.low) * (BINS / (self.high - self.low))).long().clamp_(0, BINS - 1)
        self.bins += torch.bincount(place, minlength=BINS).cpu()
        self.outside += int(((units < self.ends[0]) | (units > self.ends[1])).sum())
        self.codes += self._counted(levels, units.view(levels.shape))
        self.plain += _count_codes(quantize_activation(rows, PLAIN.activation)[0], "int4")  # type: ignore[arg-type]
        self.steps.append(_some(scale))
        self.zeros.append(_some(zero))

    def _zero(self, rows: Tensor, fixed: FixedScale | None) -> Tensor:
        """The zero points that `quantize_activation` takes off its integers; shaped to be added to them."""
        spec, (count, pixels, channels) = self.spec, rows.shape
        if not spec.zero_point:
            return rows.new_zeros(1)
        if fixed is not None:
            return fixed.zero.float().reshape(-1, 1, 1)
        flat = F.pad(rows, (0, -channels % spec.group)).reshape(-1, spec.group) if spec.group else rows.reshape(count, -1)
        return spread(minmax_scale(flat, spec.top)[1].view(count, pixels if spec.group else 1, -1), channels, spec.group)

    def _counted(self, levels: Tensor, units: Tensor) -> Tensor:
        """How often each code stands for these levels (r, p, c), which have their zero points on; counts shifts or multiples too.

        The shift of a subgroup is found by rounding once more: levels that were rounded keep their values and their shift. Its
        multiple is found from the values before, `units` (r, p, c).
        """
        spec = self.spec
        if not spec.two_stage:
            self.shifts += levels.numel()
            return _count_codes(levels, spec.grid)
        if spec.max_multiple:
            whole = units.round().clamp_(0 if spec.zero_point else -spec.top, spec.top)
            levels, multiple = round_with_multiples(whole, self.grid, spec.max_multiple, spec.subgroup)
            self.shifts += torch.bincount(multiple.flatten() - 1, minlength=spec.max_multiple).cpu()
            return _count_codes(levels / spread(multiple.float(), levels.shape[-1], spec.subgroup), spec.grid)
        levels, shift = round_with_shifts(levels, self.grid, spec.max_shift, spec.subgroup)
        self.shifts += torch.bincount(shift.flatten(), minlength=spec.max_shift + 1).cpu()
        own = spread(torch.exp2(-shift.float()), levels.shape[-1], spec.subgroup)
        return _count_codes(levels * own, spec.grid)

    def to_dict(self) -> dict[str, Any] | None:
        """As results.json has it; None where nothing was seen."""
        if not self.steps:
            return None
        return {
            "grid": self.grid.name,
            "entropy": entropy(self.codes),
            "plain": entropy(self.plain),
            "shifts": [round(share, 6) for share in (self.shifts / self.shifts.sum()).tolist()],
            "steps": [*range(1, self.spec.max_multiple + 1)] or [2**shift for shift in range(self.spec.max_shift + 1)],
            "step": float(torch.cat(self.steps).median()),
            "zero": float(torch.cat(self.zeros).median()),
            "low": self.low,
            "high": self.high,
            "counts": self.bins.tolist(),
            "outside": self.outside / int(self.bins.sum()),
        }


def _some(values: Tensor) -> Tensor:
    """About BINS of some values, evenly spread."""
    return values.flatten()[:: max(1, values.numel() // BINS)].cpu()


def _count_codes(levels: Tensor, grid: str) -> Tensor:
    """int64 (2**bits,): how often each code of a grid stands for these levels of it."""
    known = get_grid(grid)
    return torch.bincount(levels_to_codes(levels, known).flatten().long(), minlength=2**known.bits).cpu()


@contextmanager
def watched_inputs(quantized: nn.Module) -> Iterator[dict[str, InputCodes]]:
    """Counts of the inputs of all quantized layers with small grids, by name, for as long as the context lasts.

    Layers that quantize differences between timesteps are left out: theirs is no grid for the input.
    """

    def watch(codes: InputCodes) -> Callable[[Any, tuple[Any, ...]], None]:
        def look(layer: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            x = x if layer.input_scale is None else scale_input(layer, x, layer.input_scale)
            codes.add(input_to_rows(layer, x), layer.fixed_scale(x))

        return look

    seen, handles = {}, []
    for name, layer in _layers(quantized).items():
        spec = layer.spec.activation
        if spec is not None and get_grid(spec.grid).bits <= MOST_BITS and getattr(layer, "difference", None) is None:
            seen[name] = InputCodes(spec)
            handles.append(layer.register_forward_pre_hook(watch(seen[name])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_codes(reference: nn.Module, quantized: nn.Module) -> dict[str, dict[str, Any]]:
    """Grid, entropy of the codes and that of plain INT4, by layer, for weights in small grids; as results.json has it.

    Args:
        reference: the float model. Parts of a split layer stand beside the plain codes of the whole.
    """
    found, plain = {}, dict[str, float]()
    for name, layer in _layers(quantized).items():
        grid, owner = get_grid(layer.spec.weight.grid), owner_of(quantized, name)
        if grid.bits > MOST_BITS:
            continue
        if owner not in plain:
            plain[owner] = _plain_entropy(reference.get_submodule(owner))
        found[name] = {"grid": grid.name, "entropy": entropy(_stored(layer, grid)), "plain": plain[owner]}
    return found


def _stored(layer: Any, grid: Grid) -> Tensor:
    """How often each code stands in the weights of a layer, all its sets together."""
    sets = range(layer.spec.weight.sets)
    if isinstance(layer, FakeQuant):
        codes = torch.cat([layer.quantized_weight(chosen).codes() for chosen in sets])
    else:
        codes = unpack_nibbles(layer.weight_codes, matrix_shape(layer)[1])
    return torch.bincount(codes.flatten().long(), minlength=2**grid.bits).cpu()


def _plain_entropy(layer: Any) -> float:
    matrix = weight_to_matrix(layer, layer.weight.float())
    return entropy(_count_codes(quantize_weight(matrix, weight_scale(matrix, PLAIN.weight), PLAIN.weight).levels, "int4"))


def _layers(model: nn.Module) -> Mapping[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
