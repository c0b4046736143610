"""`halfbyte demo`: the embedded model through the main recipes, as a small table."""

from pathlib import Path

import torch

from halfbyte.checkpoint import write_file
from halfbyte.demo import check_extras
from halfbyte.evaluate.images import FolderImages
from halfbyte.evidence.command import make_table
from halfbyte.evidence.config import RunConfig, TableConfig
from halfbyte.evidence.evaluation import IMAGES
from halfbyte.evidence.session import Report
from halfbyte.evidence.table import Table
from halfbyte.evidence.tools import DEMO
from halfbyte.report.pictures import grid_png
from halfbyte.report.schema import Results

RECIPES = ("int8-w8a8", "int4-w4a4", "quartz-w4a4", "msfp-w4a4", "halfbyte-w4a4")
TITLE = "halfbyte demo: a DDPM UNet of Fashion-MNIST, 4.3 M parameters"
CALIBRATION = 8  # images sampled for recipes that need calibration
STRIP = 16  # images of each run in the one picture that shows all runs below each other


def run_demo(
    output: Path, images: int = 128, steps: int = 10, seed: int = 0, recipes: tuple[str, ...] = (), report: Report | None = None
) -> Results | None:
    """Make the demo's table in a folder, and pictures.png with the first images of every run below each other.

    Raises:
        RecipeError: for a recipe that is not there. MissingExtraError: without what the page needs.
    """
    check_extras()
    runs = [RunConfig(recipe=name) for name in recipes or RECIPES]
    for run in runs:
        run.chosen()
    config = TableConfig(
        DEMO,
        TITLE,
        images,
        steps,
        runs,
        seed=seed,
        features=DEMO,
        reference=DEMO,
        calibration=CALIBRATION,
        calibration_steps=steps,
    )

    def draw(table: Table) -> None:
        count = min(STRIP, images)
        strips = torch.cat([FolderImages(folder / IMAGES).read(0, count) for folder in table.folders])
        write_file(output / "pictures.png", grid_png(strips.float() / 255, columns=count))

    return make_table(config, output, report=report, inspect=draw)
