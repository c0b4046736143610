"""Data-free calibration: run the float model's own sampler from noise and look at what its layers see.

Two steps. `record_calls` runs a diffusers pipeline and keeps some of its denoiser calls, spread evenly over trajectory and batch.
`collect` runs the denoiser on recorded calls and gathers, per layer, bounded statistics of the input: ranges per timestep, moments,
reservoir samples, largest magnitudes per channel, and the Hessian sum of x x^T where GPTQ asks for one.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, HalfbyteError, SamplerError, listed
from halfbyte.layers import TRANSPOSED, Quantizable, check_finite, input_to_rows
from halfbyte.timestep import TimestepState
from halfbyte.tracing import ActivationTrace

DENOISERS = ("unet", "transformer")  # what pipelines call the network that predicts noise
RESERVOIR = 2048  # values of the input kept per layer and timestep
SAMPLED_ROWS = 512  # input rows (tokens or pixels) kept per layer where they are asked for
HESSIAN_ROWS = 8192  # input rows (tokens or pixels) that enter a layer's Hessian, over all calls

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Conditions:
    """What a pipeline's sampler is told beside noise and steps."""

    prompts: Sequence[str] = ()  # for text-to-image pipelines; used in turn
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of its call, such as guidance_scale


@dataclass
class Call:
    """One recorded call of a denoiser, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_denoiser(pipe: Any) -> nn.Module:
    """The network of a diffusers pipeline that predicts noise: its `unet` or `transformer`.

    Raises:
        CalibrationError: when the pipeline has neither.
    """
    for name in DENOISERS:
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    parts = ", ".join(getattr(pipe, "components", {})) or "none"
    raise CalibrationError(f"{type(pipe).__name__} has neither a 'unet' nor a 'transformer' (its components: {parts})")


def to_device(value: Any, device: torch.device | str) -> Any:
    """Tensors inside tuples, lists and dicts, detached and copied: what works on them in place leaves the originals alone."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(entry, device) for entry in value)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    return value


def record_calls(
    pipe: Any,
    trajectories: int = 16,
    steps: int = 20,
    seed: int = 0,
    batch: int = 16,
    keep: int = 64,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Call]:
    """Denoiser calls of the pipeline's own sampler, from seeded noise.

    Args:
        trajectories: images sampled in all; their classes or prompts are spread evenly.
        steps: of the sampler; every one of them is recorded at first, then at most `keep` calls stay, spread evenly over the
            steps, and over the batches in turn.
        prompts: for text-to-image pipelines; used in turn.
        arguments: further ones of the pipeline's call, such as guidance_scale.
    Returns:
        Calls in the order they were made.
    Raises:
        CalibrationError: when the pipeline wants prompts and none are given.
        SamplerError: when it does not take an argument, or not with this value.
    """
    denoiser, calls, starts = find_denoiser(pipe), [], range(0, trajectories, batch)
    told = Conditions(prompts, arguments or {})

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(to_device(args, "cpu"), to_device(kwargs, "cpu")))
        if progress:
            progress(len(calls), steps * len(starts))

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for start in starts:
            size = min(batch, trajectories - start)
            run_sampler(pipe, sampler_arguments(pipe, range(start, start + size), trajectories, steps, seed, told))
    finally:
        handle.remove()
    if len(calls) <= keep:
        return calls
    length = len(calls) // len(starts)  # calls of one batch: every batch makes as many
    kept = sorted((index % len(starts)) * length + index * length // keep for index in range(keep))
    return [calls[index] for index in kept]


def sampler_arguments(
    pipe: Any, indices: Sequence[int], total: int, steps: int, seed: int, told: Conditions | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline call that samples the images of the given indices, whatever kind of pipeline it is.

    Every image has a generator of its own, seeded by (seed, index): an image does not depend on the batch it is sampled in.

    Raises:
        CalibrationError: when the pipeline wants prompts and none are given.
        SamplerError: when it has no argument of a name.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    prompts, further = (told or Conditions()).prompts, (told or Conditions()).arguments
    unknown = set(further) - set(accepted)
    if unknown:
        raise SamplerError(f"{type(pipe).__name__} takes no argument {listed(unknown)}; it takes {listed(accepted)}")
    generators = [torch.Generator("cpu").manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]
    arguments: dict[str, Any] = {"num_inference_steps": steps, "generator": generators}
    if "prompt" in accepted:
        if not prompts:
            raise CalibrationError(f"{type(pipe).__name__} samples from prompts; give at least one")
        arguments["prompt"] = [prompts[index % len(prompts)] for index in indices]
    elif "class_labels" in accepted:
        classes = int(find_denoiser(pipe).config.num_embeds_ada_norm)  # type: ignore[union-attr, arg-type]
        arguments["class_labels"] = [index * classes // total for index in indices]
    else:
        arguments["batch_size"] = len(indices)
    if "output_type" in accepted:
        arguments["output_type"] = "pt" if "prompt" not in accepted else "latent"
    return arguments | dict(further)


def run_sampler(pipe: Any, call: Mapping[str, Any]) -> Any:
    """What a pipeline returns for a call.

    Raises:
        SamplerError: for what pipelines refuse by a ValueError, such as a height that is no multiple of 8.
    """
    try:
        return pipe(**call)
    except HalfbyteError:  # some are ValueErrors too
        raise
    except ValueError as error:
        raise SamplerError(f"{type(pipe).__name__} does not sample with these arguments: {error}") from error


@dataclass
class InputStatistics:
    """What one layer's input looked like."""

    count: int = 0
    total: float = 0.0
    total_square: float = 0.0
    ranges: dict[float | None, tuple[float, float]] = field(default_factory=dict)  # by timestep; None: the model has none
    channel_absmax: Tensor | None = None  # float32 (C,)
    counts: dict[float | None, int] = field(default_factory=dict)  # values seen, by timestep
    reservoirs: dict[float | None, Tensor] = field(default_factory=dict)  # float32 by timestep: RESERVOIR of its values, or all
    hessian: Tensor | None = None  # float32 (groups, K, K): sum of x x^T over `hessian_rows` rows
    hessian_rows: int = 0
    rows: Tensor | None = None  # float32 (groups, n, K): a sample of the vectors the weights are multiplied with
    source: str | None = None  # the one-sided function whose output this is, such as "SiLU"

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value over all timesteps."""
        return min(low for low, _ in self.ranges.values()), max(high for _, high in self.ranges.values())

    def on(self, device: torch.device | str) -> "InputStatistics":
        """The same, with what is calculated with weights (absmax, Hessian, rows) on their device."""
        tensors = {"channel_absmax": self.channel_absmax, "hessian": self.hessian, "rows": self.rows}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})  # type: ignore[arg-type]

    def update(self, rows: Tensor, timestep: float | None, generator: torch.Generator) -> None:
        """Take in one input, float32 (r, p, c)."""
        if not rows.numel():
            return
        low, high = (float(value) for value in torch.aminmax(rows))
        known = self.ranges.get(timestep, (low, high))
        self.ranges[timestep] = (min(low, known[0]), max(high, known[1]))
        self.total += float(rows.double().sum())
        self.total_square += float(rows.double().square().sum())
        absmax = rows.abs().amax((0, 1))
        self.channel_absmax = absmax if self.channel_absmax is None else torch.maximum(self.channel_absmax, absmax)
        seen, sample = self.counts.get(timestep, 0), self.reservoirs.get(timestep, rows.new_empty(0))
        self.reservoirs[timestep] = _sampled(sample, seen, rows.flatten(), generator)
        self.counts[timestep] = seen + rows.numel()
        self.count += rows.numel()

    @property
    def reservoir(self) -> Tensor:
        """A sample of the input, float32 (n,): every timestep has the same part in it."""
        return torch.cat(list(self.reservoirs.values())) if self.reservoirs else torch.empty(0)

    def add_rows(self, layer: Quantizable, x: Tensor, limit: int, generator: torch.Generator) -> None:
        """Keep at most `limit` random contraction rows of an input."""
        rows = contraction_rows(layer, x.float())
        rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:limit]]
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows], 1)

    def add_hessian(self, layer: Quantizable, x: Tensor, limit: int, generator: torch.Generator) -> None:
        """Add x x^T of at most `limit` random rows (tokens, or output positions of a convolution)."""
        rows = contraction_rows(layer, x.float())  # (G, n, K)
        if rows.shape[1] > limit:
            rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:limit]]
        product = rows.transpose(1, 2) @ rows
        self.hessian = product if self.hessian is None else self.hessian + product
        self.hessian_rows += rows.shape[1]


def _sampled(known: Tensor, seen: int, values: Tensor, generator: torch.Generator) -> Tensor:
    """Everything while there is room, then a uniform sample: old and new values survive in proportion to their numbers."""
    total = seen + values.numel()
    if total <= RESERVOIR:
        return torch.cat([known, values])
    if 0 < len(known) < RESERVOIR:
        known = known[torch.randint(len(known), (RESERVOIR,), generator=generator)]
    fresh = values[torch.randint(len(values), (RESERVOIR,), generator=generator)]
    from_new = torch.rand(RESERVOIR, generator=generator) < len(values) / total
    return torch.where(from_new, fresh, known) if seen else fresh


def contraction_rows(layer: Quantizable, x: Tensor) -> Tensor:
    """The vectors a layer multiplies its weight rows with: (groups, n, K), K in the order of `layers.weight_to_matrix`.

    Raises:
        CalibrationError: for transposed convolutions, whose output positions see different numbers of inputs.
    """
    if isinstance(layer, TRANSPOSED):
        raise CalibrationError("transposed convolutions have no contraction rows here; leave them out of `hessians` and `rows`")
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    taps = len(layer.kernel_size)
    x = x if x.ndim == taps + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    if taps == 1:
        padded = padded[:, :, None]
    kernel, stride, dilation = ((1,) * (2 - taps) + value for value in (layer.kernel_size, layer.stride, layer.dilation))
    columns: Tensor = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # (N, C * taps, positions), channels slowest
    columns = columns.unflatten(1, (layer.groups, -1, math.prod(kernel)))  # (N, G, C/G, taps, positions)
    return columns.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, without dropout and without updates of batch norms; put back as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def run_call(model: nn.Module, call: Call) -> Any:
    """The output of a model for a recorded call, on the model's device."""
    device = next(model.parameters()).device
    return model(*to_device(call.args, device), **to_device(call.kwargs, device))


def collect(
    model: nn.Module,
    calls: Iterable[Call],
    names: Iterable[str],
    hessians: Iterable[str] = (),
    rows: Iterable[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the named layers over the calls; the same calls and seed give the same bits.

    The model runs in evaluation mode, without dropout and without updates of batch norms, and is put back as it was.

    Args:
        names: dotted names of Linear and convolution layers.
        hessians, rows: those of them whose Hessian, or whose sample of contraction rows, is wanted.
    Raises:
        NonFiniteError: when an input holds a NaN or an infinity; names the layer.
        CalibrationError: when there are no calls, or a layer was never reached.
    """
    calls = list(calls)
    hessians, rows, trace = set(hessians), set(rows), ActivationTrace()
    if not calls:
        raise CalibrationError("no calls to calibrate on; give at least one input of the model")
    found = {name: InputStatistics() for name in names}
    generator, state, limit = torch.Generator().manual_seed(seed % 2**63), TimestepState(), max(1, HESSIAN_ROWS // len(calls))

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().cpu()
            check_finite(f"the input of layer {name!r} during calibration", x)
            first = not found[name].count
            found[name].update(input_to_rows(layer, x.float()), state.value, generator)  # type: ignore[arg-type]
            source = trace.source(args[0])
            found[name].source = source if first or found[name].source == source else None
            if name in hessians:
                found[name].add_hessian(layer, x, limit, generator)  # type: ignore[arg-type]
            if name in rows:
                found[name].add_rows(layer, x, -(-SAMPLED_ROWS // len(calls)), generator)  # type: ignore[arg-type]

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in found]
    with contextlib.suppress(CalibrationError):  # a model without a timestep: all inputs fall under one key
        handles.append(state.attach(model))
    try:
        with evaluating(model), torch.inference_mode(), trace:
            for done, call in enumerate(calls, 1):
                run_call(model, call)
                if progress:
                    progress(done, len(calls))
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, statistics in found.items() if not statistics.count]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} layers were never reached by the calibration inputs, {unseen[0]!r} among them; give inputs that reach "
            "them, or name them in the recipe's keep"
        )
    return found
