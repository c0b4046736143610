"""Which layers carry the timestep: known by name for listed architectures, otherwise found by changing what the model is given."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import Call, to_device
from halfbyte.conversion import quantizable_layers
from halfbyte.errors import HealError
from halfbyte.targets import TARGETS
from halfbyte.timestep import timestep_argument


def temporal_layers(denoiser: nn.Module, call: Call, other: Call) -> list[str]:
    """The Linear and convolution layers whose input depends on the timestep and not on the sample nor on tokens of text, by name.

    These are the layers of the time embedding and the projections of it into the blocks. Class labels and pooled text may be mixed
    into their input.

    Args:
        denoiser: the float model.
        call, other: two of its calls, at different timesteps.
    """
    target = TARGETS.get(type(denoiser).__name__)
    if target is not None and target.temporal:
        return [name for name in quantizable_layers(denoiser) if target.is_temporal(name)]
    return traced_layers(denoiser, call, other)


@torch.no_grad()
def traced_layers(denoiser: nn.Module, call: Call, other: Call) -> list[str]:
    """As `temporal_layers`, without the table of architectures: three forward passes are compared bit for bit.

    One as it was, one with another sample (the first float argument) and other tokens (float arguments of more than two axes), one
    at another timestep. A list of tensors, one a sample, counts as a tensor of one axis more.

    Raises:
        HealError: when the two calls have the same timestep, or no argument is the sample.
    """
    name, position = timestep_argument(denoiser)
    time, later = _argument(call, name, position), _argument(other, name, position)
    if torch.equal(torch.as_tensor(time), torch.as_tensor(later)):
        raise HealError("the layers of the time embedding are found from calls at two timesteps; both are the same")
    parameters = list(inspect.signature(denoiser.forward).parameters)
    given = {key: _argument(call, key, place) for place, key in enumerate(parameters) if key != name}
    content = [key for key, value in given.items() if _axes(value)]
    if not content:
        names = ", ".join(given)
        raise HealError(f"{type(denoiser).__name__} is given no sample: none of {names} is a float tensor or a list of them")
    elsewhere = call
    for key in [content[0], *(key for key in content[1:] if _axes(given[key]) > 2)]:
        elsewhere = _with(elsewhere, key, parameters.index(key), _noise(given[key], torch.Generator().manual_seed(0)))
    inputs = _inputs(denoiser, call)
    moved = _inputs(denoiser, elsewhere, inputs)
    timed = _inputs(denoiser, _with(call, name, position, later), inputs)
    return [layer for layer in inputs if not moved[layer] and timed[layer]]


def _axes(value: Any) -> int:
    """Number of axes of a float tensor, or of a batch given as a list of them; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.ndim if value.is_floating_point() else 0
    return 1 + _axes(value[0]) if isinstance(value, list) and value and _axes(value[0]) else 0


def _noise(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, list):
        return [_noise(item, generator) for item in value]
    return torch.rand(value.shape, generator=generator).to(value)


def _argument(call: Call, name: str, position: int) -> Any:
    return call.kwargs.get(name, call.args[position] if position < len(call.args) else None)


def _with(call: Call, name: str, position: int, value: Any) -> Call:
    """A call with another value of one argument."""
    if name in call.kwargs:
        return Call(call.args, {**call.kwargs, name: value})
    return Call((*call.args[:position], value, *call.args[position + 1 :]), call.kwargs)


def _inputs(denoiser: nn.Module, call: Call, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The inputs of every layer in a call, lists by name; given those of another call, whether they differ."""
    found: dict[str, list[Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda _, args: found.setdefault(name, []).append(args[0].clone())

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in quantizable_layers(denoiser).items()]
    device = next(denoiser.parameters()).device
    try:
        denoiser(*to_device(call.args, device), **to_device(call.kwargs, device))
    finally:
        for handle in handles:
            handle.remove()
    if before is None:
        return found
    return {name: not all(torch.equal(x, y) for x, y in zip(seen, found[name], strict=True)) for name, seen in before.items()}
