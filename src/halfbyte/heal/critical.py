"""Which quantized layers a student's loss is due to, from a few backward passes: QuEST's sensitive layers, found automatically.

A quantized layer gives o + d where the float layer, on the same input, gives o. Were this layer alone in float, the loss L would
fall, to first order, by <dL/do, d>. That product, averaged over states of the float model, is what the layer is charged with. One
backward pass charges all layers; `halfbyte sensitivity` measures the same by a forward pass for each layer and width. Where errors
of different layers do not correlate, the charge is twice the damage that the layer does alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.heal.objective import mean_square
from halfbyte.heal.states import Batch, prediction
from halfbyte.layers import FakeQuant


@dataclass
class Charge:
    """What one layer is charged with."""

    loss: float = 0.0  # of the student, to first order; may be negative
    energy: float = 0.0  # mean square of the layer's output
    weights: int = 0  # trainable parameters: weight and bias


def charges(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> dict[str, Charge]:
    """The charge of every quantized layer of a student, averaged over batches.

    Args:
        student: with trainable quantized layers. teacher: the float model, with the same names.
    """
    layers: dict[str, Any] = {name: layer for name, layer in student.named_modules() if isinstance(layer, FakeQuant)}
    found = {name: Charge(weights=sum(p.numel() for p in layer.parameters(recurse=False))) for name, layer in layers.items()}
    count = 0

    def watch(charge: Charge, exact_layer: nn.Module) -> Callable[..., Tensor]:
        def look(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            with torch.no_grad():
                exact = exact_layer(args[0])
                error = output - exact
                charge.energy += float(exact.square().mean())

            def add(gradient: Tensor) -> None:
                charge.loss += float((gradient * error).sum())

            probed = output + torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
            probed.register_hook(add)
            return probed

        return look

    handles = [layer.register_forward_hook(watch(found[name], teacher.get_submodule(name))) for name, layer in layers.items()]
    try:
        for batch in batches:
            count += 1
            mean_square(prediction(student(*batch.args, **batch.kwargs)), batch.target).mean().backward()
    finally:
        for handle in handles:
            handle.remove()
    for charge in found.values():
        charge.loss, charge.energy = charge.loss / max(1, count), charge.energy / max(1, count)
    return found


def worst_layers(found: Mapping[str, Charge], limit: float) -> list[str]:
    """The layers that are charged most for their size, as many as have `limit` parameters together."""
    ranked = sorted((name for name in found if found[name].loss > 0), key=lambda name: -found[name].loss / found[name].weights)
    chosen, used = [], 0
    for name in ranked:
        if used + found[name].weights <= limit:
            chosen.append(name)
            used += found[name].weights
    return chosen
