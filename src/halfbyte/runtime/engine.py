"""The C++ engine (csrc/) as torch operators that `torch.compile` knows.

    halfbyte::linear    x (..., K)        -> (..., N)             in the dtype of x
    halfbyte::conv2d    x (B, C, H, W)    -> (B, N, H', W')       in the dtype of x; channels-last or contiguous, as asked
    halfbyte::norm_conv2d   the same of SiLU(group norm(x + shift)), which is nowhere kept
    halfbyte::attention query, key, value (B, H, tokens, channels) -> (B, H, L, E)     in the dtype of the query
    halfbyte::gelu      x (...)           -> the same            by tanh
    halfbyte::geglu     x (..., 2 C)      -> (..., C)            exact
    halfbyte::group_norm    x (N, C, ...) -> the same            channels innermost in memory; SiLU after it, if asked for
    halfbyte::pack      codes, multipliers  -> (bytes,)          uint8: the weights of both, re-ordered

The first three quantize their input, multiply exactly in integers with weights that stay 4-bit in memory, scale and add the bias.
A row of a linear input, or an image of a convolution, that holds a NaN or an infinity comes out as NaN, and no other does.

The engine links no torch: tensors cross as addresses. What it must be able to rely on (device, dtype, strides) is checked or made
here; sizes are compared in the bindings. Threads: as many as `torch.get_num_threads()` says, in the OpenMP pool torch has loaded.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, PackedError
from halfbyte.formats import get_grid
from halfbyte.recipe import WeightSpec
from halfbyte.runtime.geometry import output_size

try:
    import halfbyte.runtime._engine as _engine
except ModuleNotFoundError:
    MISSING: str | None = "it was not built; run pip install . in halfbyte's folder, with a C++ compiler at hand"
except ImportError as error:  # the stand-in says what was missing when halfbyte was installed
    MISSING = str(error)
else:
    MISSING = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE_OUTPUT = 4 << 20  # bytes
LIMIT_SECONDS = 0.2  # how long the machine's integer limit is measured

LIBRARY = torch.library.Library("halfbyte", "DEF")
_WEIGHTS = "Tensor tiles, Tensor weight_scale, Tensor? bias, int[] format"
_FIXED = "Tensor? scale=None, Tensor? zero=None"  # of the input, one value each, where they were calibrated
LIBRARY.define(f"linear(Tensor x, {_WEIGHTS}, {_FIXED}) -> Tensor")
LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, float factor, Tensor? bias=None) -> Tensor")
LIBRARY.define("gelu(Tensor x) -> Tensor")
LIBRARY.define("geglu(Tensor x) -> Tensor")
LIBRARY.define("group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float epsilon, bool silu=False) -> Tensor")
_CONV2D = f"int[] sizes, bool channels_last, {_WEIGHTS}, {_FIXED}"
_NORM = "int groups, Tensor? gain, Tensor? offset, float epsilon, Tensor? shift"
LIBRARY.define(f"conv2d(Tensor x, {_CONV2D}) -> Tensor")
LIBRARY.define(f"norm_conv2d(Tensor x, {_NORM}, {_CONV2D}) -> Tensor")


def _fresh(y: Tensor) -> Tensor:
    """An output about to be written, on large pages of memory where it has many."""
    if y.nbytes >= LARGE_OUTPUT:
        _engine.expect_writes(y.data_ptr(), y.nbytes)
    return y


def _linear(x: Tensor, *weights: Any) -> Tensor:
    y = _fresh(_linear_output(x, *weights))
    if y.numel():
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        count, channels = rows.shape
        _call(rows, (count, 1, 1, channels, *[rows.stride(0)] * 3), y, *weights)
    return y


def _linear_output(x: Tensor, _tiles: Tensor, weight_scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _conv2d(x: Tensor, sizes: Sequence[int], channels_last: bool, *weights: Any, **norm: Any) -> Tensor:
    y = _fresh(_conv2d_output(x, sizes, True))
    if y.numel():
        images = x.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        strides = (height * width * channels, width * channels, channels)  # those of axes of length 1 may say anything
        _call(images, (count, height, width, channels, *strides), y, *weights, **norm)
    return y if channels_last else y.contiguous()


def _norm_conv2d(
    x: Tensor,
    groups: int,
    gain: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    shift: Tensor | None,
    sizes: Sequence[int],
    channels_last: bool,
    *weights: Any,
) -> Tensor:
    """gain, offset: (C,). shift: (B, C), added to the pixels of its image before the norm."""
    if any(one is not None and one.shape != x.shape[1:2] for one in (gain, offset)):
        raise PackedError(f"group norm of {x.shape[1]} channels takes as many gains and offsets")
    if shift is not None and shift.shape != x.shape[:2]:
        raise PackedError(f"a shift of {x.shape[1]} channels is one of each image, {tuple(x.shape[:2])}; got {tuple(shift.shape)}")
    given = [None if one is None else one.float().contiguous() for one in (gain, offset, shift)]
    norm = groups, 1, *(0 if one is None else one.data_ptr() for one in given)
    return _conv2d(x, sizes, channels_last, *weights, norm=norm, epsilon=epsilon)


def _norm_conv2d_output(x: Tensor, _groups: int, _gain: Any, _offset: Any, _epsilon: float, _shift: Any, *rest: Any) -> Tensor:
    return _conv2d_output(x, *rest)


def _conv2d_output(x: Tensor, sizes: Sequence[int], channels_last: bool, *_: Any) -> Tensor:
    size = output_size(x.shape[2:], sizes[2:4], sizes[4:6], sizes[6:8], sizes[8:12])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], sizes[1], *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _call(
    x: Tensor,
    extent: tuple[int, ...],
    y: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    format: Sequence[int],
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    norm: tuple[int, ...] | None = None,
    epsilon: float = 0.0,
) -> None:
    """One call of the engine.

    Args:
        x, y: channels innermost. extent: images, height, width and channels of x, and the strides of the first three.
        norm: of x before it is quantized: groups, whether SiLU follows, addresses of gain, offset and shift.
    """
    outputs = weight_scale.shape[0]
    if weight_scale.dtype != torch.float32 or not weight_scale.is_contiguous() or weight_scale.numel() != outputs:
        raise PackedError(f"weight scales must be float32 ({outputs}, 1); got {weight_scale.dtype} {tuple(weight_scale.shape)}")
    if bias is not None and (bias.dtype not in DTYPES or not bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    fixed = None if scale is None else (scale.item(), 0 if zero is None else zero.item())
    try:
        _engine.forward(
            (x.data_ptr(), DTYPES[x.dtype], *extent),
            format,
            fixed,
            tiles.data_ptr(),
            tiles.numel(),
            weight_scale.data_ptr(),
            (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype]),
            (y.data_ptr(), DTYPES[y.dtype], outputs),
            torch.get_num_threads(),
            norm,
            epsilon,
        )
    except ValueError as error:
        raise PackedError(f"the C++ engine refuses: {error}") from error


def _attention(query: Tensor, key: Tensor, value: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
    """bias: float32, in steps of scores, broadcast to the scores; its last axis is that of the keys."""
    given = (query, key, value)
    if any(one.ndim != 4 or one.dtype not in DTYPES for one in given) or len({one.shape[:2] for one in given}) > 1:
        shapes = ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in given)
        raise PackedError(f"attention takes floats (images, heads, tokens, channels), alike in the first two; got {shapes}")
    y = _fresh(_attention_output(query, key, value))
    scores = (*query.shape[:3], key.shape[2])
    if bias is not None and (bias.dtype != torch.float32 or bias.shape[-1] != scores[-1]):
        raise PackedError(f"attention's bias must be float32 (..., {scores[-1]}); got {bias.dtype} {tuple(bias.shape)}")
    bias = None if bias is None else bias.contiguous().expand(scores)
    place = (0, 0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride()[:3])
    heads = [one if one.stride(-1) == 1 else one.contiguous() for one in given]
    q, k, v, o = ((one.data_ptr(), DTYPES[one.dtype], *one.shape[2:], *one.stride()[:3]) for one in (*heads, y))
    try:
        _engine.attend(query.shape[0], query.shape[1], q, k, v, factor, place, o, torch.get_num_threads())
    except ValueError as error:
        raise PackedError(f"the C++ engine refuses: {error}") from error
    return y


def _attention_output(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Tokens before heads in memory: what joins the heads again is then a view."""
    images, heads, tokens = query.shape[:3]
    return query.new_empty((images, tokens, heads, value.shape[-1])).transpose(1, 2)


def _gelu(x: Tensor) -> Tensor:
    y = _fresh(_gelu_output(x))
    given = x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)  # y has no gaps
    if x.dtype not in DTYPES:
        raise PackedError(f"GELU takes floats, got {x.dtype}")
    _engine.gelu(given.data_ptr(), DTYPES[x.dtype], x.numel(), y.data_ptr(), torch.get_num_threads())
    return y


def _gelu_output(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _geglu(x: Tensor) -> Tensor:
    if x.dtype not in DTYPES or x.shape[-1] % 2:
        raise PackedError(f"GEGLU takes floats (..., 2 C), got {x.dtype} {tuple(x.shape)}")
    y, given = _fresh(_geglu_output(x)), x.contiguous()
    width = y.shape[-1]
    if y.numel():
        _engine.geglu(given.data_ptr(), DTYPES[x.dtype], y.numel() // width, width, y.data_ptr(), torch.get_num_threads())
    return y


def _geglu_output(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, epsilon: float, silu: bool = False) -> Tensor:
    y = _fresh(_group_norm_output(x))
    if not x.movedim(1, -1).is_contiguous() or x.dtype not in DTYPES:
        raise PackedError(f"group norm takes floats with channels innermost in memory; got {x.dtype} with strides {x.stride()}")
    affine = [None if one is None else one.float().contiguous() for one in (weight, bias)]
    if any(one is not None and one.shape != x.shape[1:2] for one in affine):
        raise PackedError(f"group norm of {x.shape[1]} channels takes as many gains and offsets")
    places = [x.data_ptr(), *(0 if one is None else one.data_ptr() for one in affine), y.data_ptr()]
    extent = (x.shape[0], x[0, 0].numel() if len(x) else 0, x.shape[1], groups)
    try:
        _engine.group_norm(DTYPES[x.dtype], extent, epsilon, silu, places, torch.get_num_threads())
    except ValueError as error:
        raise PackedError(f"the C++ engine refuses: {error}") from error
    return y


def _group_norm_output(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)


LIBRARY.impl("linear", _linear, "CPU")
LIBRARY.impl("conv2d", _conv2d, "CPU")
LIBRARY.impl("norm_conv2d", _norm_conv2d, "CPU")
LIBRARY.impl("attention", _attention, "CPU")
LIBRARY.impl("gelu", _gelu, "CPU")
LIBRARY.impl("geglu", _geglu, "CPU")
LIBRARY.impl("group_norm", _group_norm, "CPU")
torch.library.register_fake("halfbyte::linear", _linear_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::conv2d", _conv2d_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::norm_conv2d", _norm_conv2d_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::attention", _attention_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::gelu", _gelu_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::geglu", _geglu_output, lib=LIBRARY)
torch.library.register_fake("halfbyte::group_norm", _group_norm_output, lib=LIBRARY)
linear, conv2d = torch.ops.halfbyte.linear.default, torch.ops.halfbyte.conv2d.default
norm_conv2d = torch.ops.halfbyte.norm_conv2d.default
attention = torch.ops.halfbyte.attention.default
gelu, geglu, group_norm = (getattr(torch.ops.halfbyte, name).default for name in ("gelu", "geglu", "group_norm"))


def weight_format(spec: WeightSpec) -> tuple[int, ...]:
    """A weight spec as the functions below take it: grid code, max_shift, subgroup, max_multiple."""
    return grid_code(get_grid(spec.grid).name), spec.max_shift, spec.subgroup, spec.max_multiple


def pack(codes: Tensor, multipliers: Tensor | None, sizes: Sequence[int], form: Sequence[int]) -> Tensor:
    """Codes and multipliers in the order the engine reads: uint8 (bytes,), which describe themselves.

    Args:
        codes, multipliers: as docs/format.md has them. sizes: of the layer (`cpu.Plan`). form: a `weight_format`.
    Raises:
        PackedError: when they are not on the CPU, have another size than the layer asks for, or a multiplier is too large.
    """
    if codes.device.type != "cpu":
        raise PackedError(f"the input is on the CPU and the layer's codes are on {codes.device}; move the model with .to('cpu')")
    with torch.inference_mode(False):
        try:
            tiles = torch.empty(_engine.packed_bytes(sizes, form), dtype=torch.uint8)
            stored = codes.contiguous(), None if multipliers is None else multipliers.contiguous()
            _engine.pack(sizes, form, *stored, tiles, torch.get_num_threads())
        except ValueError as error:
            raise PackedError(f"the stored codes cannot be used: {error}") from error
    return tiles


def _pack_output(codes: Tensor, _multipliers: Tensor | None, *weight: Any) -> Tensor:
    return codes.new_empty(_engine.packed_bytes(*weight))


LIBRARY.define("pack(Tensor codes, Tensor? multipliers, int[] sizes, int[] form) -> Tensor")
LIBRARY.impl("pack", pack, "CPU")
torch.library.register_fake("halfbyte::pack", _pack_output, lib=LIBRARY)


def unpack(tiles: Tensor, codes: Tensor, multipliers: Tensor | None) -> None:
    """The inverse of `pack`, into tensors of the right sizes."""
    _engine.unpack(tiles.cpu(), codes, multipliers)


def search_scales(matrix: Tensor, form: Sequence[int], factors: Sequence[float]) -> Tensor:
    """`quantizers.search_scale` of contiguous rows (O, K), norm 2, among the given factors of the absmax scale: float32 (O, 1)."""
    scale = torch.empty(len(matrix), 1, dtype=torch.float32)
    given = torch.tensor(factors, dtype=torch.float32)
    _engine.search_scales(_rows(matrix), form, given, scale.view(-1), torch.get_num_threads())
    return scale


def round_weights(
    matrix: Tensor, form: Sequence[int], scale: Tensor, codes: Tensor, multipliers: Tensor | None
) -> tuple[float, float]:
    """`quantizers.quantize_weight` of contiguous finite rows (O, K) into tensors of the right sizes, as they are stored.

    Returns:
        The sums of squares of the weights and of what rounding changed.
    """
    stored = scale.view(-1), codes, multipliers
    return _engine.round_weights(_rows(matrix), form, *stored, torch.get_num_threads())


def _rows(matrix: Tensor) -> tuple[int, int, int, int]:
    return matrix.data_ptr(), DTYPES[matrix.dtype], *matrix.shape


@cache
def knows(grid: str) -> bool:
    """Whether the engine has a grid's table."""
    try:
        _engine.grid_code(grid)
    except ValueError:
        return False
    return True


def grid_code(name: str) -> int:
    """The engine's number of a grid."""
    return _engine.grid_code(name)


def longest_k() -> int:
    """The longest dot product whose sum surely fits int32."""
    return _engine.LONGEST_K


def check() -> None:
    """Raises HalfbyteError when HALFBYTE_ISA names an instruction set that is none, or that this machine lacks."""
    try:
        _engine.isa()
    except ValueError as error:
        raise HalfbyteError(str(error)) from error


def instruction_sets() -> list[str]:
    """What HALFBYTE_ISA may say on this machine, the slowest first."""
    return _engine.available_isas()


def describe() -> str:
    """The instruction set and the threads in words."""
    others = ", ".join(name for name in instruction_sets() if name != _engine.isa())
    return f"instructions {_engine.isa()} (also here: {others}); {torch.get_num_threads()} threads of {_engine.parallel_runtime()}"


def integer_limit() -> float:
    """Integer operations a second (a multiply-add is two) that this machine's instructions reach with all of torch's threads."""
    return 2 * _engine.integer_limit(LIMIT_SECONDS) * torch.get_num_threads()
