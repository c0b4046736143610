"""Features of images, and their distances to others, batch by batch: parts on disk, so that nothing is worked out twice.

A part is a safetensors file named after its first image. It is written whole, so a run that was killed lacks parts but has no half
ones, and the merged tensors do not depend on who made which part when.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint import read_state, write_state
from halfbyte.errors import EvaluationError
from halfbyte.evaluate.extractors import Extractor
from halfbyte.evaluate.images import ImageSet
from halfbyte.evaluate.pairs import Progress
from halfbyte.evaluate.sampling import Share, batches
from halfbyte.metrics import Lpips, perceptual_distance, psnr, ssim
from halfbyte.metrics.images import SSIM_WINDOW

Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # (images uint8, prompts) -> (N,)


@dataclass
class Instruments:
    """What images are measured with."""

    extractor: Extractor | None = None
    lpips: Lpips | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)  # of images and prompts, by the name of their figure

    def extras(self) -> dict[str, str]:
        """What figures depend on besides the extractor."""
        found = {} if self.lpips is None else {"lpips": self.lpips.name}
        return found | {name: str(getattr(scorer, "name", name)) for name, scorer in self.scorers.items()}

    def identity(self) -> dict[str, str]:
        """All of it, for fingerprints."""
        return self.extras() | ({} if self.extractor is None else {"extractor": self.extractor.digest})


@torch.inference_mode()
def measure_batch(
    tools: Instruments, images: Tensor, others: Tensor | None = None, prompts: Sequence[str] = ()
) -> dict[str, Tensor]:
    """All that is measured of a batch.

    Args:
        images: uint8 (N, C, H, W).
        others: the float model's images from the same noise; None: there is nothing to compare with.
        prompts: one an image, or none.
    Returns:
        pooled, spatial, logits: features; psnr, ssim, perceptual, lpips: float32 (N,), against the others; a scorer's name: its
        values.
    """
    pixels = images.float() / 255
    found: dict[str, Tensor] = {}
    mine = tools.extractor.extract(pixels) if tools.extractor else None
    if mine is not None:
        found |= mine.tensors()
    if others is not None:
        theirs = others.float() / 255
        found["psnr"] = psnr(theirs, pixels)
        if min(pixels.shape[2:]) > SSIM_WINDOW // 2:
            found["ssim"] = ssim(theirs, pixels)
        if mine is not None and mine.maps and tools.extractor:
            found["perceptual"] = perceptual_distance(tools.extractor.extract(theirs).maps, mine.maps)
        if tools.lpips is not None:
            found["lpips"] = tools.lpips(theirs, pixels)
    return found | {name: scorer(images, prompts) for name, scorer in tools.scorers.items() if prompts}


def measure_folder(
    tools: Instruments,
    folder: Path,
    images: ImageSet,
    count: int,
    batch: int,
    others: ImageSet | None = None,
    prompts: Sequence[str] = (),
    share: Share | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make this process's parts of the first `count` images that are not in the folder yet."""
    mine = (share or Share()).of(batches(count, batch))
    for done, indices in enumerate(mine, 1):
        file = part_file(folder, indices)
        if not file.exists():
            check()
            against = None if others is None else others.read(indices.start, indices.stop)
            said = [prompts[index % len(prompts)] for index in indices] if prompts else ()
            write_state(file, measure_batch(tools, images.read(indices.start, indices.stop), against, said), {})
        if progress:
            progress(done, len(mine))


def part_file(folder: Path, indices: range) -> Path:
    """Where a part lies."""
    return folder / f"{indices.start:06d}.safetensors"


def merged(folder: Path, count: int, batch: int) -> dict[str, Tensor]:
    """The parts of a folder put together, in the order of the images.

    Raises:
        EvaluationError: when a part is missing, or holds another number of images than it should.
    """
    found: dict[str, list[Tensor]] = {}
    for indices in batches(count, batch):
        file = part_file(folder, indices)
        if not file.exists():
            raise EvaluationError(f"{folder} lacks the part of images {indices.start} to {indices.stop - 1}; run again")
        for name, tensor in read_state(file)[0].items():
            if len(tensor) != len(indices):
                raise EvaluationError(f"{file} holds {len(tensor)} images instead of {len(indices)}; remove it and run again")
            found.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in found.items()}
