"""Recipes: what happens to every layer of a model, as frozen data that can be saved, compared and read by people.

A recipe says how weights and activations are quantized, and how the layers at the edges of the model (the first and the last) are.
The named ones are in presets.py. YAML and JSON forms are plain nested mappings of the fields; unknown keys are refused.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from halfbyte.errors import RecipeError, listed
from halfbyte.fields import Fields
from halfbyte.formats import Grid, get_grid


def _check_shift(owner: str, grid: Grid, max_shift: int, subgroup: int) -> None:
    if not 0 <= max_shift <= grid.largest_shift:
        raise RecipeError(f"{owner}: grid {grid.name!r} can carry shifts of 0 to {grid.largest_shift}, got max_shift {max_shift}")
    if not 1 <= subgroup <= 1024:
        raise RecipeError(f"{owner}: subgroup must be 1 to 1024 values, got {subgroup}")


def _check_multiple(owner: str, grid: Grid, most: int, max_shift: int) -> None:
    limit = min(16, grid.reach // grid.top) if grid.bits == 4 else 0  # 16: it is a nibble
    if most and (max_shift or not 2 <= most <= limit):
        allowed = f"2 to {limit}" if limit >= 2 else "none"
        raise RecipeError(
            f"{owner}: max_multiple of grid {grid.name!r} can be {allowed}, and only where max_shift is 0; "
            f"got {most}" + (f" with max_shift {max_shift}" if max_shift else "")
        )


GroupScale = Literal["float32", "e4m3", "e8m0"]


def _check_group_scale(owner: str, group: int, scale: str) -> None:
    if scale != "float32" and not group:
        raise RecipeError(f"{owner}: {scale} scales belong to groups; set group to how many values share one, such as 16")


@dataclass(frozen=True)
class WeightSpec(Fields):
    """How the weights of a layer are stored: one float32 scale an output channel, codes of `grid`, multipliers where asked.

    A multiplier belongs to a subgroup: a power of two (`max_shift`) or any whole number (`max_multiple`). Its levels times it still
    fit int8.
    """

    grid: str = "int4"
    max_shift: int = 0  # largest left shift of a subgroup; 0: none
    subgroup: int = 16  # neighbouring values along K that share a multiplier
    scale: Literal["absmax", "search"] = "search"  # absmax: the largest weight takes the top level; search: least Lp error
    norm: float = 2.0  # p of the searched error
    # gptq: errors are compensated along K; adaround: up or down is optimized for every weight. Both need calibration
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    group: int = 0  # values along K that share a scale; 0: the whole channel. Anything else is simulated only
    group_scale: GroupScale = "float32"  # what the scales of groups are rounded to
    sets: int = 1  # versions of the weights, chosen by timestep (healed by LoRAs that were)
    max_multiple: int = 0  # largest whole number that a subgroup is multiplied with, in place of a shift; 0: none

    def _check(self) -> None:
        _check_shift("WeightSpec", get_grid(self.grid), self.max_shift, self.subgroup)
        _check_multiple("WeightSpec", get_grid(self.grid), self.max_multiple, self.max_shift)
        if not 1 <= self.sets <= 255:
            raise RecipeError(f"WeightSpec: sets must be 1 to 255, got {self.sets}")
        if not get_grid(self.grid).signed:
            raise RecipeError(f"WeightSpec: weights need a signed grid, got {self.grid!r}")
        if self.group and self.has_multipliers:
            raise RecipeError(
                "WeightSpec: group scales and multipliers exclude each other; set group, or max_shift and max_multiple, to 0"
            )
        _check_group_scale("WeightSpec", self.group, self.group_scale)
        if self.group < 0 or not 0 < self.norm < math.inf:
            raise RecipeError(f"WeightSpec: group must be >= 0 and norm a finite number > 0, got {self.group} and {self.norm}")

    @property
    def has_multipliers(self) -> bool:
        """Whether each subgroup has a multiplier of its own."""
        return bool(self.max_shift or self.max_multiple)

    @property
    def top(self) -> int:
        """The largest integer that is stored: what the largest magnitude of a row maps to under its absmax scale."""
        return get_grid(self.grid).top * largest_multiplier(self)

    @property
    def bits(self) -> float:
        """Stored bits a weight, of codes and multipliers of one set."""
        return get_grid(self.grid).bits + (4 / self.subgroup if self.has_multipliers else 0)

    def describe(self) -> str:
        """Such as `lzs4<<4/16`: subgroups of 16, shifts to 4; `e2m1*10/16`: multiples to 10; `int4 g64`: scales of groups of 64."""
        return _describe(self) + (f" x{self.sets}" if self.sets > 1 else "")


@dataclass(frozen=True)
class ActivationSpec(Fields):
    """How the input of a layer is quantized while the model runs.

    One float32 scale a token (the row of a linear layer) or an image (convolutions, whose K spans neighbouring pixels), taken from
    the data (`dynamic`); or calibrated ones: a single one (`static`), or one for each calibrated timestep (`timestep`).
    Grids with shifts or multiples round twice: to 8-bit integers, then each subgroup of channels to the 4-bit table, times a power
    of two or times a small integer of its own.
    """

    grid: str = "int8"
    max_shift: int = 0
    subgroup: int = 16  # neighbouring channels of one token or pixel that share a shift or multiple
    zero_point: bool = False  # min-max range with an integer zero point; unsigned grids only
    rounding: Literal["nearest", "truncate"] = "nearest"  # of the second stage; truncate is the paper's plain right shift
    peak: int = 0  # integer the largest magnitude maps to; 0: the top level after the largest shift
    group: int = 0  # channels of one token or pixel that share a scale; 0: the whole token or image. Else simulated only
    group_scale: GroupScale = "float32"  # what the scales of groups are rounded to
    scale: Literal["dynamic", "static", "timestep"] = "dynamic"
    max_multiple: int = 0  # largest integer that the levels of a subgroup are multiplied with, in place of a shift; 0: none

    def _check(self) -> None:
        grid = get_grid(self.grid)
        _check_shift("ActivationSpec", grid, self.max_shift, self.subgroup)
        _check_multiple("ActivationSpec", grid, self.max_multiple, self.max_shift)
        if self.zero_point == grid.signed:
            need = "needs a zero point" if self.zero_point is False else "cannot have a zero point"
            raise RecipeError(f"ActivationSpec: grid {self.grid!r} {need}; set zero_point to {not self.zero_point}")
        if self.rounding == "truncate" and not (self.max_shift and grid.contiguous):
            raise RecipeError(
                "ActivationSpec: truncation is a right shift; it needs max_shift > 0 and an integer grid such as 'lzs4'"
            )
        if self.scale != "dynamic" and (self.group or self.peak):
            raise RecipeError(f"ActivationSpec: {self.scale} scales come from calibration; set group and peak to 0")
        _check_group_scale("ActivationSpec", self.group, self.group_scale)
        limit = 127 if grid.signed else 255
        if not 0 <= self.peak <= limit or self.group < 0:
            raise RecipeError(f"ActivationSpec: peak must be 0 to {limit} and group >= 0, got {self.peak} and {self.group}")

    @property
    def top(self) -> int:
        """The integer that the largest magnitude (or range) maps to."""
        return self.peak or get_grid(self.grid).top * largest_multiplier(self)

    @property
    def two_stage(self) -> bool:
        """Whether values are rounded to whole numbers first, then by subgroups."""
        return bool(self.max_shift or self.max_multiple)

    def describe(self) -> str:
        zero = " +z" if self.zero_point else ""
        cut = " cut" if self.rounding == "truncate" else ""
        fixed = "" if self.scale == "dynamic" else f" {self.scale}"
        return _describe(self) + zero + cut + fixed


def largest_multiplier(spec: WeightSpec | ActivationSpec) -> int:
    """What the levels of a subgroup are multiplied with at most."""
    return spec.max_multiple or 1 << spec.max_shift


def _describe(spec: WeightSpec | ActivationSpec) -> str:
    text = spec.grid
    if spec.max_shift or spec.max_multiple:
        text += (f"*{spec.max_multiple}" if spec.max_multiple else f"<<{spec.max_shift}") + f"/{spec.subgroup}"
    if spec.group:
        text += f" g{spec.group}" + ("" if spec.group_scale == "float32" else f" {spec.group_scale}")
    return text


@dataclass(frozen=True)
class LayerSpec(Fields):
    """Weights and input of one layer. `activation` null: the input stays in float."""

    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = None
    low_rank: int = 0  # rank of a 16-bit branch that takes the largest singular values of the weights (SVDQuant); simulated only

    def simulated_only(self) -> str | None:
        """Why this layer cannot run in exact integers (None: it can)."""
        grids = (self.weight.grid, *([] if self.activation is None else [self.activation.grid]))
        wide = next((name for name in grids if get_grid(name).simulated_only), None)
        if wide is not None:
            return f"grid {wide!r} has no packed form"
        if self.low_rank:
            return f"its branch of rank {self.low_rank} runs in 16 bits"
        if self.weight.group:
            return f"weight scales for groups of {self.weight.group} change along K"
        if self.activation is not None and self.activation.group:
            return f"activation scales for groups of {self.activation.group} channels change along K"
        return None

    @property
    def over_time(self) -> bool:
        """Whether the layer has tables with an entry for each calibrated timestep."""
        return self.weight.sets > 1 or (self.activation is not None and self.activation.scale == "timestep")

    @property
    def needs_calibration(self) -> bool:
        return self.weight.rounding != "nearest" or (self.activation is not None and self.activation.scale != "dynamic")

    def describe(self) -> str:
        branch = f" + rank {self.low_rank}" if self.low_rank else ""
        return f"{self.weight.describe()}{branch} x {self.activation.describe() if self.activation else 'float'}"


@dataclass(frozen=True)
class GridSearch(Fields):
    """What MSFP searches for every inner layer: its grids, scales and zero points of least mean squared error."""

    weight_grids: tuple[str, ...] = ("e1m2", "e2m1", "e3m0")  # one for the layer, a scale an output channel
    signed_grids: tuple[str, ...] = ("e1m2", "e2m1", "e3m0")  # of the input
    unsigned_grids: tuple[str, ...] = ("ue1m3", "ue2m2", "ue3m1")  # of the input, with a zero point, where it may be one-sided
    points: int = 111  # scales tried for every grid
    skew: float = 0.5  # an input whose minimum is above -skew * maximum may be one-sided, wherever it comes from
    objective: Literal["input", "output"] = "input"  # the error that counts: of the rounded tensor, or of the layer's output

    def _check(self) -> None:
        for name, grids in (("weight_grids", self.weight_grids), ("signed_grids", self.signed_grids)):
            wrong = [grid for grid in grids if not get_grid(grid).signed]
            if wrong or not grids:
                raise RecipeError(f"GridSearch: {name} needs signed grids, at least one, got {listed(wrong) or 'none'}")
        wrong = [grid for grid in self.unsigned_grids if get_grid(grid).signed]
        if wrong:
            raise RecipeError(f"GridSearch: unsigned_grids cannot hold {listed(wrong)}")
        if self.points < 2 or not 0 <= self.skew <= 1:
            raise RecipeError(f"GridSearch: points must be at least 2 and skew 0 to 1, got {self.points} and {self.skew}")


@dataclass(frozen=True)
class Reconstruction(Fields):
    """How the weights of a recipe with rounding `adaround` are optimized."""

    unit: Literal["layer", "block"] = "layer"  # block: then residual and transformer blocks as a whole, by their output
    iterations: int = 300  # for each layer or block; 0: single weights are turned while that helps, nothing is trained
    seconds: float | None = None  # for the whole model, where that is less; the result then depends on the machine
    learning_rate: float = 0.1
    regularizer: float = 10.0  # weight of what pushes every choice to up or down
    warmup: float = 0.2  # part of the iterations before that begins

    def _check(self) -> None:
        if (
            self.iterations < 0
            or (self.unit == "block" and not self.iterations)
            or (self.seconds is not None and not 0 < self.seconds < math.inf)
        ):
            raise RecipeError(
                "Reconstruction: iterations must be at least 0 (1 for blocks) and seconds above 0, got "
                f"{self.iterations} and {self.seconds}"
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.regularizer < math.inf and 0 <= self.warmup < 1):
            raise RecipeError(
                "Reconstruction: learning_rate must be above 0, regularizer at least 0 and warmup 0 to below 1, got "
                f"{self.learning_rate}, {self.regularizer} and {self.warmup}"
            )


@dataclass(frozen=True)
class AttentionSpec(Fields):
    """How attention's two matrix products are quantized. uint8 and int8 run in integers (`INTEGERS`), all else is simulated."""

    softmax: str | None = "uint8"  # unsigned grid of the softmax output, a scale a row; null: float
    operands: str | None = None  # signed grid of queries and keys (a scale a token) and values (a scale a channel); null: float

    def _check(self) -> None:
        if self.softmax is not None and get_grid(self.softmax).signed:
            raise RecipeError(f"AttentionSpec: softmax outputs are positive and take an unsigned grid, not {self.softmax!r}")
        if self.operands is not None and not get_grid(self.operands).signed:
            raise RecipeError(f"AttentionSpec: queries, keys and values need a signed grid, got {self.operands!r}")
        if self.softmax is self.operands is None:
            raise RecipeError("AttentionSpec: nothing to quantize; set softmax or operands, or the recipe's attention to null")

    def describe(self) -> str:
        return f"Q, K, V {self.operands or 'float'}; softmax {self.softmax or 'float'}"


INTEGERS = AttentionSpec("uint8", "int8")
INT8 = LayerSpec(WeightSpec("int8", scale="absmax"), ActivationSpec("int8"))


LAYER_GROUPS = ("modulation", "skip", "text")  # targets.GROUPS has their patterns


def _check_pattern(owner: str, pattern: str) -> None:
    if pattern.startswith("@"):
        if pattern[1:] not in LAYER_GROUPS:
            raise RecipeError(f"{owner} has {pattern!r}; the groups of layers are {listed('@' + name for name in LAYER_GROUPS)}")
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"{owner} has {pattern!r}, which is no regular expression: {error}") from error


@dataclass(frozen=True)
class LayerOverride(Fields):
    """Layers that get a spec of their own, edges included."""

    pattern: str  # regular expression, searched in the layer name; or a group of layers, such as "@modulation"
    spec: LayerSpec

    def _check(self) -> None:
        _check_pattern("LayerOverride: pattern", self.pattern)


@dataclass(frozen=True)
class Recipe(Fields):
    """What happens to every layer of a model."""

    name: str
    inner: LayerSpec  # every layer but the edges
    edge: LayerSpec | None = INT8  # first and last layer; null: kept in float
    after_silu: ActivationSpec | None = None  # replaces the activation where the input is a SiLU or GELU output
    smooth: float | Literal["search"] | None = (
        None  # strength of SmoothQuant scaling, 0 to 1, or the best for each layer; calibrates
    )
    search: GridSearch | None = None  # choose the grids of every inner layer; needs calibration
    reconstruction: Reconstruction | None = None  # how rounding `adaround` optimizes; null: as Reconstruction() does
    overrides: tuple[LayerOverride, ...] = ()  # layers with a spec of their own; the first that matches counts
    split: bool = False  # convolutions that read a concatenation become a sum of one for each part; calibrates
    attention: AttentionSpec | None = None  # quantize attention's products too
    temporal: bool = False  # quantize what an input changed by since the last timestep (MoDiff); simulated only
    keep: tuple[str, ...] = ()  # regular expressions of layer names, or groups such as "@text", to keep in float

    def _check(self) -> None:
        if isinstance(self.smooth, (int, float)) and not 0 <= self.smooth <= 1:
            raise RecipeError(f"Recipe: smooth must be 0 to 1, 'search' or null, got {self.smooth}")
        activation = self.inner.activation
        if self.search is not None and (activation is None or activation.scale == "dynamic" or self.after_silu is not None):
            raise RecipeError("Recipe: a grid search needs inner activations with static or timestep scales, and no after_silu")
        if self.smooth is not None and any(s.activation and s.activation.scale != "dynamic" for s in self._layer_specs()):
            raise RecipeError("Recipe: smoothing changes inputs whose static or timestep scales are calibrated; set smooth to null")
        if self.temporal and self.inner.activation is None and self.after_silu is None:
            raise RecipeError("Recipe: differences over time are of quantized inputs, but inner inputs stay in float")
        if self.reconstruction is not None and all(spec.weight.rounding != "adaround" for spec in self._layer_specs()):
            raise RecipeError("Recipe: reconstruction is for weights with rounding 'adaround', and no layer has it")
        for pattern in self.keep:
            _check_pattern("Recipe: keep", pattern)

    @property
    def needs_calibration(self) -> bool:
        return self.smooth is not None or self.split or any(spec.needs_calibration for spec in self._layer_specs())

    @property
    def by_output(self) -> bool:
        """Whether something is chosen by the error of the layers' outputs, on a sample of their contraction rows."""
        return self.smooth == "search" or (self.search is not None and self.search.objective == "output")

    def _layer_specs(self) -> list[LayerSpec]:
        """Every layer spec that the recipe may give to a layer; the searched ones by their grids."""
        specs = [self.inner, *([] if self.edge is None else [self.edge]), *(one.spec for one in self.overrides)]
        if self.after_silu is not None:
            specs.append(self.inner.replace(activation=self.after_silu))
        if self.search is not None and self.inner.activation is not None:
            weights = (self.inner.weight.replace(grid=grid) for grid in self.search.weight_grids)
            inputs = [self.inner.activation.replace(grid=grid, zero_point=False) for grid in self.search.signed_grids]
            inputs += [self.inner.activation.replace(grid=grid, zero_point=True) for grid in self.search.unsigned_grids]
            specs += [LayerSpec(weight, inputs[0]) for weight in weights] + [LayerSpec(activation=one) for one in inputs]
        return specs

    def simulated_only(self) -> str | None:
        """Why some layer of this recipe cannot run in exact integers (None: all can)."""
        if self.attention is not None and self.attention != INTEGERS:
            return f"its attention with {self.attention.describe()} exists in simulation only; {INTEGERS.describe()} runs"
        if self.temporal:
            return "its differences over time exist in simulation only"
        return next((hindrance for hindrance in (spec.simulated_only() for spec in self._layer_specs()) if hindrance), None)

    def with_attention(self) -> "Recipe":
        """This recipe with the products of attention in 8-bit integers."""
        return self.replace(name=f"{self.name}+attention", attention=INTEGERS)

    def compensated(self) -> "Recipe":
        """This recipe with GPTQ error compensation of the inner weights; needs calibration."""
        return self._rounded("gptq", None)

    def adarounded(self, reconstruction: Reconstruction | None = None) -> "Recipe":
        """This recipe with AdaRound of the inner weights; needs calibration."""
        return self._rounded("adaround", reconstruction or self.reconstruction)

    def _rounded(self, rounding: Literal["gptq", "adaround"], reconstruction: Reconstruction | None) -> "Recipe":
        """The inner weights rounded in this way, and those of overrides that differ from them in their input alone."""
        weight = self.inner.weight.replace(rounding=rounding)
        overrides = tuple(
            one.replace(spec=one.spec.replace(weight=weight)) if one.spec.weight == self.inner.weight else one
            for one in self.overrides
        )
        inner, name = self.inner.replace(weight=weight), f"{self.name}+{rounding}"
        return self.replace(name=name, inner=inner, overrides=overrides, reconstruction=reconstruction)

    @property
    def by_block(self) -> bool:
        """Whether blocks are rounded as a whole."""
        return self.reconstruction is not None and self.reconstruction.unit == "block"

    def smoothed(self, strength: float) -> "Recipe":
        """This recipe with SmoothQuant scaling of the inputs; needs calibration."""
        return self.replace(name=f"{self.name}+smooth{strength:g}", smooth=strength)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """For people to read and edit; `get_recipe` takes the file back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)
