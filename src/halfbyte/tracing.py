"""Which layers read the output of a SiLU, GELU or ReLU: followed through a run of the model, not guessed from its code."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
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
# fmt: on
JOINING = frozenset(("cat", "concat", "concatenate", "stack"))


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


def _tensors(result: Any) -> Iterable[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
