"""The GPU engine against what else multiplies on the same card: cuBLAS and cuDNN in bf16, int8 and fp8 products, torchao.

Times are those of device events around runs of calls; inputs are rotated, so that none is in the L2 cache because the call before
left it there. The rivals `int8` and `fp8` are given quantized inputs, which ours makes from bf16 in every call.
"""

import copy
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.bench import models
from halfbyte.bench.layers import SPECS, Case, conv_case, linear_case
from halfbyte.bench.synthetic import float_model, packed_model, packed_twin
from halfbyte.bench.timing import Effort, medians
from halfbyte.recipe import PRESETS

Row = dict[str, Any]
ROTATED = 64 << 20  # bytes of inputs that calls go through in turn, more than an L2 cache holds

# M, K, N
LINEAR = ((4096, 3072, 12288), (4608, 3072, 3072), *((rows, 3072, 3072) for rows in (1, 8, 16, 32, 64)))
# batch, channels in, channels out, side, kernel, stride: SDXL's
CONV = ((2, 320, 320, 128, 3, 1), (2, 640, 640, 64, 3, 1), (2, 1280, 1280, 32, 3, 1), (2, 640, 320, 128, 1, 1))
SMOKE_LINEAR, SMOKE_CONV = ((3, 64, 48),), ((1, 16, 32, 4, 3, 1),)
LIMIT_SIZE = 8192  # of the product that shows how fast the card multiplies int8


def run(device: str, smoke: bool, effort: Effort, progress: Callable[[str, int, int], None] | None = None) -> list[Row]:
    """Rows as `bench.run.run` gives them, for layers and for a compiled pair of FLUX blocks.

    Args:
        device: "cuda", or "cpu" with Triton's interpreter (with `smoke`).
    """
    linear, conv = (SMOKE_LINEAR, SMOKE_CONV) if smoke else (LINEAR, CONV)
    cases: list[tuple[str, Callable[[], list[Row]]]] = []
    limit = None if smoke else int8_limit()
    cases += [(f"linear {shape}", lambda s=shape: _layer(linear_case(*s), device, effort, limit)) for shape in linear]  # type: ignore[misc]
    cases += [(f"conv {sizes}", lambda s=sizes: _layer(conv_case(*s), device, effort, limit)) for sizes in conv]  # type: ignore[misc]
    if not smoke:
        cases.append(("flux, compiled", lambda: _flux(effort)))
    rows: list[Row] = []
    for done, (title, measure) in enumerate(cases):
        if progress:
            progress(title, done, len(cases))
        rows += measure()
    return rows


def int8_limit() -> float:
    """Integer operations a second of the card's int8 matrix units in one large product (a multiply-add is two)."""
    a, b = (torch.randint(-128, 128, (LIMIT_SIZE, LIMIT_SIZE), dtype=torch.int8, device="cuda") for _ in "ab")
    seconds = event_medians({"limit": lambda _: torch._int_mm(a, b.t())}, [a], Effort())["limit"]
    return 2 * LIMIT_SIZE**3 / seconds


@torch.inference_mode()
def event_medians(runs: dict[str, Callable[[Tensor], object]], inputs: Sequence[Tensor], effort: Effort) -> dict[str, float]:
    """Median seconds of one call of each contestant, taking turns over rotated inputs."""
    if not inputs[0].is_cuda:
        return medians({name: partial(run, inputs[0]) for name, run in runs.items()}, effort)
    calls = {name: max(1, round(effort.least / max(_timed(run, inputs, 3), 1e-7))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(effort.rounds):
        for name, run in runs.items():
            seconds[name].append(_timed(run, inputs, calls[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _timed(run: Callable[[Tensor], object], inputs: Sequence[Tensor], calls: int) -> float:
    """Seconds a call, between two events of the device; a call before them warms up."""
    run(inputs[-1])
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in range(calls):
        run(inputs[index % len(inputs)])
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def _layer(case: Case, device: str, effort: Effort, limit: float | None) -> list[Row]:
    x = case.x.to(device)
    copies = max(1, min(64, ROTATED // max(1, x.nbytes))) if device == "cuda" else 1
    inputs = [x.clone() for _ in range(copies)]
    packed = {name: packed_twin(case.layer, spec).to(device) for name, spec in SPECS.items()}
    runs: dict[str, Callable[[Tensor], object]] = dict(packed)
    if device == "cuda":
        runs |= {f"{name}, graph": _graphed(layer, x) for name, layer in packed.items()}
    others = _rivals(case.layer, x)
    seconds = event_medians(runs | others, inputs, effort)
    plain = 2 * case.layer.weight.numel()
    return [
        {
            "case": case.name,
            "contestant": name,
            "seconds": took,
            "tops": case.operations / took / 1e12,
            "share_of_limit": case.operations / took / limit if limit else None,
            "ratio_to": {other: seconds[other] / took for other in others if other != name},
            "weight_bytes_of_bf16": sum(b.nbytes for b in packed[name].buffers()) / plain if name in packed else None,
        }
        for name, took in seconds.items()
    ]


def _graphed(layer: nn.Module, x: Tensor) -> Callable[[Tensor], object]:
    """A call replayed from a CUDA graph: what is left when Python and launches cost nothing."""
    given = x.clone()
    with torch.inference_mode():
        layer(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(given)

    def replay(one: Tensor) -> None:
        given.copy_(one)
        graph.replay()

    return replay


def _rivals(layer: Any, x: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """The float layer in bf16; for linear layers also int8 and fp8 products of given operands, and torchao where installed."""
    made = copy.deepcopy(layer).to(x.device, torch.bfloat16).to(memory_format=torch.channels_last)
    found: dict[str, Callable[[Tensor], object]] = {"torch bf16": made}
    if not isinstance(layer, nn.Linear) or not x.is_cuda:
        return found
    weight, rows = made.weight.detach(), max(17, x.shape[0])  # _int_mm takes more than 16 rows
    a = torch.randint(-128, 128, (rows, x.shape[1]), dtype=torch.int8, device=x.device)
    b = torch.randint(-128, 128, weight.shape, dtype=torch.int8, device=x.device)
    if a.shape[0] % 8 == 0 or x.shape[0] <= 16:
        found["int8 (_int_mm)"] = lambda _: torch._int_mm(a, b.t())
    if torch.cuda.get_device_capability() >= (8, 9) and x.shape[0] % 16 == 0:
        one = torch.ones((), device=x.device)
        wide, narrow = weight.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn)
        found["fp8 (_scaled_mm)"] = lambda _: torch._scaled_mm(narrow, wide.t(), one, one, out_dtype=torch.bfloat16)
    return found | _torchao(made)


def _torchao(layer: nn.Linear) -> dict[str, Callable[[Tensor], object]]:
    """torchao's 4-bit weights and its dynamic int8, where it is installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    found: dict[str, Callable[[Tensor], object]] = {}
    for name, config in {"torchao int4": Int4WeightOnlyConfig(), "torchao int8": Int8DynamicActivationInt8WeightConfig()}.items():
        model = nn.Sequential(copy.deepcopy(layer))
        quantize_(model, config)
        found[name] = torch.compile(model, mode="max-autotune-no-cudagraphs")
    return found


def _flux(effort: Effort) -> list[Row]:
    """One double and one single block of FLUX at 1024x1024, everything compiled."""
    subject, made = models.SUBJECTS["flux"], {}
    for name in SPECS:
        made[name] = packed_model(subject.build, PRESETS[name])
    made["torch bf16"] = float_model(subject.build, torch.bfloat16)
    arguments = {
        name: value.cuda() if isinstance(value, Tensor) else value for name, value in subject.arguments(torch.bfloat16).items()
    }
    runs = {name: _bound(torch.compile(model.cuda(), fullgraph=True), arguments) for name, model in made.items()}
    seconds = event_medians(runs, [arguments["hidden_states"]], effort)
    return [
        {
            "case": "flux, compiled",
            "about": subject.about,
            "contestant": name,
            "seconds": took,
            "ratio_to": {} if name == "torch bf16" else {"torch bf16": seconds["torch bf16"] / took},
            "weight_bytes_of_bf16": None,
        }
        for name, took in seconds.items()
    ]


def _bound(model: Any, arguments: dict[str, Any]) -> Callable[[Tensor], object]:
    return lambda x: model(**{**arguments, "hidden_states": x})
