"""One float pipeline and what others are compared with it by: its images, their features, its states. Shared by all runs."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import read_json, write_file
from halfbyte.errors import EvaluationError
from halfbyte.evaluate.codes import watched_inputs, weight_codes
from halfbyte.evaluate.figures import Reference, figures
from halfbyte.evaluate.images import FolderImages, ImageSet, open_images, read_statistics
from halfbyte.evaluate.measure import Instruments, measure_folder, merged
from halfbyte.evaluate.pairs import States, float_states, layer_sqnr, prediction_sqnr
from halfbyte.evaluate.sampling import Sampling, sample_folder, seconds_per_image
from halfbyte.evidence.rows import float_row, quantized_row
from halfbyte.evidence.session import Session
from halfbyte.metrics import Estimate

STATE_TRAJECTORIES = 16  # images whose denoiser calls the noise predictions are compared on
LAYER_CALLS = 2  # of those calls, how many the per-layer figures use
IMAGES, PARTS, DAMAGE = "images", "parts", "damage.json"


class Evaluation:
    """Compares models with a float pipeline, in a folder that keeps what was done.

    Args:
        pipe: the float pipeline.
        folder: for its images and parts; belongs to this pipeline, this sampling and these instruments.
        reference: real images: a set of them, or known statistics.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        sampling: Sampling,
        tools: Instruments,
        session: Session,
        reference: Reference | None = None,
    ) -> None:
        self.pipe, self.folder, self.sampling, self.tools, self.session = pipe, folder, sampling, tools, session
        self.reference = reference
        self.states: States | None = None
        self.original: dict[str, Tensor] = {}

    def add_reference(self, source: Path, side: int | None) -> None:
        """Take real images: a folder, or an .npz file of images or of Inception's statistics."""
        if source.suffix == ".npz" and self.tools.extractor is not None and self.tools.extractor.name.startswith("Inception"):
            known = read_statistics(source)
            if "pooled" in known:
                self.reference = Reference(f"{source.name} (its own statistics)", 0, known["pooled"], known.get("spatial"))
                return
        images = open_images(source, side)
        only_features = Instruments(self.tools.extractor)
        measured = self._measured(only_features, self.folder / "reference", images, len(images), "looking at real images")
        if "pooled" not in measured:
            raise EvaluationError("real images are compared in the features of a network; give one with --features")
        self.reference = Reference.of(source.name, measured)

    def float_run(self) -> dict[str, Any]:
        """Sample and measure the float model; comes first."""
        images = self._sampled(self.pipe, self.folder, "float")
        self.original = self._measured(self.tools, self.folder, images, self.sampling.images, "measuring float")
        found = self._figures(self.original)
        return float_row(find_denoiser(self.pipe), found, seconds_per_image(self.folder / IMAGES), images)

    def run(self, name: str, pipe: Any, folder: Path, recipe: Any, layers: Any) -> dict[str, Any]:
        """Sample and measure a quantized model.

        Args:
            folder: for its images and parts.
            layers: its LayerReports.
        """
        images = self._sampled(pipe, folder, name)
        others = FolderImages(self.folder / IMAGES)
        measured = self._measured(self.tools, folder, images, self.sampling.images, f"measuring {name}", others)
        damage, seconds = self.damage(pipe, folder / DAMAGE), seconds_per_image(folder / IMAGES)
        found = self._figures(measured, self.original)
        return quantized_row(name, recipe, find_denoiser(pipe), layers, damage, found, seconds, images)

    def damage(self, pipe: Any, file: Path) -> dict[str, Any]:
        """SQNR of the predictions, over all and by timestep, and of each layer's output; the codes of layers. Kept in a file."""
        if not file.exists() and self.session.main:
            states, student = self._float_states(), find_denoiser(pipe)
            total, by_timestep = prediction_sqnr(student, states)
            calls = states.calls[:: max(1, len(states.calls) // LAYER_CALLS)]
            with watched_inputs(student) as inputs:
                layers = layer_sqnr(find_denoiser(self.pipe), student, calls)
            found = {"sqnr": total, "sqnr_by_timestep": [list(pair) for pair in by_timestep], "layers": layers}
            found["input_codes"] = {name: codes.to_dict() for name, codes in inputs.items()}
            found["weight_codes"] = weight_codes(find_denoiser(self.pipe), student)
            write_file(file, json.dumps(found).encode())
        self.session.wait()
        return read_json(file)

    def _float_states(self) -> States:
        if self.states is None:
            own = self.sampling
            count = min(STATE_TRAJECTORIES, own.batch)
            self.states = float_states(self.pipe, count, own.steps, own.seed + 1, prompts=own.prompts, arguments=own.arguments)
        return self.states

    def _sampled(self, pipe: Any, folder: Path, name: str) -> FolderImages:
        images = folder / IMAGES
        self._clean(images)
        stage = self.session.stage(f"sampling {name}")
        sample_folder(pipe, images, self.sampling, self.session.share, stage, self.session.check)
        self.session.wait()
        return FolderImages(images)

    def _measured(
        self, tools: Instruments, folder: Path, images: ImageSet, count: int, name: str, others: ImageSet | None = None
    ) -> dict[str, Tensor]:
        parts, own = folder / PARTS, self.sampling
        self._clean(parts)
        stage, share, check = self.session.stage(name), self.session.share, self.session.check
        measure_folder(tools, parts, images, count, own.batch, others, own.prompts, share, stage, check)
        self.session.wait()
        return merged(parts, count, own.batch)

    def _clean(self, folder: Path) -> None:
        """Remove what a killed process was just writing."""
        if self.session.main:
            for scrap in folder.glob(".*.partial-*"):
                scrap.unlink()
        self.session.wait()

    def _figures(self, measured: dict[str, Tensor], original: dict[str, Tensor] | None = None) -> dict[str, Estimate]:
        return figures(measured, original, self.reference, self.sampling.seed)

    def settings(self) -> dict[str, Any]:
        """How all runs were made, as results.json holds it."""
        own, extractor, reference = self.sampling, self.tools.extractor, self.reference
        return {
            "images": own.images,
            "steps": own.steps,
            "seed": own.seed,
            "batch": own.batch,
            "sampler": type(self.pipe.scheduler).__name__,
            "arguments": {key: str(value) for key, value in own.arguments.items()} | self.tools.extras(),
            "features": None if extractor is None else extractor.name,
            "digest": None if extractor is None else extractor.digest,
            "reference": None if reference is None else reference.name,
            "reference_count": None if reference is None else reference.count or None,
        }
