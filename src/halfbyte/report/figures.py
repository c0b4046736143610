"""What the figures of a run are called, which way is better, and how to read them: one row each."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.report.schema import Figure, Results, Run

MISSING = "–"


@dataclass(frozen=True)
class FigureKind:
    """A figure, as tables and pages show it."""

    key: str
    label: str
    unit: str
    more: bool  # better when larger
    digits: int  # decimals
    about: str  # how to read it

    @property
    def arrow(self) -> str:
        return "↑" if self.more else "↓"


_NOT_FID = (
    "in this evaluation's own feature extractor unless it is named Inception above: then, and only then, it is an FID, and must be "
    "compared with a published FID of the same number of images and the same reference only"
)
KINDS = {
    kind.key: kind
    for kind in (
        FigureKind("psnr", "PSNR", "dB", True, 2, "Nearness of final images to the float model's from the same noise."),
        FigureKind("ssim", "SSIM", "", True, 3, "Likeness in structure to the float model's images; 1 where equal."),
        FigureKind("lpips", "LPIPS", "", False, 3, "Perceptual distance to the float model's images."),
        FigureKind(
            "perceptual",
            "Perceptual",
            "",
            False,
            3,
            "LPIPS without its learned weights, in the activations of this evaluation's extractor; no published LPIPS compares.",
        ),
        FigureKind("frechet", "Frechet", "", False, 2, f"Frechet distance to the real images, {_NOT_FID}."),
        FigureKind("sfrechet", "sFrechet", "", False, 2, f"Frechet distance in features that keep their place, {_NOT_FID} (sFID)."),
        FigureKind("frechet_float", "Frechet to float", "", False, 2, "Frechet distance to the float model's own images."),
        FigureKind("kernel", "Kernel", "", False, 5, "Unbiased kernel distance to the real images (KID, in these features)."),
        FigureKind("kernel_float", "Kernel to float", "", False, 5, "Unbiased kernel distance to the float model's own images."),
        FigureKind("precision", "Precision", "", True, 3, "Share of images that lie among the real ones."),
        FigureKind("recall", "Recall", "", True, 3, "Share of real images that lie among these."),
        FigureKind("inception_score", "IS", "", True, 2, "Inception score: sure classes, and many of them; this extractor's."),
        FigureKind("clip_score", "CLIP", "", True, 2, "Likeness of image and prompt in CLIP's space."),
        FigureKind("image_reward", "ImageReward", "", True, 3, "What people are predicted to think of the image."),
    )
}


def measured(runs: Iterable[Run]) -> list[FigureKind]:
    """The figures that any of some runs has, in their fixed order; those that are not known here at the end."""
    found = {key for run in runs for key in run["figures"]}
    known = [kind for key, kind in KINDS.items() if key in found]
    return known + [FigureKind(key, key, "", True, 3, "") for key in sorted(found - set(KINDS))]


def shown(results: Results) -> list[FigureKind]:
    """The figures of short tables: those that the results name, or all."""
    wanted: list[str] | None = dict(results).get("shown")  # type: ignore[assignment]
    return [kind for kind in measured(results["runs"]) if wanted is None or kind.key in wanted]


def number(value: float | None, digits: int = 1) -> str:
    """A number with so many decimals, in words of symbols where it is none."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    shown = f"{abs(value):.{digits}f}" if math.isfinite(value) else "∞"
    return f"−{shown}" if value < 0 and shown.strip("0.") else shown


def half_width(figure: Figure) -> float | None:
    """Half the length of an interval; None where there is none."""
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (high - low) / 2


def with_interval(figure: Figure | None, digits: int) -> str:
    """A figure plus and minus half its 95 % interval."""
    if figure is None:
        return MISSING
    half = half_width(figure)
    return number(figure["value"], digits) + ("" if half is None else f" ± {number(half, digits)}")
