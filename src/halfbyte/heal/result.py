"""What a fine-tune leaves behind, and its size."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from halfbyte.layers import FakeQuant
from halfbyte.runtime.layers import packed_shapes


@dataclass
class HealResult:
    """What a fine-tune left.

    Attributes:
        model: the student, in place: trainable layers with healed weights; `halfbyte.pack` makes them 4-bit.
        log: rows of step, loss, gradient_norm, learning_rate, seconds; of quest, also the stage.
        timesteps: the entries of the tables, ascending, as the denoiser takes them.
        choice: by layer, which of its weight sets serves each of them: uint8 (T,). Empty where layers have one.
        gamma: weight of the loss at each of them, float32 (T,); None: all alike.
        stored_bytes, stored_before: of the quantized layers' codes, scales and multipliers, packed; with all sets, and with one.
        share: trained parameters, over those of the float model.
        trained: of quest, by stage, the layers whose weights and whose scales were trained.
        peak_bytes: most memory the process held, on the device it trained on.
        error, error_before: what is minimised, at a few states of one trajectory: of the student now, and as it came.
    """

    model: nn.Module
    method: str
    settings: dict[str, Any]
    log: list[dict[str, Any]]
    timesteps: list[float]
    choice: dict[str, Tensor]
    gamma: Tensor | None
    stored_bytes: int
    stored_before: int
    share: float
    trained: dict[str, dict[str, list[str]]]
    peak_bytes: int
    error: float
    error_before: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for reports; choices as runs of (set, number of timesteps)."""
        runs = {}
        for name, choice in self.choice.items():
            sets, lengths = choice.unique_consecutive(return_counts=True)
            runs[name] = [[int(number), int(length)] for number, length in zip(sets, lengths, strict=True)]
        return {
            "method": self.method,
            "settings": self.settings,
            "log": self.log,
            "timesteps": self.timesteps,
            "choice": runs,
            "gamma": None if self.gamma is None else self.gamma.tolist(),
            "stored_bytes": self.stored_bytes,
            "stored_before": self.stored_before,
            "share": self.share,
            "trained": self.trained,
            "peak_bytes": self.peak_bytes,
            "error": self.error,
            "error_before": self.error_before,
        }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the codes, scales, multipliers and tables of a model's trainable quantized layers, once packed."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, FakeQuant):
            timesteps = len(layer.timestep.calibrated) if layer.timestep is not None else 1
            shapes = packed_shapes(layer, layer.spec, layer.input_scale is not None, timesteps)  # type: ignore[arg-type]
            total += sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    return total
