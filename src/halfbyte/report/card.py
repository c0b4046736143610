"""The README.md of a quantized model, as the Hub shows it: recipe, sizes, and, once it was evaluated, figures and pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import write_file
from halfbyte.report.markdown import between_markers, captioned_table, marked
from halfbyte.report.schema import Results

CARD = "README.md"
SECTION = "evaluation"
PICTURES = "halfbyte-{name}.png"
KEPT = 8  # layers kept in float that are named


def write_card(folder: Path, base: str, recipe: Any, layers: Sequence[Any], stored: int, plain: int) -> Path:
    """The card of a model that was just quantized.

    Args:
        folder: of the saved pipeline.
        base: the float model, a folder or a name on the Hub.
        recipe: its Recipe. layers: its LayerReports.
        stored, plain: bytes of the quantized layers, and of the same in bf16.
    Raises:
        CheckpointError: when it cannot be written.
    """
    kept = [layer for layer in layers if layer.spec is None]
    known = not Path(base).exists() and base.count("/") == 1  # a name on the Hub
    head = ["---", "library_name: diffusers", *([f"base_model: {base}", "base_model_relation: quantized"] if known else [])]
    head += ["tags: [halfbyte, quantized, 4-bit, diffusion]", "---"]
    edge = "kept in float" if recipe.edge is None else recipe.edge.describe()
    facts = [
        ("made from", f"`{base if known else Path(base).name}`"),
        ("recipe", f"`{recipe.name}`"),
        ("inner layers", recipe.inner.describe()),
        ("first and last layer", edge),
        ("layers", f"{len(layers) - len(kept)} quantized, {len(kept)} kept in float"),
        ("their size", f"{stored / 1e6:.2f} MB instead of {plain / 1e6:.2f} MB in bf16 ({stored / plain:.3f}×)"),
    ]
    lines = [*head, "", f"# {folder.name}", "", "Quantized by [halfbyte](https://pypi.org/project/halfbyte/).", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    lines += ["```python", "import halfbyte  # lets diffusers read the layers", "from diffusers import DiffusionPipeline", ""]
    lines += [f'pipe = DiffusionPipeline.from_pretrained("{folder.name}")', "```", ""]
    if kept:
        some = ", ".join(f"`{layer.name}` ({layer.reason})" for layer in kept[:KEPT])
        lines += [f"In float: {some}{' and others' if len(kept) > KEPT else ''}.", ""]
    lines += ["## Evaluation", "", marked(SECTION, f"Not evaluated yet: `halfbyte eval {folder.name} --against MODEL`."), ""]
    return write_file(folder / CARD, "\n".join(lines).encode())


def add_evaluation(folder: Path, results: Results) -> Path | None:
    """Put figures and pictures into the card of an evaluated model.

    Returns:
        The card; None where the folder has none with the markers of `write_card`: other people's cards are left alone.
    Raises:
        CheckpointError: when it cannot be written.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if marked(SECTION, "").partition("\n")[0] not in text:
        return None
    lines = [captioned_table(results)]
    for name, run in zip(("float", "quantized"), results["runs"], strict=False):
        if run["images"] is not None:
            picture = PICTURES.format(name=name)
            write_file(folder / picture, base64.b64decode(run["images"].partition(",")[2]))
            lines += ["", f"![Images of {run['recipe']}, the same noise in the same places]({picture})"]
    return write_file(card, between_markers(text, SECTION, "\n".join(lines)).encode())
