"""The named recipes: our own, those of the three papers, and the baselines they are judged by."""

import json
from pathlib import Path
from typing import Any

from halfbyte.errors import RecipeError, listed
from halfbyte.recipe import INT8, LAYER_GROUPS, ActivationSpec, GridSearch, LayerOverride, LayerSpec, Recipe, WeightSpec

LZS_WEIGHT = WeightSpec("lzs4", max_shift=4)
LZS_ACTIVATION = ActivationSpec("lzs4", max_shift=4)
QUEST_WEIGHT = WeightSpec("int4", norm=2.4)
ADAROUND_WEIGHT = QUEST_WEIGHT.replace(rounding="adaround")
INTEGERS = GridSearch(("int4",), ("int4",), ("ue1m3",))  # no choice but the sign: symmetric, or unsigned with a zero point
FP4 = LayerSpec(WeightSpec("e2m1"), ActivationSpec("e2m1", scale="static"))
FP6 = LayerSpec(WeightSpec("e2m3"), ActivationSpec("e2m3", scale="static"))
FP6_SIGNED = ("e1m4", "e2m3", "e3m2", "e4m1")
FP6_UNSIGNED = ("ue1m5", "ue2m4", "ue3m3", "ue4m2")

OURS_WEIGHT = WeightSpec("e2m1", max_multiple=10)
TIMED = ("@modulation", r"\b(time|timestep|guidance)_embed(ding|der)\b")  # made from the timestep: few rows, which steer all
OURS = (  # found by bench/recipes.py; docs/log.md has every trial
    Recipe(
        "halfbyte-w4a4",
        LayerSpec(OURS_WEIGHT, ActivationSpec("e2m1", max_multiple=10)),
        after_silu=ActivationSpec("ue1m3", max_multiple=16, zero_point=True),
        overrides=tuple(LayerOverride(pattern, LayerSpec(OURS_WEIGHT, ActivationSpec("int8"))) for pattern in TIMED),
    ),
    Recipe("halfbyte-w4a8", LayerSpec(OURS_WEIGHT, ActivationSpec("int8")), after_silu=ActivationSpec("uint8", zero_point=True)),
)

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *OURS,
        Recipe("quartz-w4a4", LayerSpec(LZS_WEIGHT, LZS_ACTIVATION)),
        Recipe("quartz-w4a8", LayerSpec(LZS_WEIGHT, ActivationSpec("int8"))),
        Recipe(  # 8-bit inputs where few rows steer everything, in the text stream, and where skip connections join
            "quartz-guarded-w4a4",
            LayerSpec(LZS_WEIGHT, LZS_ACTIVATION),
            overrides=tuple(LayerOverride(f"@{group}", LayerSpec(LZS_WEIGHT, ActivationSpec("int8"))) for group in LAYER_GROUPS),
        ),
        Recipe(  # the authors' repository: group-64 scales on both sides, plain INT4 weights; simulated only
            "quartz-authors-w4a4",
            LayerSpec(
                WeightSpec("int4", scale="absmax", group=64),
                ActivationSpec("lzs4", max_shift=4, subgroup=32, peak=127, group=64),
            ),
        ),
        Recipe(  # the paper's text: min-max to 127, plain right shift
            "quartz-paper-w4a4",
            LayerSpec(
                WeightSpec("lzs4", max_shift=4, scale="absmax"),
                ActivationSpec("lzs4", max_shift=4, peak=127, rounding="truncate"),
            ),
        ),
        Recipe(  # unsigned 8 bits with a zero point where the input is a SiLU or GELU output
            "quartz-unsigned-w4a4",
            LayerSpec(LZS_WEIGHT, LZS_ACTIVATION),
            after_silu=ActivationSpec("ue1m3", max_shift=4, zero_point=True),
        ),
        Recipe("msfp-w4a4", FP4, search=GridSearch()),
        Recipe("msfp-signed-w4a4", FP4, search=GridSearch(unsigned_grids=())),  # what MSFP improves on: signed grids everywhere
        Recipe("msfp-w6a6", FP6, search=GridSearch(FP6_SIGNED, FP6_SIGNED, FP6_UNSIGNED)),  # simulated
        Recipe("quest-w8a8", LayerSpec(WeightSpec("int8", norm=2.4), ActivationSpec("int8", scale="timestep"))),
        Recipe(  # the paper's starts from AdaRound; GPTQ leaves as little and takes seconds
            "quest-w4a8", LayerSpec(QUEST_WEIGHT.replace(rounding="gptq"), ActivationSpec("int8", scale="timestep"))
        ),
        Recipe("quest-w4a4", LayerSpec(QUEST_WEIGHT, ActivationSpec("int4", scale="timestep")), search=INTEGERS),
        Recipe("quest-paper-w4a4", LayerSpec(QUEST_WEIGHT, ActivationSpec("int4", scale="static")), search=INTEGERS),
        Recipe(  # Q-Diffusion: AdaRound, scales shared over time, a product for each part of a skip concatenation
            "qdiffusion-w4a8",
            LayerSpec(ADAROUND_WEIGHT, ActivationSpec("int8", scale="static")),
            search=GridSearch(("int4",), ("int8",), ("uint8",)),
            split=True,
        ),
        Recipe(
            "qdiffusion-w4a4",
            LayerSpec(ADAROUND_WEIGHT, ActivationSpec("int4", scale="static")),
            search=INTEGERS,
            split=True,
        ),
        Recipe("int4-w4a4", LayerSpec(WeightSpec("int4", scale="absmax"), ActivationSpec("int4"))),
        Recipe("int4-g64-w4a4", LayerSpec(WeightSpec("int4", scale="absmax", group=64), ActivationSpec("int4", group=64))),
        Recipe(  # Blackwell's format: blocks of 16 with e4m3 scales
            "nvfp4-w4a4",
            LayerSpec(
                WeightSpec("e2m1", scale="absmax", group=16, group_scale="e4m3"),
                ActivationSpec("e2m1", group=16, group_scale="e4m3"),
            ),
        ),
        Recipe(  # the OCP microscaling format: blocks of 32 with powers of two as scales
            "mxfp4-w4a4",
            LayerSpec(
                WeightSpec("e2m1", scale="absmax", group=32, group_scale="e8m0"),
                ActivationSpec("e2m1", group=32, group_scale="e8m0"),
            ),
        ),
        Recipe("nf4-w4a16", LayerSpec(WeightSpec("nf4", scale="absmax", group=64)), edge=None),  # QLoRA's weights
        Recipe(  # SVDQuant: smoothing, a 16-bit branch of rank 32, the rest in INT4 with group scales
            "svdquant-w4a4",
            LayerSpec(WeightSpec("int4", scale="absmax", group=64), ActivationSpec("int4", group=64), low_rank=32),
            smooth="search",
        ),
        Recipe("int8-w8a8", INT8),
    )
}


DEFAULT = "halfbyte-w4a4"


def get_recipe(recipe: "str | Path | Recipe | dict[str, Any]") -> Recipe:
    """A recipe from itself, a preset's name, a mapping, or the path of a .json, .yaml or .yml file.

    Raises:
        RecipeError: for an unknown name, an unreadable file or a recipe that does not check.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    path = Path(recipe)
    if path.suffix in (".json", ".yaml", ".yml"):
        return Recipe.from_dict(_read_mapping(path))
    if str(recipe) not in PRESETS:
        raise RecipeError(f"unknown recipe {str(recipe)!r}; the presets are {listed(PRESETS)}, or give a .json or .yaml file")
    return PRESETS[str(recipe)]


def _read_mapping(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that cannot be
        raise RecipeError(f"recipe file {path} cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise RecipeError(f"recipe file {path} is not JSON: {error}") from error
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99
        raise RecipeError(f"recipe file {path} is not YAML: {error}") from error
