"""What a stopped fine-tune continues from: its state on disk, and its log.

A run's folder holds `state.safetensors` (trained parameters, optimizer moments, averaged weights; step and fingerprint as JSON in
its header; replaced whole) and `log.jsonl`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.checkpoint import read_state, write_file, write_state
from halfbyte.errors import CheckpointError, CorruptError, OutputExistsError
from halfbyte.runs import check_fingerprint

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"


class RunFolder:
    """The folder of a run.

    Args:
        path: made where it is missing.
        resume: continue what is there, if anything is.
    Raises:
        OutputExistsError: when it holds a run and `resume` is not set.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.file = path, path / STATE_FILE
        if self.file.exists() and not resume:
            raise OutputExistsError(f"{path} holds a run already; pass resume (--resume) to continue it, or remove the folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            for scrap in path.glob(".*.partial-*"):  # of a process that was killed while it wrote
                scrap.unlink()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be used: {error.strerror or error}") from error

    def save(self, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
        write_state(self.file, tensors, entries)

    def load(self, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved state; None where there is none.

        Raises:
            ResumeError: when it has another fingerprint. CorruptError: when the file is damaged.
        """
        if not self.file.exists():
            return None
        tensors, entries = read_state(self.file)
        if not isinstance(entries.get("fingerprint"), dict) or not isinstance(entries.get("step"), int):
            raise CorruptError(f"{self.file} holds no state of a run; remove the folder and start anew")
        check_fingerprint(entries["fingerprint"], fingerprint, self.file)
        return tensors, entries


class Log:
    """Rows of a run's log, in memory and as JSON lines; `signal`: the stop signal that came too late to stop it, or 0."""

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.signal = 0
        self.file = None if folder is None else folder / LOG_FILE
        self.rows: list[dict[str, Any]] = []
        if self.file is not None:
            self.rows = [row for row in _read_rows(self.file) if row["step"] <= step]  # later ones are about to be made again
            write_file(self.file, b"".join(_line(row) for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.file is not None:
            with open(self.file, "ab") as handle:
                handle.write(_line(row))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_bytes().splitlines() if file.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line, cut off by a kill
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
