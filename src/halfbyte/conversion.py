"""Recipes applied to models: float layers to trainable ones (`simulate`), trainable ones to packed ones (`pack`)."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import Call, InputStatistics, evaluating, run_call
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
    matrix_shape,
    matrix_to_weight,
    module_kind,
    swap,
    unsupported,
    weight_to_matrix,
)
from halfbyte.methods.adaround import AdaRounding
from halfbyte.methods.attention import quantized_attention
from halfbyte.methods.blocks import find_blocks, reconstruct_blocks
from halfbyte.methods.gptq import gptq
from halfbyte.methods.low_rank import low_rank_branch
from halfbyte.methods.modiff import follow_differences
from halfbyte.methods.msfp import fixed_scale, search_layer
from halfbyte.methods.smooth import scale_inputs, search_strength, smooth_factors, weight_absmax
from halfbyte.metrics import sqnr
from halfbyte.quantizers import FixedScale
from halfbyte.recipe import INTEGERS, LayerOverride, LayerSpec, Recipe, Reconstruction
from halfbyte.runtime.backends import backend
from halfbyte.runtime.between import take_over
from halfbyte.runtime.intercept import attention_modules, integer_attention, replace_attention
from halfbyte.runtime.layers import Packed
from halfbyte.runtime.weights import pack_layer, weight_quality, weight_scale
from halfbyte.splitting import owner_of, split_layers
from halfbyte.targets import TARGETS, Target, matches
from halfbyte.tracing import find_concatenations

SIMULATED_ATTRIBUTE = "_halfbyte_simulated"  # on models with options that have no packed form: why, in words
Progress = Callable[[int, int], None]  # (done, total)


@dataclass
class Result:
    """What `quantize` did."""

    model: nn.Module
    recipe: Recipe
    layers: list[LayerReport]
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)  # what else was done to the model, in words

    def table(self) -> str:
        """The layers as text, one line each."""
        rows = [("layer", "kind", "shape", "became", "bits", "SQNR dB", "why")]
        for layer in self.layers:
            became = layer.spec.describe() if layer.spec else "float"
            quality = "" if layer.weight_sqnr is None else f"{layer.weight_sqnr:.1f}"
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, layer.kind, shape, became, f"{layer.bits:.2f}", quality, layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self.notes)


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
    names = [owner_of(model, name) for name in quantizable_layers(model)]
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
        owner = owner_of(model, name)
        spec, reason = choose(owner)
        if owner != name:
            reason += f"; reads part {int(name.rpartition('.')[2]) + 1} of the concatenation that {owner} reads"
        if spec is None or not isinstance(layer, TRANSPOSED):
            return spec, reason
        if spec.weight.rounding != "nearest":
            spec = spec.replace(weight=spec.weight.replace(rounding="nearest"))
            reason += "; rounded to nearest, as there is no Hessian of a transposed convolution"
        if recipe.smooth == "search":
            reason += "; not smoothed, as the output of a transposed convolution cannot be sampled row by row"
        if recipe.search is not None and recipe.search.objective == "output":
            reason += "; chosen by the error of its input, as the output of a transposed convolution cannot be sampled row by row"
        return spec, reason

    return decide


def specs_of(model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """The layers of a float model that a recipe quantizes, and how; layers it keeps in float are left out."""
    decide = decide_by(model, recipe)
    chosen = {name: decide(name, layer)[0] for name, layer in quantizable_layers(model).items()}
    return {name: spec for name, spec in chosen.items() if spec is not None}


def split_concatenations(model: nn.Module, recipe: Recipe, call: Call) -> None:
    """Put a `Split` in place of every convolution that a recipe quantizes and that reads a concatenation, in place."""
    layers, wanted = quantizable_layers(model), specs_of(model, recipe)
    names = [name for name in wanted if isinstance(layers[name], (nn.Conv1d, nn.Conv2d)) and layers[name].groups == 1]
    with evaluating(model), torch.no_grad():
        run = partial(run_call, model, call)
        found = find_concatenations(model, names, run, lambda layer: -1 - len(layer.kernel_size))  # type: ignore[arg-type]
    split_layers(model, found)


def hessian_layers(model: nn.Module, recipe: Recipe) -> list[str]:
    """The layers whose Hessian a recipe needs: those rounded by GPTQ or AdaRound."""
    return [name for name, spec in specs_of(model, recipe).items() if spec.weight.rounding != "nearest"]


def sampled_layers(model: nn.Module, recipe: Recipe) -> list[str]:
    """The layers whose contraction rows a recipe needs, to judge by the error of their outputs."""
    layers = quantizable_layers(model)
    return [name for name in specs_of(model, recipe) if not isinstance(layers[name], TRANSPOSED)] if recipe.by_output else []


def simulate(
    model: nn.Module,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics] | None = None,
    progress: Progress | None = None,
    calls: Sequence[Call] = (),
    seed: int = 0,
) -> Result:
    """Replace the layers of a model by trainable ones that round as the recipe says, in place.

    Weights are checked before anything is changed: a NaN leaves the model as it was.

    Args:
        statistics: of the inputs of the layers; needed by recipes with smoothing, GPTQ, AdaRound, a grid search or calibrated
            scales.
        calls: of the model, for recipes that reconstruct blocks. seed: of the order in which they take them.
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
    _check_statistics(model, specs, recipe, known)
    timesteps = _timesteps(known) if any(spec.over_time for spec in specs.values()) else []
    for name, layer in layers.items():
        check_finite(f"{name}.weight", layer.weight)
        if layer.bias is not None:
            check_finite(f"{name}.bias", layer.bias)
    quality: dict[str, float] = {}
    searched: dict[str, GridChoice] = {}
    choose, target = decide_by(model, recipe), edges_of(model)[0]
    teacher = copy.deepcopy(model) if recipe.by_block else None
    settings = recipe.reconstruction or Reconstruction()
    rounding = AdaRounding(settings, _rounding_work(model, recipe), exact={} if recipe.by_block else None)

    def decide(name: str, layer: nn.Module) -> Decision:
        spec, reason = choose(name, layer)
        owner = owner_of(model, name)
        own = override_of(recipe, target, owner)
        if spec is None or recipe.search is None or own is not None or target.is_edge(owner):
            return spec, reason
        spec, searched[name] = search_layer(spec, matrix := float_matrix(layer), known[name].on(matrix.device), recipe.search)
        return spec, f"{reason}; {searched[name].one_sided}" if searched[name].one_sided else reason

    def convert(name: str, layer: Any, spec: LayerSpec) -> nn.Module:
        made = make_fake_quant(name, layer, spec, recipe.smooth, known.get(name), searched.get(name), rounding)
        quality[name] = weight_quality(layer, made)
        if progress:
            progress(len(quality), len(layers))
        return made  # type: ignore[no-any-return]

    reports = swap(model, decide, convert)
    if timesteps:
        follow_timesteps(model, timesteps)
    if teacher is not None:
        _round_blocks(model, teacher, calls, rounding, seed, progress, quality)
    for report in reports:
        report.weight_sqnr, report.choice = quality.get(report.name), searched.get(report.name)
        report.reason += f"; {rounding.notes[report.name]}" if report.name in rounding.notes else ""
    return Result(model, recipe, reports, known, switch_on_options(model, recipe))


def switch_on_options(model: nn.Module, recipe: Recipe) -> list[str]:
    """Switch on what a recipe asks for beyond its layers; what was done, in words."""
    notes = []
    if recipe.attention is not None:
        names = [name for name in attention_modules(model) if not any(re.search(pattern, name) for pattern in recipe.keep)]
        integers = recipe.attention == INTEGERS
        replace_attention(model, names, integer_attention if integers else partial(quantized_attention, spec=recipe.attention))
        how = "in integers" if integers else f"simulated: {recipe.attention.describe()}"
        notes += [f"{name}  attention products, {how}" for name in names]
    if recipe.temporal:
        follow_differences(model)
        notes.append("all quantized inputs  simulated: what they changed by since the last timestep is quantized (MoDiff)")
    if notes and recipe.simulated_only():
        setattr(model, SIMULATED_ATTRIBUTE, recipe.simulated_only())
    return notes


def _rounding_work(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Multiplications that one step of AdaRound takes, for each layer that is rounded alone."""
    specs, layers = specs_of(model, recipe), quantizable_layers(model)
    shapes = {name: matrix_shape(layers[name]) for name in hessian_layers(model, recipe)}
    return {name: rows * count**2 for name, (rows, count) in shapes.items() if specs[name].weight.rounding == "adaround"}


def _round_blocks(
    model: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Call],
    rounding: AdaRounding,
    seed: int,
    progress: Progress | None,
    quality: dict[str, float],
) -> None:
    """AdaRound of the blocks of a model, after that of its layers; notes and the SQNR of weights follow."""
    exact = rounding.exact or {}
    found = reconstruct_blocks(model, teacher, find_blocks(model), calls, exact, rounding.settings, seed, progress)
    for name, weights in exact.items():
        block = next((block for block in found if name.startswith(f"{block}.")), None)
        if block is not None:
            rounding.notes[name] += f", {found[block]}"
            quality[name] = sqnr(weights, model.get_submodule(name).quantized_weight().dequantize())  # type: ignore[operator]


def float_matrix(layer: Any) -> Tensor:
    """The weights of a float layer as float32 (O, K)."""
    return weight_to_matrix(layer, layer.weight.detach().float())


def _timesteps(statistics: Mapping[str, InputStatistics]) -> list[float]:
    """The calibrated timesteps, ascending; every layer has seen the same ones."""
    seen = {tuple(sorted(t for t in one.ranges if t is not None)) for one in statistics.values()}
    if len(seen) != 1 or not all(seen):
        raise CalibrationError("the layers were calibrated at different timesteps, or at none; scales over time need the same ones")
    return list(seen.pop())


def _check_statistics(
    model: nn.Module, specs: Mapping[str, LayerSpec], recipe: Recipe, statistics: Mapping[str, InputStatistics]
) -> None:
    sampled, hessians = sampled_layers(model, recipe), hessian_layers(model, recipe)
    for name, spec in specs.items():
        found, compensate = statistics.get(name), name in hessians
        if (recipe.smooth is not None or compensate) and (found is None or found.channel_absmax is None):
            raise CalibrationError(
                f"recipe {recipe.name!r} smooths or compensates {name!r} and needs statistics; pass calibration="
            )
        calibrated = spec.activation is not None and spec.activation.scale != "dynamic"
        if calibrated and (found is None or not found.count):
            raise CalibrationError(
                f"recipe {recipe.name!r} calibrates the input of {name!r} and needs statistics; pass calibration="
            )
        if recipe.by_output and name in sampled and (found is None or found.rows is None):
            raise CalibrationError(f"recipe {recipe.name!r} judges {name!r} by the error of its output; its statistics need `rows`")
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
    rounding: AdaRounding | None = None,
) -> Any:
    """The trainable twin of one float layer: smoothed and compensated where asked, with the scales of its spec or of a search.

    Smoothing and the low-rank branch are taken from the weight of `layer`, on a copy of its own: others may share the weight.
    """
    input_scale = hessian = None
    statistics = None if statistics is None else statistics.on(layer.weight.device)
    if smooth == "search" and isinstance(layer, TRANSPOSED):
        smooth = None
    if smooth is not None and statistics is not None and statistics.channel_absmax is not None:
        found = partial(smooth_factors, statistics.channel_absmax, weight_absmax([layer]))
        if smooth == "search":
            factors = found(search_strength(float_matrix(layer), found, statistics.rows, spec))  # type: ignore[arg-type]
        else:
            factors = found(float(smooth))
        layer.weight = nn.Parameter(layer.weight.clone(), layer.weight.requires_grad)
        input_scale = scale_inputs(layer, factors)
    if spec.weight.rounding != "nearest" and statistics is not None and statistics.hessian is not None:
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
    scale = weight_scale(weight_to_matrix(layer, layer.weight.detach()), spec.weight)
    if hessian is None:
        made = kind.from_float(layer, spec, scale)
    else:
        made = _compensated(kind, layer, spec, scale, hessian, name, rounding)
    made.input_scale, made.low_rank = input_scale, branch
    if choice is not None and spec.activation is not None and spec.activation.scale == "static":
        made.fix_scale(FixedScale(torch.tensor([choice.input_scale]), torch.tensor([choice.input_zero])))
    elif spec.activation is not None and spec.activation.scale != "dynamic" and statistics is not None:
        made.fix_scale(fixed_scale(spec.activation, statistics))
    return made


def _compensated(
    kind: type[FakeQuant], layer: Any, spec: LayerSpec, scale: Tensor, hessian: Tensor, name: str, rounding: AdaRounding | None
) -> Any:
    """A trainable layer whose weights are GPTQ's or AdaRound's, under scales found before; hessian: float64 (groups, K, K)."""
    matrix = weight_to_matrix(layer, layer.weight.float())
    if spec.weight.rounding == "adaround":
        rounding = rounding or AdaRounding(Reconstruction(), {name: 1})
        rounded = rounding.round(matrix, hessian, spec.weight, scale, name)
    else:
        groups = zip(matrix.chunk(len(hessian)), hessian, scale.chunk(len(hessian)), strict=True)
        parts = [gptq(part, own, spec.weight, scaling, order="activation", name=name) for part, own, scaling in groups]
        rounded = torch.cat(parts)
    made = kind.from_float(layer, spec, scale)
    made.weight = nn.Parameter(matrix_to_weight(layer, rounded).to(layer.weight.dtype), layer.weight.requires_grad)
    return made


def pack(model: nn.Module) -> nn.Module:
    """Turn the trainable layers of a model into packed 4-bit ones, in place; returns the model.

    Raises:
        PackedError: when a layer's spec exists for simulation only, or there is nothing to pack. Nothing is changed then.
    """
    found = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, FakeQuant)]
    if not found:
        raise PackedError(f"this {type(model).__name__} has no trainable quantized layers; quantize it with simulate=True first")
    simulated = getattr(model, SIMULATED_ATTRIBUTE, None)
    if simulated:
        raise PackedError(f"this {type(model).__name__} cannot be packed: {simulated}; quantize it without")
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
    take_over(model)
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
    """Bytes of the quantized layers' codes, scales and multipliers on disk, and of the same weights in bf16 (biases in neither)."""
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
