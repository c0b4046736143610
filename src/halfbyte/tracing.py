"""Which layers read the output of a SiLU, GELU or ReLU, and which a concatenation: followed through a run of the model, not guessed
from its code.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# fmt: off
ONE_SIDED = {
    "silu": "SiLU", "silu_": "SiLU", "gelu": "GELU", "relu": "ReLU", "relu_": "ReLU", "mish": "Mish", "hardswish": "Hardswish",
}
# Operations whose output holds values of their first argument, means of them, or zeros.
PASSING = frozenset((
    "reshape", "view", "view_as", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "movedim", "contiguous",
    "clone", "detach", "to", "type_as", "float", "half", "bfloat16", "__getitem__", "chunk", "split", "narrow", "select", "expand",
    "repeat", "repeat_interleave", "roll", "flip", "dropout", "dropout2d", "pad", "interpolate", "avg_pool1d", "avg_pool2d",
    "max_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle",
))
JOINING = frozenset(("cat", "concat", "concatenate", "stack"))
# Operations that leave the channels of a tensor in place, whichever axis they are on.
KEEPING = frozenset((
    "contiguous", "clone", "detach", "to", "type_as", "float", "half", "bfloat16", "dropout", "dropout2d", "interpolate",
    "avg_pool2d", "max_pool2d",
))
# fmt: on


class ActivationTrace(TorchFunctionMode):
    """Follows the outputs of one-sided functions through views, dropout, resampling and concatenation.

    A concatenation is one-sided when all its parts are. Anything else, sums and products included, ends the trace: the product of a
    GEGLU has two sides again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: Any = WeakIdKeyDictionary()

    def source(self, x: Tensor) -> str | None:
        """The function whose outputs these are, such as "SiLU"; None where they are not all of one-sided functions."""
        return self._sources.get(x)  # type: ignore[no-any-return]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        source = self._source_of(getattr(function, "__name__", ""), args)
        if source is not None:
            for tensor in _tensors(result):
                self._sources[tensor] = source
        return result

    def _source_of(self, name: str, args: tuple[Any, ...]) -> str | None:
        if name in ONE_SIDED:
            return ONE_SIDED[name]
        if name in PASSING and args and isinstance(args[0], Tensor):
            return self.source(args[0])
        if name in JOINING and args and isinstance(args[0], (tuple, list)):
            sources = [self.source(part) for part in args[0]]
            return sources[0] if all(sources) else None
        return None


class JoinTrace(TorchFunctionMode):
    """Follows concatenations: their axis, counted from the end, and the sizes of their parts along it.

    Parts that are concatenations along the same axis count with their own parts. What computes with the values ends the trace.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: Any = WeakIdKeyDictionary()

    def parts(self, x: Tensor, axis: int) -> tuple[int, ...]:
        """Sizes of the parts that were joined along an axis (negative); just its size where none were."""
        along, sizes = self._parts.get(x, (0, ()))
        return sizes if along == axis else (x.shape[axis],)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), getattr(function, "__name__", "")
        if not isinstance(result, Tensor) or not args:
            return result
        if name in KEEPING and isinstance(args[0], Tensor) and args[0] in self._parts and args[0].ndim == result.ndim:
            self._parts[result] = self._parts[args[0]]
        elif name in ("cat", "concat", "concatenate"):
            axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
            axis = axis if axis < 0 else axis - result.ndim
            joined = [part for part in args[0] if part.ndim == result.ndim]  # torch skips empty tensors of one axis
            self._parts[result] = (axis, tuple(size for part in joined for size in self.parts(part, axis)))
        return result


def find_concatenations(
    model: nn.Module, names: Iterable[str], run: Callable[[], object], axis: Callable[[nn.Module], int]
) -> dict[str, tuple[int, ...]]:
    """Which of the named layers read a concatenation along their channels, and the sizes of its parts.

    Args:
        run: runs the model once. axis: of a layer's channels in its input, negative.
    Returns:
        Sizes by name, two at least. A layer called more than once is in it where all its inputs have the same parts.
    """
    trace, seen = JoinTrace(), dict[str, set[tuple[int, ...]]]()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, set()).add(trace.parts(args[0], axis(layer)) if args else ())

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        with trace:
            run()
    finally:
        for handle in handles:
            handle.remove()
    alike = {name: next(iter(found)) for name, found in seen.items() if len(found) == 1}
    return {name: sizes for name, sizes in alike.items() if len(sizes) > 1}


def _tensors(result: Any) -> Iterable[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
