"""The GPU engine against what else multiplies on the same card: cuBLAS and cuDNN in bf16, int8 and fp8 products, torchao.

Every contestant is timed by device events around a CUDA graph of its calls, so neither Python nor launches count. The calls go
through copies of input and layer in turn, of more bytes than an L2 cache holds: in a model both come from memory. The rivals `int8`
and `fp8` are given quantized inputs, which ours makes from bf16 in every call.
"""

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.bench import flux
from halfbyte.bench.layers import SPECS, Case, conv_case, linear_case
from halfbyte.bench.synthetic import float_model, packed_model, packed_twin
from halfbyte.bench.timing import Effort, medians
from halfbyte.presets import PRESETS

Row = dict[str, Any]
Call = Callable[[Tensor], object]
ROTATED = 256 << 20  # bytes of inputs and weights that calls go through in turn, more than an L2 cache holds
COPIES = 24  # at most

# M, K, N
LINEAR = ((4096, 3072, 12288), (4608, 3072, 3072), *((rows, 3072, 3072) for rows in (1, 8, 16, 32, 64)))
# batch, channels in, channels out, side, kernel, stride: SDXL's
CONV = ((2, 320, 320, 128, 3, 1), (2, 640, 640, 64, 3, 1), (2, 1280, 1280, 32, 3, 1), (2, 640, 320, 128, 1, 1))
SMOKE_LINEAR, SMOKE_CONV = ((3, 64, 48),), ((1, 16, 32, 4, 3, 1),)
LIMIT_SIZE = 8192  # of the product that shows how fast the card multiplies int8
BFLOAT16 = "torch bf16"


def run(device: str, smoke: bool, effort: Effort, progress: Callable[[str, int, int], None] | None = None) -> list[Row]:
    """Rows as `bench.run.run` gives them, for layers and for a compiled pair of blocks of FLUX's shape.

    Args:
        device: "cuda", or "cpu" with Triton's interpreter (with `smoke`).
    """
    linear, conv = (SMOKE_LINEAR, SMOKE_CONV) if smoke else (LINEAR, CONV)
    limit = None if smoke else int8_limit()
    cases = [(f"linear {shape}", partial(_layer, partial(linear_case, *shape), device, effort, limit)) for shape in linear]
    cases += [(f"conv {sizes}", partial(_layer, partial(conv_case, *sizes), device, effort, limit)) for sizes in conv]
    cases.append(("flux, compiled", partial(_flux, device, smoke, effort)))
    rows: list[Row] = []
    torch.backends.cudnn.benchmark = True  # the rival's best
    for done, (title, measure) in enumerate(cases):
        if progress:
            progress(title, done, len(cases))
        rows += measure()
    return rows


def int8_limit() -> float:
    """Integer operations a second of the card's int8 matrix units in one large product (a multiply-add is two)."""
    a, b = (torch.randint(-128, 128, (LIMIT_SIZE, LIMIT_SIZE), dtype=torch.int8, device="cuda") for _ in "ab")
    seconds = device_medians({"limit": [lambda _: torch._int_mm(a, b.t())]}, [a], Effort())["limit"]
    return 2 * LIMIT_SIZE**3 / seconds


@torch.inference_mode()
def device_medians(contestants: dict[str, Sequence[Call]], inputs: Sequence[Tensor], effort: Effort) -> dict[str, float]:
    """Median seconds of one call of each contestant, taking turns.

    Args:
        contestants: by name, copies of one thing.
        inputs: what they are called with, in turn.
    """
    if not inputs[0].is_cuda:
        return medians({name: partial(calls[0], inputs[0]) for name, calls in contestants.items()}, effort)
    count = max(len(inputs), *(len(calls) for calls in contestants.values()))
    graphs = {name: _graph(calls, inputs, count) for name, calls in contestants.items()}
    repeats = {name: max(1, round(effort.least / max(_timed(graph, 2), 1e-7))) for name, graph in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(effort.rounds):
        for name, graph in graphs.items():
            seconds[name].append(_timed(graph, repeats[name]) / count)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _graph(calls: Sequence[Call], inputs: Sequence[Tensor], count: int) -> torch.cuda.CUDAGraph:
    """`count` calls in one CUDA graph; calls before it compile, tune and allocate what is allocated once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0](inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)](inputs[index % len(inputs)])
    return graph


def _timed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Seconds a replay, between two events of the device; a replay before them warms up."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def seconds_with_launches(call: Call, x: Tensor, calls: int = 50) -> float:
    """Seconds of a call as Python makes it, one after another."""
    with torch.inference_mode():
        call(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(x)
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _layer(make: Callable[[], Case], device: str, effort: Effort, limit: float | None) -> list[Row]:
    case = make()
    x, plain = case.x.to(device), 2 * case.layer.weight.numel()
    copies = max(1, min(COPIES, ROTATED // (x.nbytes + plain // 4))) if device == "cuda" else 1
    ours = {name: [packed_twin(case.layer, spec).to(device) for _ in range(copies)] for name, spec in SPECS.items()}
    others = _rivals(case.layer, x, max(1, min(copies, ROTATED // (x.nbytes + plain))))
    everyone: dict[str, Sequence[Call]] = {**ours, **others}
    seconds = device_medians(everyone, [x.clone() for _ in range(copies)], effort)
    return [
        {
            "case": case.name,
            "contestant": name,
            "seconds": took,
            "seconds_with_launches": seconds_with_launches(everyone[name][0], x) if device == "cuda" else None,
            "tops": case.operations / took / 1e12,
            "share_of_limit": case.operations / took / limit if limit else None,
            "ratio_to": {other: seconds[other] / took for other in others if other != name},
            "weight_bytes_of_bf16": sum(b.nbytes for b in ours[name][0].buffers()) / plain if name in ours else None,
        }
        for name, took in seconds.items()
    ]


def _rivals(layer: Any, x: Tensor, copies: int) -> dict[str, Sequence[Call]]:
    """The float layer in bf16; for linear layers also int8 and fp8 products of given operands, and torchao where installed."""
    made = [copy.deepcopy(layer).to(x.device, torch.bfloat16).to(memory_format=torch.channels_last) for _ in range(copies)]
    found: dict[str, Sequence[Call]] = {BFLOAT16: made}
    if not isinstance(layer, nn.Linear) or not x.is_cuda:
        return found
    weights, rows = [one.weight.detach() for one in made], max(32, x.shape[0])  # _int_mm takes more than 16 rows
    a = torch.randint(-128, 128, (rows, x.shape[1]), dtype=torch.int8, device=x.device)
    integers = [torch.randint_like(weight, -128, 128, dtype=torch.int8) for weight in weights]
    found["int8 (_int_mm)"] = [lambda _, b=b: torch._int_mm(a, b.t()) for b in integers]  # type: ignore[misc]
    if torch.cuda.get_device_capability() >= (8, 9) and not torch.version.hip:
        one, narrow = torch.ones((), device=x.device), torch.randn(rows, x.shape[1], device=x.device).to(torch.float8_e4m3fn)
        found["fp8 (_scaled_mm)"] = [partial(_float8, narrow, weight.to(torch.float8_e4m3fn), one) for weight in weights]
    return found | _torchao(made[0])


def _float8(a: Tensor, weight: Tensor, one: Tensor, _: Tensor) -> Tensor:
    return torch._scaled_mm(a, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _torchao(layer: nn.Linear) -> dict[str, Sequence[Call]]:
    """torchao's 4-bit weights and its dynamic int8, where it is installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    found: dict[str, Sequence[Call]] = {}
    for name, config in {"torchao int4": Int4WeightOnlyConfig(), "torchao int8": Int8DynamicActivationInt8WeightConfig()}.items():
        model = nn.Sequential(copy.deepcopy(layer))
        quantize_(model, config)
        found[name] = [torch.compile(model)]
    return found


def _flux(device: str, smoke: bool, effort: Effort) -> list[Row]:
    """One double and one single block of FLUX's shape at 1024x1024, everything compiled."""
    sizes = (64, 2) if smoke else (flux.WIDTH, flux.HEADS)
    given = {name: value.to(device) for name, value in flux.arguments(*sizes, *((6, 3) if smoke else ())).items()}

    def build() -> nn.Module:
        return flux.FluxPair(*sizes)

    models = {name: packed_model(build, PRESETS[name]) for name in SPECS}
    models[BFLOAT16] = float_model(build, torch.bfloat16)
    runs = {name: [_bound(_compiled(model.to(device)), given)] for name, model in models.items()}
    seconds = device_medians(runs, [given["hidden_states"]], effort)  # type: ignore[arg-type]
    return [
        {
            "case": "flux, compiled",
            "about": "one double-stream and one single-stream block of FLUX's shape, 4096 + 512 tokens",
            "contestant": name,
            "seconds": took,
            "ratio_to": {} if name == BFLOAT16 else {BFLOAT16: seconds[BFLOAT16] / took},
            "weight_bytes_of_bf16": None,
        }
        for name, took in seconds.items()
    ]


def _compiled(model: nn.Module) -> Callable[..., object]:
    cuda = next(model.parameters()).is_cuda
    return torch.compile(model, fullgraph=True, backend="inductor" if cuda else "eager")


def _bound(model: Any, arguments: dict[str, Any]) -> Call:
    return lambda x: model(**{**arguments, "hidden_states": x})


def bars(rows: list[Row]) -> list[dict[str, Any]]:
    """What the engine is meant to reach on an H200-class card, and whether it does, for every row of ours."""
    found = []
    for row in rows:
        if row["contestant"] not in SPECS:
            continue
        for what, value, least in _wanted(row):
            reached = value <= least if what == "weights of bf16" else value >= least
            found.append(
                {
                    "case": row["case"],
                    "contestant": row["contestant"],
                    "what": what,
                    "value": value,
                    "bar": least,
                    "reached": reached,
                }
            )
    return found


def _wanted(row: Row) -> list[tuple[str, float, float]]:
    """(what, the value found, the bar)."""
    kind, _, sizes = row["case"].partition(" ")
    faster, wanted = row["ratio_to"].get(BFLOAT16), []
    if kind == "linear":
        few = int(sizes.split("x")[0]) <= 64
        wanted = [("x torch bf16", faster, 2.0 if few else 1.5)]
        wanted += [] if few or row["share_of_limit"] is None else [("of int8 limit", row["share_of_limit"], 0.6)]
    elif kind == "flux," or sizes.startswith("3x3"):
        wanted = [("x torch bf16", faster, 1.3)]
    if row["weight_bytes_of_bf16"] is not None:
        wanted.append(("weights of bf16", row["weight_bytes_of_bf16"], 0.28))
    return wanted
