"""Which layers suffer at how many bits, when in the trajectory, and how a budget of bits is best spent on them.

Layers are quantized one at a time, everything else in float, and the predicted noise is compared at the float model's own states.
Damages of layers add up well while they are small, which turns "least damage within a budget" into a small integer program.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import read_json, write_file
from halfbyte.conversion import edges_of, make_fake_quant, quantizable_layers
from halfbyte.errors import HalfbyteError, MissingExtraError, ModelError
from halfbyte.evaluate import States, float_states, predict
from halfbyte.formats import get_grid
from halfbyte.layers import matrix_shape
from halfbyte.recipe import INT8, ActivationSpec, LayerOverride, LayerSpec, Recipe, WeightSpec, get_recipe
from halfbyte.targets import family_of

LADDER: dict[str, LayerSpec] = {
    "w4a4": get_recipe("quartz-w4a4").inner,
    "w4a8": get_recipe("quartz-w4a8").inner,
    "w6a6": LayerSpec(WeightSpec("e2m3"), ActivationSpec("e2m3")),  # simulated
    "w8a8": INT8,
}
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)


@dataclass
class LayerDamage:
    """What quantizing one layer, or one family of layers, alone does to the predicted noise."""

    name: str
    family: str
    weights: int
    operations: int  # multiplications for one image and step
    damage: dict[str, list[float]]  # width -> mean squared error of the prediction over its mean square, by timestep

    def total(self, width: str) -> float:
        """Damage at a width, averaged over the timesteps."""
        return sum(self.damage[width]) / len(self.damage[width])


@dataclass
class Sensitivity:
    """The damage of every layer and family, alone, at every width of the ladder."""

    model: str
    timesteps: list[float]
    ladder: dict[str, LayerSpec]
    layers: list[LayerDamage]
    families: list[LayerDamage]

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        ladder = {width: spec.to_dict() for width, spec in self.ladder.items()}
        write_file(path, json.dumps({**asdict(self), "ladder": ladder}, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """What `save` wrote.

        Raises:
            CheckpointError: when it cannot be read. HalfbyteError: when it is something else.
        """
        data = read_json(Path(path))
        try:
            found = {kind: [LayerDamage(**row) for row in data[kind]] for kind in ("layers", "families")}
            ladder = {str(width): LayerSpec.from_dict(spec) for width, spec in data["ladder"].items()}
            return cls(str(data["model"]), list(data["timesteps"]), ladder, found["layers"], found["families"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HalfbyteError(f"{path} is no result of 'halfbyte sensitivity' ({type(error).__name__}: {error})") from error


@torch.inference_mode()
def measure(
    pipe: Any,
    ladder: Mapping[str, LayerSpec] = LADDER,
    images: int = 8,
    steps: int = 10,
    seed: int = 0,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize every layer, then every family of layers, alone, at every width.

    Args:
        pipe: a float diffusers pipeline.
        ladder: specs by the name of their width; their activation scales must be dynamic.
        images, steps, seed: of the trajectories whose states the predictions are compared at.
    Raises:
        ModelError: when a spec needs calibration.
    """
    for width, spec in ladder.items():
        if spec.needs_calibration:
            raise ModelError(f"{width}, {spec.describe()}, needs calibration; give a spec with dynamic scales")
    denoiser = find_denoiser(pipe)
    layers, states = quantizable_layers(denoiser), float_states(pipe, images, steps, seed, steps, prompts)
    operations, families = _operations(denoiser, layers, states), _families(denoiser, layers)
    groups = [(name, next(family for family, names in families.items() if name in names), [name]) for name in layers]
    groups += [(family, family, names) for family, names in families.items()]
    found: list[LayerDamage] = []
    for title, family, names in groups:
        weights, damage = sum(layers[name].weight.numel() for name in names), {}
        for width, spec in ladder.items():
            with replaced(denoiser, {layers[name]: make_fake_quant(name, layers[name], spec) for name in names}):
                damage[width] = _damage(denoiser, states)
            if progress:
                progress("quantizing layers one by one", len(found) * len(ladder) + len(damage), len(groups) * len(ladder))
        found.append(LayerDamage(title, family, weights, sum(operations[name] for name in names), damage))
    return Sensitivity(type(denoiser).__name__, states.timesteps, dict(ladder), found[: len(layers)], found[len(layers) :])


def _families(denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    target, families = edges_of(denoiser)[0], dict[str, list[str]]()
    for name, layer in layers.items():
        families.setdefault("edge" if target.is_edge(name) else family_of(name, layer), []).append(name)
    return families


def _operations(denoiser: nn.Module, layers: Mapping[str, Any], states: States) -> dict[str, int]:
    """Multiplications of every layer for one image and step: its weights times the positions they are applied at."""
    found = dict.fromkeys(layers, 0)

    def watch(name: str) -> Callable[..., None]:
        def look(layer: Any, _: Any, output: Tensor) -> None:
            channels = matrix_shape(layer)[0]
            found[name] += layer.weight.numel() * (output.numel() // channels) // len(states.outputs[0])

        return look

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        predict(denoiser, states.calls[0])
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def replaced(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Other layers in the places of some, wherever the model holds them, and back."""
    places = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if layer in twins]

    def put(name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)

    try:
        for name, layer in places:
            put(name, twins[layer])
        yield
    finally:
        for name, layer in places:
            put(name, layer)


def _damage(denoiser: nn.Module, states: States) -> list[float]:
    """Energy of the error over that of the prediction, by state."""
    return [_relative(predict(denoiser, call), exact) for call, exact in zip(states.calls, states.outputs, strict=True)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).double().square().sum() / exact.double().square().sum().clamp(min=1e-30))


def stored_bits(spec: LayerSpec) -> float:
    """Bits a weight takes on disk, shifts included; what has no packed form counts with the width of its codes."""
    return get_grid(spec.weight.grid).bits + (4 / spec.weight.subgroup if spec.weight.max_shift else 0)


def input_bits(spec: LayerSpec) -> float:
    """Bits of an input value, shifts not counted: they are made and used up inside the layer."""
    return 16.0 if spec.activation is None else get_grid(spec.activation.grid).bits


def spend(found: Sensitivity, weight_bits: float, activation_bits: float | None = None, simulated: bool = False) -> dict[str, str]:
    """The width of every layer that leaves the least sum of damages within a budget.

    Args:
        simulated: also give widths that have no packed form.
        weight_bits: stored bits a weight, averaged over all weights.
        activation_bits: bits an input value, averaged over all multiplications; None: no limit.
    Raises:
        HalfbyteError: when no assignment meets the budget; says what can be reached.
        MissingExtraError: without scipy.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise MissingExtraError("a budget needs scipy: pip install 'halfbyte[eval]'") from error
    ladder = {width: spec for width, spec in found.ladder.items() if simulated or spec.simulated_only() is None}
    specs, widths, layers = list(ladder.values()), list(ladder), found.layers
    damage = np.array([[layer.total(width) for width in widths] for layer in layers])
    limits = [LinearConstraint(np.kron(np.eye(len(layers)), np.ones(len(specs))), 1, 1)]  # one width for each layer
    for what, limit, bits, share in (
        ("stored bits a weight", weight_bits, [stored_bits(spec) for spec in specs], [layer.weights for layer in layers]),
        ("bits an activation", activation_bits, [input_bits(spec) for spec in specs], [layer.operations for layer in layers]),
    ):
        if limit is None:
            continue
        if limit < min(bits):
            raise HalfbyteError(f"no assignment has {limit:g} {what}; these widths reach {min(bits):g} to {max(bits):g}")
        limits.append(LinearConstraint(np.outer(share, bits).ravel() / sum(share), 0, limit + 1e-9))
    solved = milp(
        damage.ravel() / max(damage.max(), 1e-300),
        constraints=limits,
        integrality=np.ones(damage.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    if solved.x is None:
        raise HalfbyteError(f"no assignment meets both limits of the budget ({solved.message}); raise one of them")
    return {layer.name: widths[index] for layer, index in zip(layers, solved.x.reshape(damage.shape).argmax(1), strict=True)}


def averages(found: Sensitivity, widths: Mapping[str, str]) -> tuple[float, float]:
    """(stored bits a weight, bits an activation) of an assignment, averaged as `spend` does."""
    weights, operations = sum(layer.weights for layer in found.layers), sum(layer.operations for layer in found.layers)
    specs = [found.ladder[widths[layer.name]] for layer in found.layers]
    stored = math.fsum(layer.weights * stored_bits(spec) for layer, spec in zip(found.layers, specs, strict=True))
    seen = math.fsum(layer.operations * input_bits(spec) for layer, spec in zip(found.layers, specs, strict=True))
    return stored / weights, seen / operations


def to_recipe(found: Sensitivity, widths: Mapping[str, str], name: str) -> Recipe:
    """A recipe that gives every layer its width: the most frequent one as the rule, the others (and the edges) by name."""
    common = max(found.ladder, key=list(widths.values()).count)
    edges = {layer.name for layer in found.layers if layer.family == "edge"}
    others = [layer for layer, width in widths.items() if width != common or layer in edges]
    overrides = tuple(LayerOverride(f"^{re.escape(layer)}$", found.ladder[widths[layer]]) for layer in others)
    return Recipe(name, found.ladder[common], overrides=overrides)
