"""Which layers suffer at how many bits, and when in the trajectory.

Layers are quantized one at a time, everything else in float, and the predicted noise is compared at the float model's own states.
What is best done about it within a budget, `budget.py` says.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import read_json, write_file
from halfbyte.conversion import edges_of, make_fake_quant, quantizable_layers
from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.evaluate import States, float_states, predict
from halfbyte.layers import matrix_shape
from halfbyte.presets import get_recipe
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.targets import family_of

W4A4, W4A8 = get_recipe("halfbyte-w4a4"), get_recipe("halfbyte-w4a8")
LADDER: dict[str, LayerSpec] = {  # u: inputs unsigned, with a zero point, as they are best behind a SiLU or GELU
    "w4a4": W4A4.inner,
    "w4a4u": LayerSpec(W4A4.inner.weight, W4A4.after_silu),
    "w4a8": W4A8.inner,
    "w4a8u": LayerSpec(W4A8.inner.weight, W4A8.after_silu),
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
    channels: int  # of its output: each has a scale
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
            made = cls(str(data["model"]), list(data["timesteps"]), ladder, found["layers"], found["families"])
            made._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HalfbyteError(f"{path} is no result of 'halfbyte sensitivity' ({type(error).__name__}: {error})") from error
        return made

    def _check(self) -> None:
        """Raises ValueError when something is missing or of another type than it is declared."""
        if not (self.timesteps and self.ladder and self.layers and self.families):
            raise ValueError("it needs timesteps, widths, layers and families")
        if not all(map(_is_number, self.timesteps)):
            raise ValueError("its timesteps must be numbers")
        for one in (*self.layers, *self.families):
            if not all(isinstance(text, str) for text in (one.name, one.family)):
                raise ValueError(f"{one.name!r} is no name of a layer or {one.family!r} none of a family")
            if not all(type(count) is int for count in (one.weights, one.channels, one.operations)):
                raise ValueError(f"{one.name} needs whole numbers of weights, channels and operations")
            for width in self.ladder:
                values = one.damage[width]
                if len(values) != len(self.timesteps) or not all(_is_number(value) and not value < 0 for value in values):
                    raise ValueError(f"{one.name} needs a damage, a number from 0 on, for every timestep at {width}")


@torch.inference_mode()
def measure(
    pipe: Any,
    ladder: Mapping[str, LayerSpec] = LADDER,
    images: int = 8,
    steps: int = 10,
    seed: int = 0,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Sensitivity:
    """Quantize every layer, then every family of layers, alone, at every width.

    Args:
        pipe: a float diffusers pipeline.
        ladder: specs by the name of their width; their activation scales must be dynamic.
        images, steps, seed: of the trajectories whose states the predictions are compared at.
        arguments: further ones of the pipeline's call, such as guidance_scale.
    Raises:
        ModelError: when a spec needs calibration.
    """
    for width, spec in ladder.items():
        if spec.needs_calibration:
            raise ModelError(f"{width}, {spec.describe()}, needs calibration; give a spec with dynamic scales")
    denoiser = find_denoiser(pipe)
    layers, states = quantizable_layers(denoiser), float_states(pipe, images, steps, seed, steps, prompts, arguments)
    operations, families = _operations(denoiser, layers, states), _families(denoiser, layers)
    groups = [(name, next(family for family, names in families.items() if name in names), [name]) for name in layers]
    groups += [(family, family, names) for family, names in families.items()]
    found: list[LayerDamage] = []
    for title, family, names in groups:
        chosen, damage = {name: layers[name] for name in names}, {}
        for width, spec in ladder.items():
            damage[width] = damage_of(denoiser, states, chosen, spec)
            if progress:
                progress("quantizing layers one by one", len(found) * len(ladder) + len(damage), len(groups) * len(ladder))
        found.append(LayerDamage(title, family, *_sizes(chosen.values()), sum(operations[name] for name in names), damage))
    return Sensitivity(type(denoiser).__name__, states.timesteps, dict(ladder), found[: len(layers)], found[len(layers) :])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(layers: Iterable[Any]) -> tuple[int, int]:
    """(weights, output channels) of some layers together."""
    shapes = [matrix_shape(layer) for layer in layers]
    return sum(rows * count for rows, count in shapes), sum(rows for rows, _ in shapes)


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


def damage_of(denoiser: nn.Module, states: States, layers: Mapping[str, Any], spec: LayerSpec) -> list[float]:
    """What quantizing some layers, and no others, does to the prediction: energy of the error over its own, by state.

    Args:
        layers: of the denoiser, by name. spec: with dynamic activation scales.
    """
    with replaced(denoiser, {layer: make_fake_quant(name, layer, spec) for name, layer in layers.items()}):
        return [_relative(predict(denoiser, call), exact) for call, exact in zip(states.calls, states.outputs, strict=True)]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).double().square().sum() / exact.double().square().sum().clamp(min=1e-30))
