"""Recipes applied to models: float layers to trainable ones (`simulate`), trainable ones to packed ones (`pack`)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import InputStatistics
from halfbyte.errors import CalibrationError, ModelError, PackedError
from halfbyte.layers import (
    FAKE_QUANT,
    TRANSPOSED,
    Decision,
    FakeQuant,
    GridChoice,
    LayerReport,
    check_finite,
    follow_timesteps,
    matrix_to_weight,
    module_kind,
    swap,
    unsupported,
    weight_to_matrix,
)
from halfbyte.methods.gptq import gptq
from halfbyte.methods.low_rank import low_rank_branch
from halfbyte.methods.msfp import fixed_scale, search_layer
from halfbyte.methods.smooth import scale_inputs, search_strength, smooth_factors, weight_absmax
from halfbyte.metrics import sqnr
from halfbyte.quantizers import FixedScale, weight_scale
from halfbyte.recipe import LayerOverride, LayerSpec, Recipe
from halfbyte.runtime.backends import backend
from halfbyte.runtime.layers import Packed, pack_layer
from halfbyte.targets import TARGETS, Target, matches

Progress = Callable[[int, int], None]  # (done, total)


@dataclass
class Result:
    """What `quantize` did."""

    model: nn.Module
    recipe: Recipe
    layers: list[LayerReport]
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict, repr=False)

    def table(self) -> str:
        """The layers as text, one line each."""
        rows = [("layer", "kind", "shape", "became", "bits", "SQNR dB", "why")]
        for layer in self.layers:
            became = layer.spec.describe() if layer.spec else "float"
            quality = "" if layer.weight_sqnr is None else f"{layer.weight_sqnr:.1f}"
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, layer.kind, shape, became, f"{layer.bits:.2f}", quality, layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def quantizable_layers(model: nn.Module) -> dict[str, Any]:
    """Linear and convolution layers that can be swapped, by name, in the order the model defines them."""
    found = {}
    for name, layer in model.named_modules():
        if name and module_kind(layer) is not None and not unsupported(layer, model.get_submodule(name.rpartition(".")[0])):
            found[name] = layer
    return found


def edges_of(model: nn.Module) -> tuple[Target, str]:
    """Edge patterns of a model, and where they come from: the table of architectures, else the order of definition."""
    kind = type(model).__name__
    if kind in TARGETS:
        return TARGETS[kind], f"the table of architectures ({kind})"
    names = list(quantizable_layers(model))
    ends = dict.fromkeys([names[0], names[-1]]) if names else {}
    return Target(edges=tuple(f"^{re.escape(name)}$" for name in ends)), "first and last in the order of definition"


def override_of(recipe: Recipe, target: Target, name: str) -> LayerOverride | None:
    """The recipe's own spec for a layer; those for groups of layers leave the edges alone."""
    edge = target.is_edge(name)
    found = (one for one in recipe.overrides if matches(one.pattern, name) and not (edge and one.pattern.startswith("@")))
    return next(found, None)


def decide_by(model: nn.Module, recipe: Recipe) -> Callable[[str, nn.Module], Decision]:
    """The rule of a recipe for a model: (name, layer) -> (spec or None, reason)."""
    target, source = edges_of(model)

    def choose(name: str) -> Decision:
        matched = next((pattern for pattern in recipe.keep if matches(pattern, name)), None)
        if matched is not None:
            return None, f"the recipe keeps {matched!r}"
        own = override_of(recipe, target, name)
        if own is not None:
            return own.spec, f"the recipe has a spec for {own.pattern!r}"
        if target.is_edge(name):
            if recipe.edge is None:
                return None, f"edge layer, kept by the recipe; known from {source}"
            return recipe.edge, f"edge layer; known from {source}"
        if recipe.after_silu is not None and target.is_after_silu(name):
            return recipe.inner.replace(activation=recipe.after_silu), "its input is a SiLU or GELU output"
        return recipe.inner, "recipe"

    def decide(name: str, layer: nn.Module) -> Decision:
        spec, reason = choose(name)
        if spec is None or spec.weight.rounding != "gptq" or not isinstance(layer, TRANSPOSED):
            return spec, reason
        nearest = spec.replace(weight=spec.weight.replace(rounding="nearest"))
        return nearest, f"{reason}; rounded to nearest, as GPTQ has no Hessian of a transposed convolution"

    return decide


def specs_of(model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """The layers of a float model that a recipe quantizes, and how; layers it keeps in float are left out."""
    decide = decide_by(model, recipe)
    chosen = {name: decide(name, layer)[0] for name, layer in quantizable_layers(model).items()}
    return {name: spec for name, spec in chosen.items() if spec is not None}


def simulate(
    model: nn.Module,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replace the layers of a model by trainable ones that round as the recipe says, in place.

    Weights are checked before anything is changed: a NaN leaves the model as it was.

    Args:
        statistics: of the inputs of the layers; needed by recipes with smoothing, GPTQ, a grid search or calibrated scales.
    Raises:
        NonFiniteError: when a weight holds a NaN or an infinity; names it.
        CalibrationError: when the recipe needs statistics of a layer and they are not given.
        ModelError: when the model holds no layer to quantize, or is quantized already.
    """
    if any(isinstance(module, (Packed, FakeQuant)) for module in model.modules()):
        raise ModelError(f"this {type(model).__name__} is quantized already; start from the float model")
    layers = quantizable_layers(model)
    known = statistics or {}
    specs = specs_of(model, recipe)
    _check_statistics(specs, recipe, known)
    timesteps = _timesteps(known) if any(spec.over_time for spec in specs.values()) else []
    for name, layer in layers.items():
        check_finite(f"{name}.weight", layer.weight)
        if layer.bias is not None:
            check_finite(f"{name}.bias", layer.bias)
    quality: dict[str, float] = {}
    searched: dict[str, GridChoice] = {}
    choose, target = decide_by(model, recipe), edges_of(model)[0]

    def decide(name: str, layer: nn.Module) -> Decision:
        spec, reason = choose(name, layer)
        own = override_of(recipe, target, name)
        if spec is None or recipe.search is None or own is not None or target.is_edge(name):
            return spec, reason
        spec, searched[name] = search_layer(spec, float_matrix(layer), known[name], recipe.search)
        return spec, f"{reason}; {searched[name].one_sided}" if searched[name].one_sided else reason

    def convert(name: str, layer: Any, spec: LayerSpec) -> nn.Module:
        made = make_fake_quant(name, layer, spec, recipe.smooth, known.get(name), searched.get(name))
        quality[name] = sqnr(float_matrix(layer), made.quantized_weight().dequantize())
        if progress:
            progress(len(quality), len(layers))
        return made  # type: ignore[no-any-return]

    reports = swap(model, decide, convert)
    for report in reports:
        report.weight_sqnr, report.choice = quality.get(report.name), searched.get(report.name)
    if timesteps:
        follow_timesteps(model, timesteps)
    return Result(model, recipe, reports, known)


def float_matrix(layer: Any) -> Tensor:
    """The weights of a float layer as float32 (O, K)."""
    return weight_to_matrix(layer, layer.weight.detach().float())


def _timesteps(statistics: Mapping[str, InputStatistics]) -> list[float]:
    """The calibrated timesteps, ascending; every layer has seen the same ones."""
    seen = {tuple(sorted(t for t in one.ranges if t is not None)) for one in statistics.values()}
    if len(seen) != 1 or not all(seen):
        raise CalibrationError("the layers were calibrated at different timesteps, or at none; scales over time need the same ones")
    return list(seen.pop())


def _check_statistics(specs: Mapping[str, LayerSpec], recipe: Recipe, statistics: Mapping[str, InputStatistics]) -> None:
    for name, spec in specs.items():
        found, compensate = statistics.get(name), spec.weight.rounding == "gptq"
        if (recipe.smooth is not None or compensate) and (found is None or found.channel_absmax is None):
            raise CalibrationError(
                f"recipe {recipe.name!r} smooths or compensates {name!r} and needs statistics; pass calibration="
            )
        calibrated = spec.activation is not None and spec.activation.scale != "dynamic"
        if calibrated and (found is None or not found.count):
            raise CalibrationError(
                f"recipe {recipe.name!r} calibrates the input of {name!r} and needs statistics; pass calibration="
            )
        if recipe.smooth == "search" and found is not None and found.rows is None:
            raise CalibrationError(f"recipe {recipe.name!r} searches how far to smooth {name!r}; its statistics need `rows`")
        if compensate and found is not None and found.hessian is None:
            raise CalibrationError(f"recipe {recipe.name!r} compensates {name!r}, whose statistics hold no Hessian; collect it too")


@torch.no_grad()
def make_fake_quant(
    name: str,
    layer: Any,
    spec: LayerSpec,
    smooth: float | str | None = None,
    statistics: InputStatistics | None = None,
    choice: GridChoice | None = None,
) -> Any:
    """The trainable twin of one float layer: smoothed and compensated where asked, with the scales of its spec or of a search.

    Smoothing and the low-rank branch are taken from the weight of `layer`, on a copy of its own: others may share the weight.
    """
    input_scale = hessian = None
    if smooth is not None and statistics is not None and statistics.channel_absmax is not None:
        found = partial(smooth_factors, statistics.channel_absmax, weight_absmax([layer]))
        if smooth == "search":
            factors = found(search_strength(float_matrix(layer), found, statistics.rows, spec))  # type: ignore[arg-type]
        else:
            factors = found(float(smooth))
        layer.weight = nn.Parameter(layer.weight.clone(), layer.weight.requires_grad)
        input_scale = scale_inputs(layer, factors)
    if spec.weight.rounding == "gptq" and statistics is not None and statistics.hessian is not None:
        hessian = statistics.hessian.double()
        if input_scale is not None:
            groups, count = hessian.shape[:2]
            seen = input_scale.double().view(groups, -1)
            seen = seen.repeat(1, count // seen.shape[1])  # K runs over taps, and over the group's channels in each
            hessian = hessian * seen[:, None, :] * seen[:, :, None]
    kind, branch = FAKE_QUANT[module_kind(layer)], None  # type: ignore[index]
    if spec.low_rank:
        matrix = float_matrix(layer)
        branch = low_rank_branch(matrix, spec.low_rank)
        layer.weight = nn.Parameter(matrix_to_weight(layer, matrix - branch).to(layer.weight.dtype), layer.weight.requires_grad)
    made = kind.from_float(layer, spec) if hessian is None else _compensated(kind, layer, spec, hessian, name)
    made.input_scale, made.low_rank = input_scale, branch
    if choice is not None and spec.activation is not None and spec.activation.scale == "static":
        made.fix_scale(FixedScale(torch.tensor([choice.input_scale]), torch.tensor([choice.input_zero])))
    elif spec.activation is not None and spec.activation.scale != "dynamic" and statistics is not None:
        made.fix_scale(fixed_scale(spec.activation, statistics))
    return made


def _compensated(kind: type[FakeQuant], layer: Any, spec: LayerSpec, hessian: Tensor, name: str) -> Any:
    """A trainable layer whose weights are GPTQ's, under scales found before; hessian: float64 (groups, K, K)."""
    matrix = weight_to_matrix(layer, layer.weight.float())
    scale = weight_scale(matrix, spec.weight)
    groups = zip(matrix.chunk(len(hessian)), hessian, scale.chunk(len(hessian)), strict=True)
    parts = [gptq(part, own, spec.weight, scaling, order="activation", name=name) for part, own, scaling in groups]
    made = kind.from_float(layer, spec, scale)
    made.weight = nn.Parameter(matrix_to_weight(layer, torch.cat(parts)).to(layer.weight.dtype), layer.weight.requires_grad)
    return made


def pack(model: nn.Module) -> nn.Module:
    """Turn the trainable layers of a model into packed 4-bit ones, in place; returns the model.

    Raises:
        PackedError: when a layer's spec exists for simulation only, or there is nothing to pack. Nothing is changed then.
    """
    found = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, FakeQuant)]
    if not found:
        raise PackedError(f"this {type(model).__name__} has no trainable quantized layers; quantize it with simulate=True first")
    for name, layer in found:
        hindrance = layer.spec.simulated_only()
        if hindrance:
            raise PackedError(f"{name} cannot be packed: {hindrance}; recipes with group scales are for comparison only")
    packed: dict[int, nn.Module] = {}
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        if id(layer) not in packed:
            packed[id(layer)] = pack_layer(layer)
        setattr(model.get_submodule(parent), child, packed[id(layer)])
    return model


def note_backends(result: Result) -> None:
    """Say in the layer table which packed layers the C++ engine leaves to the reference backend, and why."""
    if backend().name != "cpu":
        return
    packed = packed_layers(result.model)
    for report in result.layers:
        plan = getattr(packed.get(report.name), "plan", None)
        if isinstance(plan, str):
            report.reason += f"; runs in the reference backend: {plan}"


def packed_layers(model: nn.Module) -> dict[str, Packed]:
    """The packed layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Packed)}


def stored_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the quantized layers' codes, scales and shifts on disk, and of the same weights in bf16 (biases in neither)."""
    stored = plain = 0
    for layer in packed_layers(model).values():
        shapes = layer.stored_shapes()
        stored += sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        plain += 2 * layer.weight.numel()
    return stored, plain


def memory_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes the quantized layers hold in memory now, in a backend's order where it has re-ordered them, and of bf16 weights."""
    layers = packed_layers(model).values()
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    return held, sum(2 * layer.weight.numel() for layer in layers)
