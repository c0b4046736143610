"""Budgets: the width of every layer that does the least damage within limits on bits, bytes or time.

What a width costs adds up over the layers in every unit, and so do damages while they are small: a small integer program.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import HalfbyteError, MissingExtraError, listed
from halfbyte.formats import get_grid
from halfbyte.latency import FLOAT, Latency
from halfbyte.recipe import LayerOverride, LayerSpec, Recipe
from halfbyte.sensitivity import LayerDamage, Sensitivity

UNITS = {  # unit -> what there is so much of
    "bits": "stored bits a weight",
    "activation-bits": "bits an activation",
    "MB": "MB of stored weights",
    "ms": "ms a step of one image",
    "x": "of the float model's time",
}
TIMES = ("ms", "x")  # units that take measured times
SLACK = 1e-9  # by which a sum may exceed its limit, as part of it: what adding up in floats costs
Costs = Sequence[Sequence[float]]  # by layer and width


@dataclass(frozen=True)
class Limit:
    """The most of something that a model may have."""

    most: float
    unit: str  # of UNITS

    def __post_init__(self) -> None:
        if self.unit not in UNITS or not 0 < self.most < math.inf:
            raise HalfbyteError(f"a budget is a number above 0 of {listed(UNITS)}; got {self.most:g}{self.unit}")

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Such as 4.5bits (stored, averaged over the weights), 5activation-bits (averaged over the work), 1.9MB, 12ms, 0.8x.

        Raises:
            HalfbyteError: for anything else.
        """
        found = re.fullmatch(rf"\s*(\d+\.?\d*|\.\d+)\s*({'|'.join(UNITS)})\s*", text)
        if found is None:
            raise HalfbyteError(f"a budget is a number above 0 and a unit, such as 4.5bits, 1.9MB, 12ms or 0.8x; got {text!r}")
        return cls(float(found[1]), found[2])

    @property
    def timed(self) -> bool:
        return self.unit in TIMES

    def __str__(self) -> str:
        return f"{self.most:g}{self.unit}"


def stored_bits(spec: LayerSpec | None) -> float:
    """Bits a weight takes on disk, multipliers included; what has no packed form counts with the width of its codes."""
    if spec is None:
        return 16.0
    return spec.weight.bits


def stored_megabytes(layer: LayerDamage, spec: LayerSpec | None) -> float:
    """Of a layer's codes and multipliers, and a float32 scale for every output channel."""
    return (layer.weights * stored_bits(spec) / 8 + (0 if spec is None else 4 * layer.channels)) / 1e6


def input_bits(spec: LayerSpec | None) -> float:
    """Bits of an input value, multipliers not counted: they are made and used up inside the layer."""
    return 16.0 if spec is None or spec.activation is None else get_grid(spec.activation.grid).bits


def _cost(found: Sensitivity, unit: str, latency: Latency | None) -> tuple[Callable[[LayerDamage, str], float], float]:
    """What a layer costs at a width, in a unit; and what the rest of the model does."""
    spec = {**found.ladder, FLOAT: None}
    weights, operations = sum(layer.weights for layer in found.layers), sum(layer.operations for layer in found.layers)
    if unit == "bits":
        return lambda layer, width: layer.weights * stored_bits(spec[width]) / weights, 0.0
    if unit == "activation-bits":
        return lambda layer, width: layer.operations * input_bits(spec[width]) / operations, 0.0
    if unit == "MB":
        return lambda layer, width: stored_megabytes(layer, spec[width]), 0.0
    if latency is None:
        raise HalfbyteError(f"a limit in {unit} needs the times of the layers; measure them first")
    times, scale = latency, 1e3 if unit == "ms" else 1 / latency.total
    return lambda layer, width: scale * times.seconds(layer.name, width), scale * latency.rest


def amount(found: Sensitivity, widths: Mapping[str, str], unit: str, latency: Latency | None = None) -> float:
    """How much of a unit an assignment has."""
    cost, rest = _cost(found, unit, latency)
    return rest + sum(cost(layer, widths[layer.name]) for layer in found.layers)


def spend(found: Sensitivity, limits: Sequence[Limit], latency: Latency | None = None, simulated: bool = False) -> dict[str, str]:
    """The width of every layer that leaves the least sum of damages within limits.

    Where time is limited, layers may also stay in float: the small ones are often no faster in integers.

    Args:
        limits: all of them are met.
        latency: for limits of time.
        simulated: also give widths that have no packed form.
    Raises:
        HalfbyteError: when no assignment meets the limits; says what can be reached.
        MissingExtraError: without scipy.
    """
    widths = [width for width, spec in found.ladder.items() if simulated or spec.simulated_only() is None]
    if any(limit.timed for limit in limits):
        widths = [width for width in (*widths, FLOAT) if latency is None or width in latency.widths]
    sums: list[tuple[Costs, float]] = []
    for limit in limits:
        cost, rest = _cost(found, limit.unit, latency)
        costs = [[cost(layer, width) for width in widths] for layer in found.layers]
        low, high = (rest + sum(map(end, costs)) for end in (min, max))
        if limit.most < low * (1 - SLACK):
            raise HalfbyteError(
                f"no assignment has {limit.most:g} {UNITS[limit.unit]}; these widths reach {_above(low)} to {high:.4g}"
            )
        sums.append((costs, limit.most - rest))
    damage = [[0.0 if width == FLOAT else layer.total(width) for width in widths] for layer in found.layers]
    chosen = _least(damage, sums)
    if chosen is None:
        raise HalfbyteError(_conflict(limits, sums))
    return {layer.name: widths[index] for layer, index in zip(found.layers, chosen, strict=True)}


def _least(objective: Costs, sums: Sequence[tuple[Costs, float]]) -> list[int] | None:
    """The width of each layer, by its number, of the least sum, while other sums stay within limits; None: there is none."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise MissingExtraError("a budget needs scipy: pip install 'halfbyte[eval]'") from error
    goal = np.array(objective)
    limits: list[Any] = [LinearConstraint(np.kron(np.eye(len(goal)), np.ones(goal.shape[1])), 1, 1)]  # one width for each layer
    for costs, most in sums:
        scale = most or 1.0
        limits.append(LinearConstraint(np.ravel(costs) / scale, -np.inf, most / scale + SLACK))
    solved = milp(
        1e3 * goal.ravel() / max(goal.max(), 1e-300),  # the solver's own tolerances are absolute
        constraints=limits,
        integrality=np.ones(goal.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    return None if solved.x is None else solved.x.reshape(goal.shape).argmax(1).tolist()


def _conflict(limits: Sequence[Limit], sums: Sequence[tuple[Costs, float]]) -> str:
    """Which limit could be how low while the others hold, in words."""
    reach = []
    for limit, (costs, most) in zip(limits, sums, strict=True):
        chosen = _least(costs, [one for one in sums if one[0] is not costs])
        if chosen is not None:
            least = limit.most - most + sum(row[index] for row, index in zip(costs, chosen, strict=True))
            reach.append(f"{_above(least)} {UNITS[limit.unit]}")
    return f"no assignment meets all limits at once; the others allow no less than {' or '.join(reach) or 'these'}"


def _above(least: float) -> str:
    """Four digits of a number above 0, rounded up, so that a limit of this many can be met."""
    digits = 3 - math.floor(math.log10(least))
    return f"{math.ceil(round(least * 10**digits, 6)) / 10**digits:.4g}"


def to_recipe(found: Sensitivity, widths: Mapping[str, str], name: str) -> Recipe:
    """A recipe that gives every layer its width: the most frequent one as the rule, the others (and the edges) by name.

    Raises:
        HalfbyteError: when all layers stay in float.
    """
    given = [width for width in widths.values() if width != FLOAT]
    if not given:
        raise HalfbyteError("this budget leaves every layer in float; there is nothing to quantize, give a lower one")
    common = max(found.ladder, key=given.count)
    edges = {layer.name for layer in found.layers if layer.family == "edge"}
    others = [layer for layer, width in widths.items() if width != FLOAT and (width != common or layer in edges)]
    overrides = tuple(LayerOverride(_exactly(layer), found.ladder[widths[layer]]) for layer in others)
    keep = tuple(_exactly(layer) for layer, width in widths.items() if width == FLOAT)
    return Recipe(name, found.ladder[common], overrides=overrides, keep=keep)


def _exactly(layer: str) -> str:
    return f"^{re.escape(layer)}$"
