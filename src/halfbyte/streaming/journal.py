"""What an unfinished run has done, so that it can be continued; and the lock that keeps a second one out.

The work folder `.OUT.partial` holds `result/` (what becomes OUT), `run.json` (the fingerprint of the run) and `done.jsonl`: a line
for every finished part, with the CRC-32 of its bytes. Lines are appended after the bytes are written. A killed process loses the
parts in its hands; after a power cut, parts whose bytes did not reach the disk have the wrong CRC and are made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from errno import ENOTDIR
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halfbyte.checkpoint import disk_sentence, read_json, write_file
from halfbyte.errors import CheckpointError, OutputExistsError, ResumeError
from halfbyte.streaming.source import Stored

RESULT = "result"  # what becomes the output, in the work folder
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Holds the lock on an output folder; gives its work folder.

    Raises:
        OutputExistsError: when the output exists. CheckpointError: when another process is writing it.
    """
    work = output.with_name(f".{output.name}.partial")
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another process is writing {output}; wait for it, or choose another output folder") from error
    except OSError as error:
        clash = isinstance(error, FileExistsError)  # a file where a folder is needed
        raise CheckpointError(disk_sentence(output, OSError(ENOTDIR, os.strerror(ENOTDIR)) if clash else error)) from error
    try:
        if output.exists() or output.is_symlink():
            raise OutputExistsError(f"{output} exists already; choose another output folder or remove it first")
        yield work
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()  # a process that still waits for this file will find the output there
        lock.release()


def model_digest(tensors: Mapping[str, Stored], config: bytes) -> str:
    """SHA-256 over a model's config, the names, dtypes and shapes of its tensors, and samples of every file, evenly spaced.

    Not the whole content: reading it would take as long as the run.
    """
    digest = hashlib.sha256(config)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.file.name} {tensor.offset}\n".encode())
    for file in sorted({tensor.file for tensor in tensors.values()}):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(file, "rb") as handle:
            for sample in range(SAMPLES):
                handle.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Journal:
    """The record of one run in its work folder."""

    def __init__(self, work: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
        """Raises OutputExistsError where an unfinished run is in the way, ResumeError where it was another one."""
        self.lines = work / "done.jsonl"
        if work.exists() and not resume:
            raise OutputExistsError(f"an unfinished run is in {work}; --resume continues it, or remove that folder")
        if not (work / "run.json").is_file():  # none, or one that was killed before it had begun
            shutil.rmtree(work, ignore_errors=True)
            write_file(work / "run.json", json.dumps(dict(fingerprint), indent=2).encode())
        found = read_json(work / "run.json")
        other = next((key for key in fingerprint if found.get(key) != fingerprint[key]), None)
        if other is not None:
            raise ResumeError(f"the run in {work} was started with another {other}; repeat it as it was, or remove that folder")
        if self.lines.is_file():
            whole = self.lines.read_bytes()
            self.lines.write_bytes(whole[: whole.rfind(b"\n") + 1])  # a last line that was cut off is dropped

    def done(self, component: str) -> dict[int, dict[str, Any]]:
        """The finished parts of a component by number."""
        lines = self.lines.read_bytes().splitlines() if self.lines.is_file() else []
        entries = [json.loads(line) for line in lines]
        return {entry["part"]: entry for entry in entries if entry["component"] == component}

    def add(self, component: str, entry: Mapping[str, Any]) -> None:
        """Record a part whose bytes are written."""
        with open(self.lines, "ab", buffering=0) as handle:
            handle.write(json.dumps({"component": component, **entry}).encode() + b"\n")
