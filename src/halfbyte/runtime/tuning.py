"""Tiles of the GPU engine's products: a short list, of which the fastest is measured once for a layer's shape and size of input."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

AUTOTUNE = "HALFBYTE_AUTOTUNE"


def power_of_two(number: int) -> int:
    """The least at or above a number."""
    return 1 << max(0, number - 1).bit_length()


def blocks_of(size: int, block: int) -> int:
    return -(-size // block)


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks a program works on, and how many warps and stages it gets."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that its operands wait in."""
        return (self.m + self.n) * self.k * self.stages

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages}


LARGE = (Tiles(128, 256, 128, 8, 3), Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 128, 8, 3), Tiles(128, 128, 64, 8, 4))
SMALL = (Tiles(64, 128, 128, 4, 4), Tiles(64, 64, 128, 4, 4), Tiles(64, 64, 64, 4, 4))
FEW = (Tiles(16, 64, 256, 4, 3), Tiles(16, 32, 256, 4, 3))
FEWEST = (*FEW, Tiles(16, 32, 512, 4, 3))


@dataclass(frozen=True)
class Card:
    """What tiles are chosen by."""

    processors: int
    shared: int  # bytes a program can have
    wide: bool  # whether blocks of 128 x 256 keep their sums in registers; before Hopper the compiler spills 0.5 KB a thread


@cache
def card(device: torch.device) -> Card:
    if device.type != "cuda":
        return Card(4, 227 << 10, True)  # the interpreter
    found = torch.cuda.get_device_properties(device)
    wide = found.major >= 9 and torch.version.hip is None
    return Card(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 64 << 10), wide)


def tiles_for(rows: int, outputs: int, channels: int, limits: Card) -> list[Tiles]:
    """Tiles worth trying for a product, the likeliest first."""
    wide, narrow = -(-rows // 128) * -(-outputs // 128), -(-rows // 64) * -(-outputs // 64)
    order = (*LARGE, SMALL[0]) if wide >= 2 * limits.processors else (*LARGE[2:], *SMALL) if narrow >= limits.processors else SMALL
    fits = [tiles for tiles in order if tiles.shared <= limits.shared and (limits.wide or tiles.n <= 128)]
    even = [tiles for tiles in fits if channels % tiles.k == 0]
    if even or channels >= 128:
        return even or [tiles for tiles in fits if tiles.k == 64]
    depth = max(32, power_of_two(channels))
    return [Tiles(64, 64, depth, 4, 3)]


def few_tiles(rows: int) -> list[Tiles]:
    """Tiles worth trying for a product of few rows; with more than 16, blocks 512 deep spill registers on most cards."""
    height = max(16, power_of_two(rows))
    return [replace(one, m=height) for one in (FEWEST if height == 16 else FEW)]


_CHOSEN: dict[tuple[Any, ...], Tiles] = {}


def choose(key: tuple[Any, ...], candidates: Sequence[Tiles], device: torch.device, launch: Callable[[Tiles], None]) -> Tiles:
    """The fastest of the candidates for what a key describes: measured once, then remembered by this process."""
    if key in _CHOSEN:
        return _CHOSEN[key]
    known = len(candidates) == 1 or device.type != "cuda" or os.environ.get(AUTOTUNE) == "0"
    if known or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    _CHOSEN[key] = min(candidates, key=lambda tiles: _milliseconds(launch, tiles))
    return _CHOSEN[key]


def _milliseconds(launch: Callable[[Tiles], None], tiles: Tiles) -> float:
    """The least of five, between events of the device; the call before them compiles.

    Before each, the L2 cache is overwritten: weights are not in it when a model runs, and meanwhile the launch is queued.
    """
    launch(tiles)
    times, cold = [], torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()
        start.record()
        launch(tiles)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(min(times))
