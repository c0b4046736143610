"""The times of a denoiser's layers on this machine: packed at every width, and in float, beside the whole float model.

Equal layers that are called with inputs of equal shape are measured once. Everything takes turns with everything else, so that
a machine that slows down for a while slows down all that is compared.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.bench.synthetic import packed_twin
from halfbyte.bench.timing import Effort, medians
from halfbyte.calibration import Call, find_denoiser, record_calls
from halfbyte.conversion import quantizable_layers
from halfbyte.demo import environment
from halfbyte.errors import ModelError, listed
from halfbyte.latency import FLOAT, Latency
from halfbyte.layers import module_kind
from halfbyte.recipe import LayerSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EFFORT = Effort(rounds=7, least=0.003)
STEP = ("", "")  # the contestant that is the whole float model
Progress = Callable[[str, int, int], None]  # (what is being measured, turns done, turns in all)


@torch.inference_mode()
def measure_latency(
    pipe: Any,
    ladder: Mapping[str, LayerSpec],
    dtype: str = "bf16",
    prompts: Sequence[str] = (),
    effort: Effort = EFFORT,
    progress: Progress | None = None,
) -> Latency:
    """Measure every layer of a float pipeline's denoiser as a step of one image calls it.

    Args:
        ladder: specs by the name of their width; those that have no packed form are left out.
        dtype: of DTYPES: of activations, and of weights that stay in float.
    Raises:
        ModelError: for another dtype.
    """
    if dtype not in DTYPES:
        raise ModelError(f"the dtype of a step must be one of {listed(DTYPES)}, got {dtype!r}")
    model, call = step_of(pipe, DTYPES[dtype], prompts)
    layers, inputs, calls = _cases(model, call)
    contestants: dict[tuple[str, str], Callable[[], object]] = {STEP: partial(model, *call.args, **call.kwargs)}
    for case, layer in layers.items():
        twins = {width: packed_twin(layer, spec) for width, spec in ladder.items() if spec.simulated_only() is None}
        contestants |= {(case, width): partial(twin, inputs[case]) for width, twin in {**twins, FLOAT: layer}.items()}
    seconds = medians(contestants, effort, partial(progress, "measuring layers on this machine") if progress else None)
    cases: dict[str, dict[str, float]] = {case: {} for case in layers}
    for (case, width), time in seconds.items():
        if case:
            cases[case][width] = time
    counts = {name: dict(Counter(made)) for name, made in calls.items()}
    return Latency(type(model).__name__, environment(), dtype, seconds[STEP], cases, counts)


def known_latency(file: Path, ladder: Mapping[str, LayerSpec], dtype: str) -> Latency | None:
    """The times in a file; None where there is none, or they are of other widths, another dtype, machine or number of threads."""
    if not file.is_file():
        return None
    found = Latency.load(file)
    widths = {width for width, spec in ladder.items() if spec.simulated_only() is None} | {FLOAT}
    here = (dtype, environment(), widths)
    return found if (found.dtype, found.environment, set(found.widths)) == here else None


def step_of(pipe: Any, dtype: torch.dtype, prompts: Sequence[str]) -> tuple[nn.Module, Call]:
    """A copy of the denoiser in a dtype, convolutions channels-last, and one call of it for one image."""
    pipe.set_progress_bar_config(disable=True)
    call = record_calls(pipe, 1, 1, prompts=prompts)[0]
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


def _cases(model: nn.Module, call: Call) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]:
    """By case, a layer and its input; and by layer, the case of each of its calls in a step."""
    layers: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    calls: dict[str, list[str]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(layer: Any, args: tuple[Tensor, ...]) -> None:
            x, kind = args[0], module_kind(layer)
            case = f"{kind.__name__}({layer.extra_repr()}) of {'x'.join(map(str, x.shape))}"  # type: ignore[union-attr]
            layers.setdefault(case, layer)
            inputs.setdefault(case, x.clone())
            calls.setdefault(name, []).append(case)

        return look

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in quantizable_layers(model).items()]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return layers, inputs, calls
