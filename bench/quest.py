"""QuEST's ablations on the demo model: what each component of the selective fine-tune is worth, and what the time embedding costs.

    python bench/quest.py                                both tables, three seeds
    python bench/quest.py --table components --steps 1500 --seeds 0 1 -o quest.json
    python bench/quest.py --table temporal

`components` adds temporal alignment, critical modules and the global loss one after the other, then measures the latter by the
sampler's next sample, as `halfbyte heal` does (heal/objective.py), and gives all layers, AdaRound with learned scales (as
Q-Diffusion has it), and TALoRA, the same time. In arXiv 2402.03666 (LSUN-Bedrooms, W4A8, FID) AdaRound
alone has 6.95, with temporal alignment (and the global loss) 4.41, with both stages 3.26. `temporal` quantizes the path of the
time embedding alone, and everything but it (the paper's property 1, LDM-4), and heals with stage 1. Published distances are of
another data set and in other features than ours; compare how rows follow each other. Then memory of a step, beside that of the
float model with the same weights trained, and time and memory of a whole fine-tune, beside the paper's. Runs that are in the
output file already are not made again. Property 2 (which families of layers suffer most): bench/sensitivity.py.
"""

import re

import torch
from rich.console import Console
from rich.table import Table

from halfbyte import demo
from halfbyte.api import quantize
from halfbyte.bench.ablation import Effort, Row, Run, main
from halfbyte.calibration import record_calls
from halfbyte.conversion import quantizable_layers
from halfbyte.heal.alignment import SelectiveSettings, plan
from halfbyte.heal.memory import step_peaks
from halfbyte.heal.selective import Selective, parameters_of
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.presets import get_recipe
from halfbyte.recipe import Recipe
from halfbyte.targets import TARGETS

PLAIN = {"method": "quest", "dfa": "off"}  # the loss by errors of the prediction
LOCAL = {**PLAIN, "global_weight": 0.0}
FULL = {"method": "quest", "stages": "full", "local_weight": 0.0}
STAGE_1 = {**PLAIN, "stages": "temporal"}
UNSPLIT = get_recipe("qdiffusion-w4a4").replace(name="qdiffusion-unsplit-w4a4", split=False)
COMPONENTS = {
    "plain INT4, not healed": Row("int4-w4a4"),
    "not healed": Row("quest-w4a4", published="6.95"),
    "scales alone": Row("quest-w4a4", {**PLAIN, "share": 0.0}),
    "+ temporal": Row("quest-w4a4", {**LOCAL, "stages": "temporal"}),
    "+ critical": Row("quest-w4a4", LOCAL),
    "+ global loss": Row("quest-w4a4", PLAIN, "3.26"),
    "by the next sample": Row("quest-w4a4", {"method": "quest"}),
    "all layers, same time": Row("quest-w4a4", {**FULL, "dfa": "off"}, as_long_as="by the next sample"),
    "AdaRound, scales alone, same time": Row(UNSPLIT, {**PLAIN, "share": 0.0}, as_long_as="by the next sample"),
    "TALoRA, same time": Row("quest-w4a4", {"method": "talora", "dfa": "auto"}, as_long_as="by the next sample"),
    "all layers, by the next sample": Row("quest-w4a4", FULL, as_long_as="by the next sample"),
    "TALoRA, by the next sample": Row("quest-w4a4", {"method": "talora"}, as_long_as="by the next sample"),
    "a LoRA a layer, by the next sample": Row("quest-w4a4", {"method": "lora"}, as_long_as="by the next sample"),
}


def part(name: str, temporal: bool) -> Recipe:
    """A preset for the layers of the time embedding alone, or for all others alone."""
    unet = demo.load_pipeline().unet
    target = TARGETS[type(unet).__name__]
    others = [re.escape(layer) for layer in quantizable_layers(unet) if target.is_temporal(layer) != temporal]
    where = "time-embedding" if temporal else "but-time-embedding"
    recipe = get_recipe(name)
    return recipe.replace(name=f"{name}-{where}", edge=None if temporal else recipe.edge, keep=(rf"^({'|'.join(others)})$",))


def temporal_rows() -> dict[str, Row]:
    rows = {}
    for name in ("quest-w8a8", "quest-w4a8", "quest-w4a4"):
        only = part(name, temporal=True)
        rows[f"{name}, only the time embedding"] = Row(only)
        rows[f"{name}, only the time embedding + stage 1"] = Row(only, STAGE_1)
    for name, published in {"quest-w8a8": ("6.77", "7.58", "5.61"), "quest-w4a8": ("7.55", "8.59", "6.95")}.items():
        rows[f"{name}, all but the time embedding"] = Row(part(name, temporal=False), published=published[0])
        rows[f"{name}, all"] = Row(name, published=published[1])
        rows[f"{name}, all + stage 1"] = Row(name, STAGE_1, published[2])
    return rows


def memory(effort: Effort) -> Table:
    """Peaks of a step of each stage, beside the float model's; the bar is 1.6."""
    pipe, student = demo.load_pipeline(), demo.load_pipeline()
    quantize(student, "quest-w4a4", effort.calibrate, steps=effort.sampler_steps, simulate=True)
    calls = record_calls(pipe, 1, effort.sampler_steps)
    settings = Settings(steps=1, batch=effort.batch, sampler_steps=effort.sampler_steps)
    batch = StatePool(pipe, PoolSettings(effort.batch, effort.sampler_steps), range(effort.batch)).batch(0)
    table = Table("stage", "trained %", "healing MB", "float MB", "ratio", title=f"peak memory of a step of {effort.batch}")
    total = sum(parameter.numel() for parameter in pipe.unet.parameters())
    for names in (("temporal", "critical"), ("full",)):
        selective = SelectiveSettings(stages=names)
        for stage in plan(student.unet, pipe, settings, selective, calls):
            method = Selective(student.unet, pipe.unet, stage, selective)
            healing, plain = step_peaks(method, student.unet, pipe.unet, batch)
            share = 100 * parameters_of(student.unet, [stage]) / total
            table.add_row(stage.name, f"{share:.2f}", f"{healing / 1e6:.0f}", f"{plain / 1e6:.0f}", f"{healing / plain:.2f}")
            method.remove()
    return table


def cost(found: dict[str, dict[str, Run]]) -> Table:
    """What a fine-tune cost, beside what the paper says of its own."""
    table = Table("fine-tune", "model", "steps", "minutes", "peak GB", title="time and memory")
    table.add_row("QuEST, section 5 of the paper", "LDM-4, 274 M parameters, 256 samples x 20 steps, A6000", "2200", "27", "12.2")
    size = sum(parameter.numel() for parameter in demo.load_pipeline().unet.parameters()) / 1e6
    cores = f"demo, {size:.1f} M parameters, {torch.get_num_threads()} thread(s) of a CPU"
    for name in ("by the next sample", "all layers, same time"):
        for run in list(found.get(name, {}).values())[:1]:
            table.add_row(name, cores, f"{run['steps']:.0f}", f"{run['seconds'] / 60:.1f}", f"{run['peak_bytes'] / 1e9:.2f}")
    return table


if __name__ == "__main__":
    smoke = ("not healed", "by the next sample", "all layers, same time", "AdaRound, scales alone, same time")
    smoke += ("quest-w4a8, only the time embedding + stage 1",)
    effort, found = main(__doc__, {"components": COMPONENTS, "temporal": temporal_rows()}, "quest.json", smoke)
    console = Console(width=140)
    console.print(memory(effort), cost(found))
