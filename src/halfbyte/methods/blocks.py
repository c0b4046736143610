"""AdaRound of whole blocks: the choices of all layers of a residual or transformer block are optimized together (BRECQ).

What counts is the output of the block, not that of each layer, so layers can make up for each other. Layers are rounded one by one
first (`adaround`, exact gradients over all rows), and each choice may then be revised. One block after the other, in the order they
run: its inputs are those it meets in the quantized model, with the blocks before it done and activations rounded too; its target is
what the float model's block gives for the same call. A step takes one recorded call, so that every layer uses the scales of one
timestep. A block that ends no better than it was stays as it was.

(From the float weights, as in the paper, a block needs thousands of steps to come near what rounding its layers one by one gives.)

This needs a second copy of the float model, and two partial runs of the model over all calls for each block.

Source: Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", arXiv 2102.05426; inputs of the
quantized model with targets of the float one as in Q-Diffusion (arXiv 2302.04304).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.calibration import Call, evaluating, run_call, to_device
from halfbyte.errors import CalibrationError
from halfbyte.layers import FakeQuant, matrix_to_weight, module_kind, weight_to_matrix
from halfbyte.methods.adaround import SoftRounding, beta_at, passes, regularizer
from halfbyte.recipe import Reconstruction

Progress = Callable[[int, int], None]  # (done, total)


class _ReachedError(Exception):
    """Ends a run of the model that has shown what it was started for."""


@dataclass
class Sample:
    """One call of a block: its inputs in the quantized model, its outputs in the float one, and the timestep."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    timestep: Tensor | float | None


def find_blocks(model: nn.Module) -> list[str]:
    """Blocks of a model: the innermost entries of its module lists that hold at least two Linear or convolution layers."""
    entries = {
        f"{name}.{child}" if name else child: entry
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, entry in module.named_children()
    }
    large = [name for name, entry in entries.items() if sum(module_kind(part) is not None for part in entry.modules()) > 1]
    return [name for name in large if not any(other.startswith(f"{name}.") for other in large)]


def reconstruct_blocks(
    student: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    calls: Sequence[Call],
    exact: Mapping[str, Tensor],
    settings: Reconstruction,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Revise the rounding of the named blocks of a model of trainable layers, in place.

    Args:
        student: its layers hold rounded weights and final scales. teacher: the float model.
        exact: the weights before rounding, float32 (O, K), by name of the layer; layers that are not in it stay as they are.
        calls: of the denoiser; in order or not.
        seed: of the order in which calls are taken.
    Returns:
        What became of every block, in words, by its name.
    Raises:
        CalibrationError: when there are no calls, or none reaches a block.
    """
    if not calls:
        raise CalibrationError("blocks are reconstructed on calls of the model; pass calibration=")
    notes: dict[str, str] = {}
    with evaluating(student), evaluating(teacher):
        order = _order(teacher, names, calls[0])
        seconds = None if settings.seconds is None else settings.seconds / len(order)
        for name in order:
            block, inside = student.get_submodule(name), [key for key in exact if key.startswith(f"{name}.")]
            choices = {student.get_submodule(key): _soft(student.get_submodule(key), exact[key]) for key in inside}
            if choices:
                notes[name] = _reconstruct(block, choices, _record(student, teacher, name, calls), settings, seconds, seed)
            else:
                notes[name] = "no layer to round"
            if progress:
                progress(len(notes), len(order))
    return notes


@torch.no_grad()
def _order(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """The names in the order in which their blocks are first called."""
    seen: dict[str, None] = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.setdefault(name)) for name in names]
    try:
        run_call(model, call)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in seen]
    if missing:
        raise CalibrationError(f"{len(missing)} blocks were never reached by the calibration inputs, {missing[0]!r} among them")
    return list(seen)


@torch.no_grad()
def _record(student: nn.Module, teacher: nn.Module, name: str, calls: Sequence[Call]) -> list[Sample]:
    """Inputs of a block in the student and its outputs in the teacher, for every call (the first time, where it runs twice)."""
    inputs: list[tuple[Any, ...]] = []
    outputs: list[list[Tensor]] = []
    state = next((layer.timestep for layer in student.modules() if isinstance(layer, FakeQuant) and layer.timestep), None)

    def see_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((*to_device((args, kwargs), args[0].device if args else "cpu"), None if state is None else state.current))
        raise _ReachedError

    def see_output(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append([part.detach().clone() for part in _tensors(output)])
        raise _ReachedError

    with ExitStack() as hooks:
        hooks.callback(student.get_submodule(name).register_forward_pre_hook(see_input, with_kwargs=True).remove)
        hooks.callback(teacher.get_submodule(name).register_forward_hook(see_output).remove)
        for model, call in itertools.product((student, teacher), calls):
            with suppress(_ReachedError):
                run_call(model, call)
    return [Sample(args, kwargs, found, timestep) for (args, kwargs, timestep), found in zip(inputs, outputs, strict=True)]


def _tensors(output: Any) -> list[Tensor]:
    """The float tensors of an output, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _reconstruct(
    block: nn.Module,
    choices: Mapping[Any, SoftRounding],
    samples: Sequence[Sample],
    settings: Reconstruction,
    seconds: float | None,
    seed: int,
) -> str:
    layers, soft = list(choices), list(choices.values())
    generator = torch.Generator().manual_seed(seed % 2**63)
    before = _error(block, samples)
    with torch.enable_grad():
        alphas = [one.alpha for one in soft]
        optimizer = torch.optim.Adam(alphas, settings.learning_rate)
        for done in passes(settings.iterations, seconds):
            shares, beta = [one.share() for one in soft], beta_at(done, settings.warmup)
            sample = samples[int(torch.randint(len(samples), (1,), generator=generator))]
            with _weights(layers, [one.soft(share) for one, share in zip(soft, shares, strict=True)]):
                loss = _sample_error(block, sample) / max(before, 1e-30)
            if beta is not None:
                loss = loss + settings.regularizer * regularizer(torch.cat([share.flatten() for share in shares]), beta)
            for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas, allow_unused=True), strict=True):
                alpha.grad = gradient
            optimizer.step()
    hard = [one.hard() for one in soft]
    with _weights(layers, hard):
        found = _error(block, samples)
    if found >= before:
        return "as a block nothing better was found"
    for layer, matrix in zip(layers, hard, strict=True):
        weight = matrix_to_weight(layer, matrix).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    return f"as a block {found / before:.2f} of that block's error"


def _soft(layer: Any, exact: Tensor) -> SoftRounding:
    return SoftRounding(exact, layer.weight_scale, layer.spec.weight, weight_to_matrix(layer, layer.weight.detach().float()))


@contextmanager
def _weights(layers: Sequence[FakeQuant], matrices: Sequence[Tensor]) -> Iterator[None]:
    """Have the layers use these matrices (O, K) as their rounded weights."""
    for layer, matrix in zip(layers, matrices, strict=True):
        weight = matrix_to_weight(layer, matrix)  # type: ignore[arg-type]
        vars(layer)["rounded_weight"] = lambda exact, weight=weight: weight.to(exact.dtype)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["rounded_weight"]


@torch.no_grad()
def _error(block: nn.Module, samples: Sequence[Sample]) -> float:
    """Mean over the samples of the squared error of the block's output."""
    return sum(float(_sample_error(block, sample)) for sample in samples) / len(samples)


def _sample_error(block: nn.Module, sample: Sample) -> Tensor:
    for layer in block.modules():
        if isinstance(layer, FakeQuant) and layer.timestep is not None and sample.timestep is not None:
            layer.timestep.set(sample.timestep)
            break
    outputs = _tensors(block(*sample.args, **sample.kwargs))
    errors = [(found - exact).float().square().mean() for found, exact in zip(outputs, sample.targets, strict=True)]
    return torch.stack(errors).sum()
