"""MoDiff: what a layer's input has changed by since the last timestep is quantized, not the input itself; simulated.

From one timestep to the next an input changes little, and a small difference has a small range: at equal bits a fine step. For the
linear operation A of a layer, its input a_t and the quantizer Q,

    o_t = A(Q(a_t - r)) + o_{t+1}           r_t = r + Q(a_t - r)          with r = r_{t+1}, o without the bias

where r is what the layer has been told so far. Differences are taken to r and not to the true last input, so errors do not add up:
what one step rounds off, the next one sees again. The first step of a trajectory quantizes the whole input.

As A is linear, o_t = A(r_t). That is computed here: one float32 copy of its input for every layer. A kernel that runs the integer
product A(Q(a_t - r)) has to keep o_{t+1} as well, and read and write both at every step: memory as large as all inputs and outputs
together, which is why this is an option and not the rule.

Scales of differences are dynamic (their range is not known beforehand); calibrated scales serve the first step. A trajectory begins
where the timestep rises or the shape of the input changes.

Source: Gao et al., "MoDiff: modulated diffusion for model quantization", ICML 2025.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from halfbyte.layers import FakeQuant
from halfbyte.quantizers import FixedScale
from halfbyte.timestep import TimestepState


class Difference:
    """What one layer remembers between timesteps.

    Args:
        state: knows the timestep of the call under way.
    """

    def __init__(self, state: TimestepState) -> None:
        self.state = state
        self.told: Tensor | None = None  # r: float32, shaped as the input
        self.timestep: float | None = None

    def round(self, rows: Tensor, quantize: Callable[[Tensor, FixedScale | None], Tensor], fixed: FixedScale | None) -> Tensor:
        """What the layer knows of an input (r, p, c) after this call, float32.

        Args:
            quantize: (rows, calibrated scale or None) -> rounded rows.
        """
        now, before, told = self.state.value, self.timestep, self.told
        begins = now is None or before is None or now > before
        if begins or told is None or told.shape != rows.shape or told.device != rows.device:
            self.told = quantize(rows, fixed)
        else:
            self.told = told + quantize(rows.float() - told, None)
        self.timestep = now
        return self.told


def follow_differences(model: nn.Module) -> None:
    """Have every trainable layer of a denoiser that quantizes its input quantize differences over time.

    Raises:
        CalibrationError: when the model's forward has no timestep argument.
    """
    state = TimestepState()
    state.attach(model)
    for layer in _layers(model):
        layer.difference = Difference(state)


def forget(model: nn.Module) -> None:
    """Begin a new trajectory, whatever the next timestep."""
    for layer in _layers(model):
        if layer.difference is not None:
            layer.difference.told = None


def remembered_bytes(model: nn.Module) -> int:
    """Bytes that the layers hold from one timestep to the next."""
    held = [layer.difference.told for layer in _layers(model) if layer.difference is not None]
    return sum(told.nbytes for told in held if told is not None)


def _layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, FakeQuant) and layer.spec.activation is not None]
