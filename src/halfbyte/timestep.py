"""Which timestep a denoiser is at, row by row where a batch mixes several: set by a hook on its forward, read by layers that keep
a table over time.
"""

import bisect
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    several. Layers hold a reference to the state and look their table's entry up: with `row` the one of `value`, with `rows` one
    for each row of their input. A deep copy of the denoiser follows a copy of the state.

    Args:
        calibrated: ascending timesteps that the layers' tables have an entry for.
    """

    def __init__(self, calibrated: Sequence[float] = ()) -> None:
        self.value: float | None = None
        self.calibrated = tuple(calibrated)
        self._argument: tuple[str, int] | None = None  # name and position
        self._times: Tensor | None = None  # (n,) of the call under way, where its timestep is a tensor of several
        self._entries: Tensor | None = None  # int64 (n,) on the CPU: their entries in the tables, once somebody asked

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
            self.set(value)

    def set(self, value: Tensor | float) -> None:
        """Be at a timestep, or at those of several samples, (n,)."""
        several = isinstance(value, Tensor) and value.numel() > 1
        self._times, self._entries = value.detach().reshape(-1) if several else None, None  # type: ignore[union-attr]
        self.value = float(value.max()) if isinstance(value, Tensor) else float(value)

    @property
    def current(self) -> Tensor | float | None:
        """What `set` was told last."""
        return self.value if self._times is None else self._times

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

    def rows(self, count: int) -> Tensor | None:
        """The entry of the tables for each of `count` rows of an input; None where one entry serves all.

        A row has the entry that it would have in a call of its own: the nearest calibrated timestep at or above its own. Where an
        input has more rows than the call has timesteps, neighbouring rows share one.

        Returns:
            int64 (count,) on the CPU.
        Raises:
            CalibrationError: when the rows are no multiple of the call's timesteps; as `row` does.
        """
        self.row(self.calibrated)
        if self._times is None:
            return None
        if self._entries is None:
            times = self._times.to("cpu", torch.float64)
            found = torch.searchsorted(torch.tensor(self.calibrated, dtype=torch.float64), times)
            self._entries = found.clamp_(max=len(self.calibrated) - 1)
        if bool((self._entries == self._entries[0]).all()):
            return None
        repeats, rest = divmod(count, len(self._entries))
        if rest or not count:
            raise CalibrationError(
                f"a layer got {count} rows in a call with {len(self._entries)} timesteps; whose they are is unknown"
            )
        return self._entries.repeat_interleave(repeats)
