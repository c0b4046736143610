"""Two models on the same noise: their images, their predictions and their layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.calibration import Call, Conditions, find_denoiser, record_calls, run_sampler, sampler_arguments, to_device
from halfbyte.layers import QuantizedLayer
from halfbyte.metrics import SignalToNoise
from halfbyte.splitting import owner_of
from halfbyte.timestep import TimestepState

Progress = Callable[[int, int], None]  # (done, total)


@torch.inference_mode()
def sample_images(
    pipe: Any,
    count: int,
    steps: int,
    seed: int = 0,
    batch: int = 32,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Tensor:
    """Images of a pipeline; image i depends on (seed, i) alone, not on the batch it is made in.

    Args:
        progress: called after every denoiser call with the image-steps done and in all.
        arguments: further ones of the pipeline's call, such as guidance_scale.
    Returns:
        float32 (count, C, H, W) in [0, 1].
    Raises:
        SamplerError: when the pipeline does not take an argument, or not with this value.
    """
    denoiser, made, done, share = find_denoiser(pipe), [], 0, 0
    pipe.set_progress_bar_config(disable=True)

    def served(*_: Any) -> None:
        nonlocal done
        done += share
        if progress:
            progress(done, count * steps)

    handle = denoiser.register_forward_hook(served)
    try:
        for start in range(0, count, batch):
            indices = range(start, min(count, start + batch))
            share = len(indices)
            made.append(sample_batch(pipe, indices, count, steps, seed, prompts, arguments))
    finally:
        handle.remove()
    return torch.cat(made)


@torch.inference_mode()
def sample_batch(
    pipe: Any,
    indices: Sequence[int],
    total: int,
    steps: int,
    seed: int = 0,
    prompts: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Tensor:
    """The images of some indices out of `total`, in one call of the pipeline.

    Args:
        arguments: further ones of the call, such as guidance_scale.
    Returns:
        float32 (len(indices), C, H, W) in [0, 1], on the CPU.
    Raises:
        SamplerError: when the pipeline does not take an argument, or not with this value.
    """
    told = Conditions(prompts, {"output_type": "pt", **(arguments or {})})
    return _as_tensor(run_sampler(pipe, sampler_arguments(pipe, indices, total, steps, seed, told)).images)


def _as_tensor(images: Any) -> Tensor:
    """What pipelines return for output_type 'pt': a tensor (N, C, H, W), or in some an array (N, H, W, C)."""
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return images.float().cpu()  # type: ignore[no-any-return]


@dataclass
class States:
    """Denoiser calls along the float model's own trajectories, with the noise it predicted there."""

    calls: list[Call]
    outputs: list[Tensor]
    timesteps: list[float]


@torch.inference_mode()
def float_states(
    pipe: Any,
    trajectories: int,
    steps: int,
    seed: int,
    keep: int = 20,
    prompts: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> States:
    """Record the float pipeline: inputs, timesteps and predictions of at most `keep` calls, spread over the trajectory."""
    denoiser = find_denoiser(pipe)
    pipe.set_progress_bar_config(disable=True)
    calls = record_calls(pipe, trajectories, steps, seed, batch=trajectories, keep=keep, prompts=prompts, arguments=arguments)
    state, states = TimestepState(), States(calls, [], [])
    handle = state.attach(denoiser)
    try:
        for call in calls:
            states.outputs.append(predict(denoiser, call))
            states.timesteps.append(math.nan if state.value is None else state.value)
    finally:
        handle.remove()
    return states


def predict(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's prediction for a recorded call, float32 on the CPU."""
    device = next(denoiser.parameters()).device
    output = denoiser(*to_device(call.args, device), **to_device(call.kwargs, device))
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    return found.float().cpu()  # type: ignore[no-any-return]


@torch.inference_mode()
def prediction_sqnr(denoiser: nn.Module, states: States) -> tuple[float, list[tuple[float, float]]]:
    """SQNR in dB of the predicted noise at the float model's states: over all, and by timestep (descending)."""
    total = SignalToNoise()
    by_timestep: dict[float, SignalToNoise] = {}
    for call, reference, timestep in zip(states.calls, states.outputs, states.timesteps, strict=True):
        found = predict(denoiser, call)
        total.add(reference, found)
        by_timestep.setdefault(timestep, SignalToNoise()).add(reference, found)
    return total.decibel, [(timestep, ratio.decibel) for timestep, ratio in sorted(by_timestep.items(), reverse=True)]


@torch.inference_mode()
def layer_sqnr(reference: nn.Module, quantized: nn.Module, calls: Sequence[Call]) -> dict[str, float]:
    """SQNR in dB of each quantized layer's output, given the float model's input of that layer: the damage each does alone.

    Layers that were split count as a whole.
    """
    found: dict[str, SignalToNoise] = {}

    def compare(name: str, layer: Any) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.setdefault(name, SignalToNoise()).add(output, layer(args[0]))

        return look

    parts = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLayer)}
    owners = dict.fromkeys(owner_of(quantized, name) for name in parts)
    layers = {name: quantized.get_submodule(name) for name in owners}
    handles = [reference.get_submodule(name).register_forward_hook(compare(name, layer)) for name, layer in layers.items()]
    timesteps = {id(layer.timestep): layer.timestep for layer in parts.values() if layer.timestep is not None}
    handles += [state.attach(reference) for state in timesteps.values()]  # tables over time follow the model that is called
    try:
        for call in calls:
            predict(reference, call)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ratio.decibel for name, ratio in found.items()}
