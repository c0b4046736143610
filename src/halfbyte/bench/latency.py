"""The times of a denoiser's layers on this machine: packed at every width, and in float, beside the whole float model.

Layers are timed where they run, inside steps of the whole model with all layers at one width: alone in a loop, a layer finds its
weights and its code in caches that a step has swept (small packed layers took a third of their true time, large float ones more
than theirs). Equal layers with inputs of equal shape share one time. The widths take turns, so that a machine that slows down for
a while slows all of them down.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.bench.synthetic import packed_twin
from halfbyte.calibration import Call, Conditions, find_denoiser, record_calls
from halfbyte.conversion import quantizable_layers
from halfbyte.demo import environment
from halfbyte.errors import ModelError, listed
from halfbyte.latency import FLOAT, Latency
from halfbyte.layers import module_kind
from halfbyte.recipe import LayerSpec
from halfbyte.sensitivity import replaced

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 15  # steps at every width; the median counts
FEWEST, LONGEST = 3, 60.0  # rounds there are at least, and seconds after which there are no more
Progress = Callable[[str, int, int], None]  # (what is being measured, rounds done, rounds in all)


@torch.inference_mode()
def measure_latency(
    pipe: Any,
    ladder: Mapping[str, LayerSpec],
    dtype: str = "bf16",
    prompts: Sequence[str] = (),
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Latency:
    """Measure every layer of a float pipeline's denoiser in steps of one image.

    Args:
        ladder: specs by the name of their width; those that have no packed form are left out.
        dtype: of DTYPES: of activations, and of weights that stay in float.
        rounds: at most; large models get fewer.
        arguments: further ones of the pipeline's call, such as height.
    Raises:
        ModelError: for another dtype.
    """
    if dtype not in DTYPES:
        raise ModelError(f"the dtype of a step must be one of {listed(DTYPES)}, got {dtype!r}")
    model, call = step_of(pipe, DTYPES[dtype], Conditions(prompts, arguments or {}))
    layers = quantizable_layers(model)
    twins = {width: _twins(layers, spec) for width, spec in ladder.items() if spec.simulated_only() is None} | {FLOAT: {}}
    calls = {name: dict(Counter(cases)) for name, cases in _calls(model, call, layers).items()}
    totals: list[float] = []
    times: dict[str, dict[str, list[float]]] = {case: {width: [] for width in twins} for made in calls.values() for case in made}
    start = time.perf_counter()
    for turn in range(1 + rounds):  # the first warms up
        if turn > FEWEST and time.perf_counter() - start > LONGEST:
            break
        total = _seconds(model, call)
        for width, places in twins.items():
            with replaced(model, places):
                found = _layer_seconds(model, call, layers)
            for case, seconds in found.items():
                times[case][width] += seconds if turn else []
        totals += [total] if turn else []
        if progress:
            progress("measuring layers on this machine", turn + 1, 1 + rounds)
    cases = {case: {width: statistics.median(made) for width, made in one.items()} for case, one in times.items()}
    return Latency(type(model).__name__, environment(), dtype, statistics.median(totals), cases, calls)


def _twins(layers: Mapping[str, Any], spec: LayerSpec) -> dict[nn.Module, nn.Module]:
    """A packed layer for each float one; equal ones share theirs."""
    made: dict[str, nn.Module] = {}
    for layer in layers.values():
        if _kind(layer) not in made:
            made[_kind(layer)] = packed_twin(layer, spec)
    return {layer: made[_kind(layer)] for layer in layers.values()}


def _kind(layer: Any) -> str:
    """Kind and sizes of a float layer, or of the one that a packed layer stands for."""
    kind: Any = module_kind(layer)
    return f"{kind.__name__}({kind.extra_repr(layer)})"


def _seconds(model: nn.Module, call: Call) -> float:
    start = time.perf_counter()
    model(*call.args, **call.kwargs)
    return time.perf_counter() - start


def _layer_seconds(model: nn.Module, call: Call, names: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of every call of the named layers in a step, by case."""
    found: dict[str, list[float]] = {}
    start = 0.0

    def before(*_: Any) -> None:
        nonlocal start
        start = time.perf_counter()

    def after(case: str) -> Callable[..., None]:
        def stop(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            found.setdefault(f"{case} of {_shape(args[0])}", []).append(time.perf_counter() - start)

        return stop

    places = {model.get_submodule(name) for name in names}
    handles = [layer.register_forward_pre_hook(before) for layer in places]
    handles += [layer.register_forward_hook(after(_kind(layer))) for layer in places]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def known_latency(file: Path, ladder: Mapping[str, LayerSpec], dtype: str) -> Latency | None:
    """The times in a file; None where there is none, or they are of other widths, another dtype, machine or number of threads."""
    if not file.is_file():
        return None
    found = Latency.load(file)
    widths = {width for width, spec in ladder.items() if spec.simulated_only() is None} | {FLOAT}
    here = (dtype, environment(), widths)
    return found if (found.dtype, found.environment, set(found.widths)) == here else None


def step_of(pipe: Any, dtype: torch.dtype, told: Conditions | None = None) -> tuple[nn.Module, Call]:
    """A copy of the denoiser in a dtype, convolutions channels-last, and one call of it for one image."""
    pipe.set_progress_bar_config(disable=True)
    told = told or Conditions()
    call = record_calls(pipe, 1, 1, prompts=told.prompts, arguments=told.arguments)[0]
    model = nn.Module.to(copy.deepcopy(find_denoiser(pipe)), dtype).eval()  # that of diffusers warns on what is meant here
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, Call(_cast(call.args, dtype), _cast(call.kwargs, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floats inside tuples, lists and dicts in a dtype, images channels-last."""
    if isinstance(value, Tensor):
        made = value.to(dtype) if value.is_floating_point() else value
        return made.to(memory_format=torch.channels_last) if made.ndim == 4 else made
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return value


def _calls(model: nn.Module, call: Call, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """By layer, the case of each of its calls in a step."""
    calls: dict[str, list[str]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.setdefault(name, []).append(f"{_kind(layer)} of {_shape(args[0])}")

        return look

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls
