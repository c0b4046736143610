"""Trainable layers that hold several weights and choose one of them by the timestep.

This is what a timestep-aware fine-tune leaves behind. `weight_sets()` are the float weights, all under the one `weight_scale` of
the layer; `choice[t]` is the number of the set that serves timestep t = 0..T-1 of the scheduler. A denoiser call may mix timesteps:
rows are grouped by their choice, each group meets its own weight, and nothing is computed twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, PackedError
from halfbyte.layers import FAKE_QUANT, FakeQuant, apply_layer
from halfbyte.quantizers import QuantizedWeight
from halfbyte.timestep import timestep_argument


class TimestepRows:
    """The timestep of every row of the denoiser's call under way, as an index 0..count-1.

    A forward pre-hook; layers hold a reference to it. Deep copies of a model get one of their own.

    Args:
        count: timesteps of the scheduler, T.
        factor: of the denoiser's timestep argument to that index: 1, or T where it takes fractions of 1.
    """

    def __init__(self, count: int, factor: float = 1.0) -> None:
        self.count, self.factor = count, factor
        self.index: Tensor | None = None  # int64 (rows,), or (1,) where all rows share one
        self.place: tuple[str, int] | None = None

    def attach(self, denoiser: nn.Module) -> Any:
        """Follow the calls of a denoiser; returns the hook's handle."""
        self.place = timestep_argument(denoiser)
        return denoiser.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.place is not None
        name, position = self.place
        value = kwargs[name] if name in kwargs else args[position]
        exact = torch.as_tensor(value).detach().reshape(-1).double() * self.factor
        self.index = (exact - 1e-6).ceil().clamp(0, self.count - 1).long()  # at or above; 1e-6 forgives the factor's rounding

    def spread(self, rows: int) -> Tensor:
        """The index for every row of a layer's input; rows of one image or frame sequence are neighbours.

        Raises:
            CalibrationError: before the first call, or when the rows are no multiple of the timesteps.
        """
        if self.index is None:
            raise CalibrationError("no timestep is known yet: the layer was called outside its denoiser")
        if rows % len(self.index):
            raise CalibrationError(f"a layer got {rows} rows in a call with {len(self.index)} timesteps; they cannot be told apart")
        return self.index.repeat_interleave(rows // len(self.index))


def by_choice(x: Tensor, choice: Tensor, operation: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`operation(rows, number)` on the rows of x that chose each number, in the order of x.

    Args:
        x: (rows, ...). choice: integers (rows,).
    """
    numbers = choice.unique().tolist()
    if len(numbers) == 1:
        return operation(x, numbers[0])
    places = [(choice == number).nonzero().flatten().to(x.device) for number in numbers]
    parts = [operation(x.index_select(0, place), number) for place, number in zip(places, numbers, strict=True)]
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


class TimedFakeQuant(FakeQuant):
    """A trainable layer whose weight depends on the timestep; mixed into the torch layer class that names its kind."""

    extra_weights: nn.ParameterList  # the sets after the first, which is `weight`
    choice: Tensor  # uint8 (T,): the number of the set that serves each timestep
    rows: TimestepRows

    def weight_sets(self) -> list[Tensor]:
        """The float weights, in the order of their numbers."""
        return [self.weight, *self.extra_weights]

    def quantized_weights(self) -> list[QuantizedWeight]:
        """Levels, shifts and scales of every weight set."""
        return [self.quantized(weight) for weight in self.weight_sets()]

    def quantized_weight(self) -> QuantizedWeight:
        raise PackedError(f"this {type(self).__name__} holds {len(self.weight_sets())} weights; use quantized_weights()")

    def forward(self, x: Tensor) -> Tensor:
        sets = self.weight_sets()

        def operation(part: Tensor, number: int) -> Tensor:
            return apply_layer(self, part, self.rounded_weight(sets[number]), self.bias)

        chosen = self.choice[self.rows.spread(x.shape[0]).to(self.choice.device)]
        return by_choice(self.rounded_input(x), chosen, operation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.weight_sets())} weights"


TIMED: dict[type, type[TimedFakeQuant]] = {
    kind: type(f"Timed{layer.__name__}", (TimedFakeQuant, layer), {"__doc__": f"{layer.__name__} with weights chosen by timestep."})
    for kind, layer in FAKE_QUANT.items()
}


def with_weight_sets(layer: FakeQuant, weights: Sequence[Tensor], choice: Tensor, rows: TimestepRows) -> FakeQuant:
    """A trainable layer like the given one, under the same scales, with other weights.

    Args:
        weights: one for each number in `choice`; with a single one the layer is an ordinary trainable layer.
        choice: integers (T,).
    """
    kind = next(kind for kind in FAKE_QUANT if isinstance(layer, kind))
    made: Any = (FAKE_QUANT if len(weights) == 1 else TIMED)[kind].from_float(layer, layer.spec, layer.weight_scale)  # type: ignore[arg-type]
    made.input_scale = layer.input_scale
    made.weight = nn.Parameter(weights[0].detach().clone(), requires_grad=False)
    if len(weights) > 1:
        made.extra_weights = nn.ParameterList(nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in weights[1:])
        made.register_buffer("choice", choice.to(torch.uint8))
        made.rows = rows
    return made  # type: ignore[no-any-return]


def timestep_factor(largest: float, count: int) -> float:
    """The factor of `TimestepRows`, from the largest timestep a denoiser was seen to take."""
    return float(count) if largest <= 1 < count else 1.0


def sinusoidal(index: Tensor, width: int) -> Tensor:
    """Sine and cosine features of timesteps (Vaswani et al. 2017), float32 (rows, width)."""
    frequencies = torch.exp(torch.arange(width // 2, device=index.device) * (-math.log(10000.0) / (width // 2)))
    angles = index.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
