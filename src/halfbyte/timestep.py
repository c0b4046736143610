"""Which timestep a denoiser is at: set by a hook on its forward, read by layers that keep a table over time."""

import bisect
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from halfbyte.errors import CalibrationError

ARGUMENTS = ("timestep", "timesteps", "t")


def timestep_argument(denoiser: nn.Module) -> tuple[str, int]:
    """Name and position of the timestep among the arguments of a denoiser's forward.

    Raises:
        CalibrationError: when no argument is named timestep, timesteps or t.
    """
    parameters = list(inspect.signature(denoiser.forward).parameters)
    name = next((argument for argument in ARGUMENTS if argument in parameters), None)
    if name is None:
        raise CalibrationError(
            f"{type(denoiser).__name__}.forward({', '.join(parameters)}) has no argument named {', '.join(ARGUMENTS)}"
        )
    return name, parameters.index(name)


class TimestepState:
    """The current timestep of one denoiser.

    `attach` hooks the denoiser; from then on `value` is the timestep of the call under way, the largest one where a batch mixes
    several. Layers hold a reference to the state and look their row up with `row`. A deep copy of the denoiser follows a copy of
    the state.

    Args:
        calibrated: ascending timesteps that the layers' tables have an entry for.
    """

    def __init__(self, calibrated: Sequence[float] = ()) -> None:
        self.value: float | None = None
        self.calibrated = tuple(calibrated)
        self._argument: tuple[str, int] | None = None  # name and position

    def attach(self, denoiser: nn.Module) -> RemovableHandle:
        """Follow the timestep argument of a denoiser's forward.

        Raises:
            CalibrationError: when forward has no argument named timestep, timesteps or t.
        """
        self._argument = timestep_argument(denoiser)
        return denoiser.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self._argument  # type: ignore[misc]
        value = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if value is not None:
            self.value = float(value.max()) if isinstance(value, torch.Tensor) else float(value)

    def row(self, calibrated: Sequence[float]) -> int:
        """Index of the nearest calibrated timestep at or above the current one; the last one where none is above.

        Args:
            calibrated: ascending timesteps.
        Raises:
            CalibrationError: before the first call of the denoiser, or when the table is empty.
        """
        if self.value is None:
            raise CalibrationError("no timestep is known yet: the denoiser has not been called since its hook was attached")
        if not calibrated:
            raise CalibrationError("the table of calibrated timesteps is empty; calibrate the model first")
        return min(bisect.bisect_left(calibrated, self.value), len(calibrated) - 1)
