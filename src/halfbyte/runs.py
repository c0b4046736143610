"""What makes a long run stoppable: the identity that a continued run must share, and signals that ask it to stop."""

import hashlib
import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ResumeError

MISSING = "nothing"


def digest(source: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and values of a module's parameters and buffers, or of some tensors."""
    found = hashlib.sha256()
    for name, tensor in (source.state_dict() if isinstance(source, nn.Module) else source).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def flatten(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found = {}
    for key, value in entries.items():
        nested = isinstance(value, Mapping)
        found.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return found


def check_fingerprint(saved: Mapping[str, Any], own: Mapping[str, Any], file: Path) -> None:
    """Raises ResumeError when two fingerprints differ; names the first field that does."""
    before, now = flatten(saved), flatten(json.loads(json.dumps(own)))
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key, MISSING) != now.get(key, MISSING):
            raise ResumeError(
                f"{file} belongs to another run: its {key} is {_short(before.get(key, MISSING))}, this run's is "
                f"{_short(now.get(key, MISSING))}; continue with the same one, or start anew in another folder"
            )


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


class StopSignal:
    """While entered, SIGTERM and Ctrl-C only set `number`; a second one acts as it did before.

    Python allows signal handlers in the main thread alone; in others nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
