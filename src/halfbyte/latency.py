"""How long a step takes at which widths: a table of measured layers, and what it predicts of a whole model.

The table holds times of one machine at one number of threads; `bench/latency.py` measures it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.checkpoint import read_json, write_file
from halfbyte.errors import HalfbyteError

FLOAT = "float"  # the width of a layer that is not quantized


@dataclass
class Latency:
    """Times of a denoiser's layers, and of the whole float denoiser, for a step of one image."""

    model: str
    environment: dict[str, str]  # versions, processor, threads, backend: the times hold for these alone
    dtype: str  # of the activations, and of the weights of what stays in float
    total: float  # seconds of a step of the float model
    cases: dict[str, dict[str, float]]  # kind and sizes of a layer and of its input -> width, FLOAT too -> seconds of a call
    calls: dict[str, dict[str, int]]  # layer -> case -> calls in a step

    def seconds(self, layer: str, width: str) -> float:
        """What a layer takes in a step; one that a step does not call takes nothing."""
        return sum(count * self.cases[case][width] for case, count in self.calls.get(layer, {}).items())

    @property
    def rest(self) -> float:
        """Seconds of a step outside the layers, taken to be the same at all widths; so the float model's prediction is its time."""
        return self.total - sum(self.seconds(layer, FLOAT) for layer in self.calls)

    def predict(self, widths: Mapping[str, str]) -> float:
        """Seconds of a step with these widths; layers that are not named stay in float."""
        return self.rest + sum(self.seconds(layer, widths.get(layer, FLOAT)) for layer in self.calls)

    def uniform(self, width: str) -> float:
        """Seconds of a step with all layers at one width."""
        return self.predict(dict.fromkeys(self.calls, width))

    @property
    def widths(self) -> list[str]:
        """What the layers were measured at, FLOAT last."""
        return list(next(iter(self.cases.values()), {}))

    def describe(self) -> str:
        """What the times hold for."""
        known = {"threads": "?", "processor": "?", "backend": "?"} | self.environment
        return (
            f"for this machine ({known['processor']}, backend {known['backend'].split(' ')[0]}) and "
            f"{known['threads']} thread{'' if known['threads'] == '1' else 's'}, in {self.dtype}"
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_file(path, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> "Latency":
        """What `save` wrote.

        Raises:
            CheckpointError: when it cannot be read. HalfbyteError: when it is something else.
        """
        data = read_json(Path(path))
        try:
            made = cls(**data)
            made.describe(), sum(map(made.uniform, (FLOAT, *made.widths)))  # everything that a prediction needs
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise HalfbyteError(f"{path} is no table of times ({what}); remove it to measure again") from error
        return made
