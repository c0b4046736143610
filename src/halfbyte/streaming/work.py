"""Runs the parts of a plan: one thread reads, several search, one writes and records.

A part's place in the output is known before it is made, so the order of finishing does not matter to the bytes.
"""

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.layers import TRANSPOSED, check_finite, weight_to_matrix
from halfbyte.metrics import SignalToNoise
from halfbyte.runtime.weights import pack_rows
from halfbyte.streaming.plan import Part, row_bytes
from halfbyte.streaming.shards import Shards
from halfbyte.streaming.source import bytes_of


@dataclass
class Piece:
    """Bytes of one output tensor."""

    name: str
    offset: int
    content: memoryview


@dataclass
class Made:
    """What became of a part."""

    pieces: list[Piece]
    quality: SignalToNoise | None = None


def run_parts(
    parts: Sequence[Part],
    todo: Sequence[int],
    shards: Shards,
    record: Callable[[dict[str, Any]], None],
    progress: Callable[[int], None],
) -> None:
    """Make and write the parts whose numbers are given; `record` is called with an entry of the journal for each, and
    `progress` with its number of values.

    Raises:
        NonFiniteError: when a weight holds a NaN or an infinity. CorruptError, OSError: when reading or writing fails.
    """
    workers = torch.get_num_threads()
    with one_thread_each(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as searchers:
        try:
            flying: deque[tuple[int, Future[Made]]] = deque()
            for number in todo:
                part = parts[number]
                flying.append((number, searchers.submit(_make_read, part, reader.submit(read, part))))
                if len(flying) > 2 * workers:
                    _finish(parts, flying, shards, record, progress)
            while flying:
                _finish(parts, flying, shards, record, progress)
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            searchers.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Has torch use one thread for an operation: the workers are the threads, and sums do not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_read(part: Part, raw: "Future[Tensor]") -> Made:
    return make(part, raw.result())


def _finish(parts: Sequence[Part], flying: Any, shards: Shards, record: Any, progress: Callable[[int], None]) -> None:
    number, future = flying.popleft()
    made = future.result()
    for piece in made.pieces:
        shards.write(piece.name, piece.offset, piece.content)
    entry = {"part": number, "crc": checksum(piece.content for piece in made.pieces)}
    if made.quality is not None:
        entry |= {"signal": made.quality.signal, "noise": made.quality.noise}
    record(entry)
    progress(parts[number].values)


def read(part: Part) -> Tensor:
    """The bytes or rows of a part's source."""
    if part.layer is None:
        return part.source.read(part.first, part.last)
    if isinstance(part.layer, TRANSPOSED):  # its output channels are not the first axis; a part is the whole of it
        return part.source.rows(0, part.source.shape[0])
    return part.source.rows(part.first, part.last)


@torch.no_grad()
def make(part: Part, raw: Tensor) -> Made:
    """Quantize the rows of a layer, or pass on the bytes of a copy."""
    if part.layer is None:
        if part.checked and part.source.dtype.is_floating_point:
            check_finite(part.name, raw.view(part.source.dtype).float())
        return Made([Piece(part.name, part.first, bytes_of(raw))])
    matrix = weight_to_matrix(part.layer, raw)
    tensors, quality = pack_rows(matrix, part.layer.spec.weight, f"{part.name}.weight")
    rows = row_bytes(part.layer)
    pieces = [Piece(f"{part.name}.{name}", part.first * rows[name], bytes_of(tensor)) for name, tensor in tensors.items()]
    return Made(pieces, quality)


def checksum(contents: Any) -> int:
    """CRC-32 of bytes one after another."""
    crc = 0
    for content in contents:
        crc = zlib.crc32(content, crc)
    return crc


def unfinished(parts: Sequence[Part], shards: Shards, done: dict[int, dict[str, Any]]) -> list[int]:
    """Numbers of the parts that are not recorded, or whose bytes are not those that were recorded."""
    return [number for number, part in enumerate(parts) if number not in done or done[number]["crc"] != _written(part, shards)]


def _written(part: Part, shards: Shards) -> int:
    if part.layer is None:
        return checksum([shards.read(part.name, part.first, part.last - part.first)])
    rows = row_bytes(part.layer)
    count = part.last - part.first
    return checksum(shards.read(f"{part.name}.{name}", part.first * size, count * size) for name, size in rows.items())


def decibel(entries: Sequence[dict[str, Any]]) -> float:
    """SQNR of a layer from the entries of its parts."""
    whole = SignalToNoise(math.fsum(entry["signal"] for entry in entries), math.fsum(entry["noise"] for entry in entries))
    return whole.decibel
