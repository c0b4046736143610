"""`halfbyte eval`, `halfbyte table` and `halfbyte demo`: from folders and files to results, a page and a card."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import api
from halfbyte.calibration import find_denoiser
from halfbyte.checkpoint import read_json, write_file, write_folder
from halfbyte.errors import EvaluationError, OutputExistsError, SamplerError
from halfbyte.evaluate.images import FolderImages, write_npz
from halfbyte.evaluate.measure import Instruments
from halfbyte.evaluate.sampling import Sampling
from halfbyte.evidence.config import TableConfig
from halfbyte.evidence.evaluation import IMAGES, Evaluation
from halfbyte.evidence.session import Report, Session
from halfbyte.evidence.table import Table, described, load_model, numerics_digest, plain, results_of
from halfbyte.evidence.tools import find_tools
from halfbyte.report import save_results, write_report
from halfbyte.report.card import add_evaluation
from halfbyte.report.markdown import insert_table, markdown_table
from halfbyte.report.schema import Results
from halfbyte.runs import check_fingerprint, digest

WORK_SUFFIX = ".partial"  # the folder beside the output that keeps what is done until all is
FINGERPRINT = "run.json"


@dataclass(frozen=True)
class EvalOptions:
    """What `halfbyte eval` is asked for besides the two models."""

    sampling: Sampling
    features: str | None = None
    trust_code: bool = False
    reference: Path | None = None  # real images
    image_size: int | None = None
    lpips: str | None = None
    clip: str | None = None
    image_reward: bool = False
    name: str | None = None  # of the run; the recipe's by default
    save_images: Path | None = None  # folder for both sets of images
    npz: bool = False  # save them as .npz files, not as folders


def evaluate_folder(model: Path, against: Path, output: Path, options: EvalOptions, report: Report | None = None) -> Results | None:
    """Evaluate a quantized folder against the float model it was made from.

    Killed at any moment, the same call goes on where it was, and ends with the same figures.

    Returns:
        The results, which are in `output` too; None in all processes but the first.
    Raises:
        OutputExistsError: when the output exists. ResumeError: when what was begun beside it is another evaluation.
        StoppedError: on SIGTERM or Ctrl-C; what is done is kept.
    """
    tools = _checked(output, options)
    work = output.with_name(output.name + WORK_SUFFIX)
    with Session(report) as session:
        float_pipe, pipe = session.place(load_model(str(against))), session.place(api.load(model))
        recipe, layers = described(model, float_pipe, pipe)
        identity = {
            "numerics": numerics_digest(),
            "float": digest(find_denoiser(float_pipe)),
            "model": digest(find_denoiser(pipe)),
            "scheduler": [plain(float_pipe.scheduler), plain(pipe.scheduler)],
            "sampling": options.sampling.identity(),
            "tools": tools.identity(),
            "reference": [str(options.reference), options.image_size],
        }
        _claim(work, identity, session)
        evaluation = Evaluation(float_pipe, work / "float", options.sampling, tools, session)
        if options.reference is not None:
            evaluation.add_reference(options.reference, options.image_size)
        try:
            rows = [evaluation.float_run()]
        except SamplerError:
            if session.main:  # the command will be given anew with other arguments, which what is there would refuse
                shutil.rmtree(work)
            raise
        rows.append(evaluation.run(options.name or recipe.name, pipe, work / "quantized", recipe, layers))
        session.wait()  # all have read the pictures that the first process removes below
        if not session.main:
            return None
        results = results_of(against.name, "", evaluation, rows)
    save_results(results, output)
    add_evaluation(model, results)
    if options.save_images is not None:
        _keep_images(work, options.save_images, options.npz)
    shutil.rmtree(work)
    return results


def _checked(output: Path, options: EvalOptions) -> Instruments:
    """The tools, once it is known that nothing stands in the way."""
    if output.exists():
        raise OutputExistsError(f"{output} exists already; choose another file or remove it first")
    if options.save_images is not None and options.save_images.exists():
        raise OutputExistsError(f"{options.save_images} exists already; choose another folder for the images or remove it first")
    tools = find_tools(options.features, options.lpips, options.clip, options.image_reward, options.trust_code)
    if options.reference is not None and tools.extractor is None:
        raise EvaluationError("real images are compared in the features of a network; give one with --features")
    return tools


def _claim(work: Path, identity: dict[str, Any], session: Session) -> None:
    """Take the work folder for this evaluation; raises ResumeError when it is another's."""
    file = work / FINGERPRINT
    if session.main and not file.exists():
        write_file(file, json.dumps(identity).encode())
    session.wait()
    check_fingerprint(read_json(file), identity, file)


def _keep_images(work: Path, target: Path, npz: bool) -> None:
    """Both sets of images where the user wants them, whole or not at all."""

    def write(folder: Path) -> None:
        for name in ("float", "quantized"):
            images = FolderImages(work / name / IMAGES)
            if npz:
                write_npz(images, folder / f"{name}.npz")
                continue
            (folder / name).mkdir()
            for file in images.files:
                shutil.copyfile(file, folder / name / file.name)

    write_folder(target, write)


def make_table(
    config: TableConfig,
    output: Path,
    insert: Path | None = None,
    report: Report | None = None,
    pipe: Any = None,
    trust_code: bool = False,
    inspect: Callable[[Table], None] = lambda _: None,
) -> Results | None:
    """Make a table: OUTPUT/results.json, table.md and report.html; what is done already is taken from OUTPUT/runs.

    Args:
        insert: a Markdown file that gets the table between its markers.
        pipe: the float pipeline; None: the one the configuration names.
        inspect: called with the table once it is made.
    Returns:
        The results; None in all processes but the first.
    """
    with Session(report) as session:
        table = Table(config, output, session, pipe, trust_code)
        results = table.run()
        if not session.main:
            return None
    save_results(results, output / "results.json")
    write_file(output / "table.md", (markdown_table(results) + "\n").encode())
    write_report(results, output / "report.html")
    if insert is not None:
        insert_table(insert, results)
    inspect(table)
    return results


def slimmed(results: Results) -> Results:
    """Results without pictures and layers: small enough to be kept beside a table that was made from them."""
    return {**results, "runs": [{**run, "images": None, "layers": [], "sqnr_by_timestep": []} for run in results["runs"]]}
