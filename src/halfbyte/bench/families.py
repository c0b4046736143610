"""Which kind of layer suffers most at 4 bits, model beside model (QuEST, arXiv 2402.03666, property 2).

One family of layers at a time is quantized, everything else stays in float, and predictions are compared at the float model's own
states. Families differ in size, so their damage is also given a layer and a million parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from halfbyte.calibration import find_denoiser
from halfbyte.conversion import edges_of, quantizable_layers
from halfbyte.evaluate import float_states
from halfbyte.presets import get_recipe
from halfbyte.recipe import INT8, ActivationSpec, LayerSpec, WeightSpec
from halfbyte.sensitivity import damage_of
from halfbyte.targets import Target, family_of, matches

INT4 = LayerSpec(WeightSpec("int4"), ActivationSpec("int4"))
WIDTHS: dict[str, LayerSpec] = {  # the first is the one that the table divides and sorts by
    "INT4": INT4,
    "INT4 weights": LayerSpec(INT4.weight),
    "INT4 inputs": LayerSpec(INT8.weight, INT4.activation),
    "quartz-w4a4": get_recipe("quartz-w4a4").inner,
}
JOINED = {  # what `targets.family_of` tells apart and this table does not
    "attention input": "attention",
    "attention output": "attention",
    "resampling": "convolution",
    "shortcut": "convolution",
    "linear": "others",
}
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)


@dataclass
class FamilyDamage:
    """What quantizing a family of layers does to the predicted noise."""

    family: str
    layers: int
    weights: int
    damage: dict[str, list[float]]  # by width and timestep: energy of the error over that of the prediction

    def total(self, width: str) -> float:
        """Damage at a width, averaged over the timesteps."""
        return sum(self.damage[width]) / len(self.damage[width])

    def normalized(self, width: str) -> dict[str, float]:
        """The same as it is, a layer, and a million parameters."""
        total = self.total(width)
        return {"together": total, "a layer": total / self.layers, "a million parameters": 1e6 * total / self.weights}


def family_in(target: Target, name: str, layer: object) -> str:
    """The family of a layer: feed-forward, attention, convolution, time embedding, skip (reads a concatenation) or others."""
    if target.is_edge(name):
        return "others"
    if matches("@skip", name):
        return "skip"
    found = family_of(name, layer)
    return JOINED.get(found, found)


@torch.inference_mode()
def measure_families(
    pipe: Any,
    widths: Mapping[str, LayerSpec] = WIDTHS,
    images: int = 8,
    steps: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[FamilyDamage]:
    """Quantize one family of a pipeline's denoiser at a time; the most damaging first.

    Args:
        widths: specs by name, with dynamic scales. images, steps, seed: of the trajectories that predictions are compared on.
    """
    denoiser = find_denoiser(pipe)
    layers, states = quantizable_layers(denoiser), float_states(pipe, images, steps, seed, steps)
    target, families = edges_of(denoiser)[0], dict[str, dict[str, Any]]()
    for name, layer in layers.items():
        families.setdefault(family_in(target, name, layer), {})[name] = layer
    found: list[FamilyDamage] = []
    for family, members in families.items():
        damage: dict[str, list[float]] = {}
        for width, spec in widths.items():
            damage[width] = damage_of(denoiser, states, members, spec)
            if progress:
                progress(f"{family} of {type(denoiser).__name__}", len(damage), len(widths))
        found.append(FamilyDamage(family, len(members), sum(layer.weight.numel() for layer in members.values()), damage))
    return sorted(found, key=lambda one: -one.total(next(iter(widths))))


def families_table(title: str, found: list[FamilyDamage]) -> Table:
    """The rows of a model: SQNR at every width, and the normalized damage at the first."""
    from halfbyte.report.heatmap import decibel

    widths, made = list(found[0].damage), Table(title=title)
    for heading in ("family", "layers", "weights", *(f"{width} dB" for width in widths), "damage", "a layer", "a million"):
        made.add_column(heading, justify="left" if heading == "family" else "right")
    for one in found:
        quality = (f"{decibel(one.total(width)):.1f}" for width in widths)
        shares = (f"{value:.2e}" for value in one.normalized(widths[0]).values())
        made.add_row(one.family, str(one.layers), f"{one.weights:,}", *quality, *shares)
    return made


def families_json(models: Mapping[str, list[FamilyDamage]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, for a file: by model, the families with their damage by width and timestep."""
    rows = {
        model: [{**asdict(one), "normalized": {width: one.normalized(width) for width in one.damage}} for one in found]
        for model, found in models.items()
    }
    return {"settings": dict(settings), "widths": {width: spec.to_dict() for width, spec in WIDTHS.items()}, "models": rows}
