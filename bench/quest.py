"""QuEST's ablations on the demo model: what each component of the selective fine-tune is worth, and what the time embedding costs.

    python bench/quest.py                                both tables, three seeds
    python bench/quest.py --table components --steps 1500 --seeds 0 1 -o quest.json
    python bench/quest.py --table temporal

`components` adds temporal alignment, critical modules and the global loss one after the other, as table 8 of arXiv 2402.03666 does
(LSUN-Bedrooms, W4A8, FID), and trains all layers for the same time. `temporal` quantizes the path of the time embedding alone, and
everything but it (the paper's property 1, LDM-4), and heals with stage 1. Published distances are of another data set and in other
features than ours; compare how rows follow each other. Then memory of a step, beside that of the float model with the same weights
trained. Runs that are in the output file already are not made again.
"""

import re

from halfbyte import demo
from halfbyte.bench.ablation import Row, main
from halfbyte.conversion import quantizable_layers
from halfbyte.recipe import Recipe, get_recipe
from halfbyte.targets import TARGETS

LOCAL = {"method": "quest", "global_weight": 0.0}
STAGE_1 = {"method": "quest", "stages": "temporal"}
COMPONENTS = {
    "not healed": Row("quest-w4a4", published="6.95"),
    "scales alone": Row("quest-w4a4", {"method": "quest", "share": 0.0}),
    "+ temporal": Row("quest-w4a4", {**LOCAL, "stages": "temporal"}, "4.41"),
    "+ critical": Row("quest-w4a4", LOCAL, ""),
    "+ global loss": Row("quest-w4a4", {"method": "quest"}, "3.26"),
    "global loss alone": Row("quest-w4a4", {"method": "quest", "local_weight": 0.0}),
    "all layers, same time": Row(
        "quest-w4a4", {"method": "quest", "stages": "full", "local_weight": 0.0}, "", as_long_as="+ global loss"
    ),
    "TALoRA, same time": Row("quest-w4a4", {"method": "talora"}, "", as_long_as="+ global loss"),
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


if __name__ == "__main__":
    main(__doc__, {"components": COMPONENTS, "temporal": temporal_rows()}, "quest.json")
