"""What an evaluation is asked to measure with, by names and files."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import EvaluationError
from halfbyte.evaluate.extractors import Extractor, load_extractor
from halfbyte.evaluate.measure import Instruments, Scorer
from halfbyte.evaluate.text import ClipScore, ImageReward
from halfbyte.metrics import Lpips

DEMO = "demo"


def find_tools(
    features: str | None,
    lpips: str | None = None,
    clip: str | None = None,
    image_reward: bool = False,
    trust_code: bool = False,
) -> Instruments:
    """Load all that is asked for, before any image is made.

    Raises:
        HalfbyteError, MissingExtraError: when something is not to be had.
    """
    scorers: dict[str, Scorer] = {}
    if clip is not None:
        scorers["clip_score"] = ClipScore(clip)
    if image_reward:
        scorers["image_reward"] = ImageReward()
    return Instruments(_extractor(features, trust_code), None if lpips is None else Lpips(lpips), scorers)


def _extractor(features: str | None, trust_code: bool) -> Extractor | None:
    if features is None:
        return None
    if features == DEMO:
        from halfbyte.demo.extractor import DemoExtractor

        return DemoExtractor()
    return load_extractor(features, trust_code)


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a text file that are not empty; of a .tsv file, its first column below the heading.

    Raises:
        EvaluationError: when it cannot be read or holds none.
    """
    if file is None:
        return ()
    try:
        lines: Sequence[str] = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file} cannot be read as a list of prompts: {error}") from error
    if file.suffix == ".tsv":
        lines = [line.partition("\t")[0] for line in lines[1:]]
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise EvaluationError(f"{file} holds no prompts; give one a line")
    return found
