"""Images sampled into folders, by any number of processes, to the same bits however often they are killed.

The unit is a batch: a float model's image differs in its last bits by the batch it is made in, so a batch that was cut off is made
again as a whole. A file is an image of the number in its name; none can be counted twice.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import write_file
from halfbyte.errors import EvaluationError
from halfbyte.evaluate.images import to_pixels, write_png
from halfbyte.evaluate.pairs import Progress, sample_batch

TIMES = "seconds.json"


@dataclass(frozen=True)
class Sampling:
    """How the images of a run are made."""

    images: int
    steps: int  # of the sampler
    seed: int = 0
    batch: int = 32
    prompts: tuple[str, ...] = ()  # for text-to-image pipelines, used in turn
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the pipeline's call, such as guidance_scale

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("steps", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def identity(self) -> dict[str, Any]:
        """What a continued run must share; the prompts by their digest."""
        prompts = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        own = {name: getattr(self, name) for name in ("images", "steps", "seed", "batch")}
        return {**own, "prompts": prompts, "arguments": dict(self.arguments)}


@dataclass(frozen=True)
class Share:
    """The part of a process in work that is cut into batches."""

    rank: int = 0
    processes: int = 1

    def of(self, batches: Sequence[range]) -> Sequence[range]:
        return batches[self.rank :: self.processes]


def batches(count: int, batch: int) -> list[range]:
    """Indices 0 to count - 1 in batches."""
    return [range(start, min(count, start + batch)) for start in range(0, count, batch)]


def sample_folder(
    pipe: Any,
    folder: Path,
    sampling: Sampling,
    share: Share | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Sample this process's images that are not in the folder yet, as 000000.png and so on.

    Args:
        progress: called after every denoiser call with the image-steps done and in all, of this process.
        check: called before every denoiser call; may raise to stop.
    """
    mine = (share or Share()).of(batches(sampling.images, sampling.batch))
    missing = [indices for indices in mine if not all(image_file(folder, index).exists() for index in indices)]
    total = sum(map(len, mine)) * sampling.steps
    clock = _Clock(total - sum(map(len, missing)) * sampling.steps, total, progress)
    pipe.set_progress_bar_config(disable=True)
    denoiser = find_denoiser(pipe)
    handles = [
        denoiser.register_forward_pre_hook(lambda *_: check()),
        denoiser.register_forward_hook(lambda *_: clock.served()),
    ]
    try:
        for indices in missing:
            clock.start(len(indices) * sampling.steps, len(indices))
            started = time.perf_counter()
            images = sample_batch(
                pipe, indices, sampling.images, sampling.steps, sampling.seed, sampling.prompts, sampling.arguments
            )
            clock.end()
            seconds = time.perf_counter() - started
            for index, pixels in zip(indices, to_pixels(images), strict=True):
                write_png(pixels, image_file(folder, index))
            write_file(folder / f"{indices.start:06d}.{TIMES}", json.dumps([len(indices), seconds]).encode())
    finally:
        for handle in handles:
            handle.remove()


class _Clock:
    """Image-steps done, by the denoiser calls of a batch; never more than the batch has."""

    def __init__(self, done: int, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = done, total, progress
        self.goal, self.share = done, 0

    def start(self, work: int, share: int) -> None:
        self.goal, self.share = self.done + work, share

    def served(self) -> None:
        self.done = min(self.goal, self.done + self.share)
        self._tell()

    def end(self) -> None:
        self.done = self.goal
        self._tell()

    def _tell(self) -> None:
        if self.progress:
            self.progress(self.done, self.total)


def image_file(folder: Path, index: int) -> Path:
    """Where an image lies."""
    return folder / f"{index:06d}.png"


def seconds_per_image(folder: Path) -> float:
    """Median over the batches of a folder, each by its images."""
    times = sorted(seconds / count for count, seconds in (json.loads(file.read_bytes()) for file in folder.glob(f"*.{TIMES}")))
    if not times:
        raise EvaluationError(f"{folder} does not say how long its images took; remove it and sample again")
    return float(times[len(times) // 2])
