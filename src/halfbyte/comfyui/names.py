"""What ComfyUI calls the tensors of a diffusers or transformers model.

ComfyUI renames the floats of diffusers' layouts while it loads them, but not the scales and marks of quantized layers; so a file
of those has to carry ComfyUI's own names, which are those of the models' authors.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from halfbyte.errors import ModelError, listed


class Place(NamedTuple):
    """Where a tensor goes."""

    name: str  # of the tensor in the file
    part: int = 0  # its turn among the tensors that are joined, row by row, under that name
    swapped: bool = False  # whether the halves of its rows trade places


class Rule(NamedTuple):
    """Modules whose name is `pattern` as a whole go to `target`, which may name its groups."""

    pattern: str
    target: str
    part: int = 0
    swapped: bool = False
    leaf: str | None = None  # what `weight` is called there


@dataclass(frozen=True)
class Layout:
    """The names of one architecture."""

    rules: Callable[[Any], list[Rule]]  # of a model's config; none: the names stay as they are
    widths: tuple[str, ...] = ()  # modules whose input width ComfyUI reads from the weight: no two codes in a byte there


def _joined(block: str, target: str, parts: tuple[str, ...]) -> list[Rule]:
    """Layers that the authors keep as one, in the order of its rows."""
    return [Rule(block + part, target, number) for number, part in enumerate(parts)]


def _flux(_: Any) -> list[Rule]:
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    rules = [
        *_joined(double + r"attn\.", r"double_blocks.\1.img_attn.qkv", ("to_q", "to_k", "to_v")),
        *_joined(double + r"attn\.", r"double_blocks.\1.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        *_joined(single, r"single_blocks.\1.linear1", (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp")),
        Rule(single + "proj_out", r"single_blocks.\1.linear2"),
        Rule(single + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
        Rule(r"norm_out\.linear", "final_layer.adaLN_modulation.1", swapped=True),  # shift before scale, in diffusers after it
    ]
    for letter, word in (("q", "query"), ("k", "key")):
        rules += [
            Rule(double + rf"attn\.norm_{letter}", rf"double_blocks.\1.img_attn.norm.{word}_norm", leaf="scale"),
            Rule(double + rf"attn\.norm_added_{letter}", rf"double_blocks.\1.txt_attn.norm.{word}_norm", leaf="scale"),
            Rule(single + rf"attn\.norm_{letter}", rf"single_blocks.\1.norm.{word}_norm", leaf="scale"),
        ]
    for stream, norm, out, feed in (("img", "norm1", r"to_out\.0", "ff"), ("txt", "norm1_context", "to_add_out", "ff_context")):
        rules += [
            Rule(double + rf"{norm}\.linear", rf"double_blocks.\1.{stream}_mod.lin"),
            Rule(double + rf"attn\.{out}", rf"double_blocks.\1.{stream}_attn.proj"),
            Rule(double + rf"{feed}\.net\.0\.proj", rf"double_blocks.\1.{stream}_mlp.0"),
            Rule(double + rf"{feed}\.net\.2", rf"double_blocks.\1.{stream}_mlp.2"),
        ]
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for number, layer in ((1, "in"), (2, "out")):
            rules.append(Rule(rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{theirs}_in.{layer}_layer"))
    plain = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    return rules + [Rule(ours, theirs) for ours, theirs in plain.items()]


UNET_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    r"conv_in": "input_blocks.0.0",
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"(?:add|class)_embedding\.linear_1": "label_emb.0.0",
    r"(?:add|class)_embedding\.linear_2": "label_emb.0.2",
    r"conv_norm_out": "out.0",
    r"conv_out": "out.2",
}


def _unet(config: Any) -> list[Rule]:
    """The authors number blocks through: a resnet (with its attention) or a change of resolution each."""
    for key, known in UNET_BLOCKS.items():
        kinds = config[key] if isinstance(config[key], (tuple, list)) else [config[key]]
        other = sorted({str(kind) for kind in kinds} - set(known))
        if other:
            raise ModelError(f"ComfyUI has no names for a UNet with {listed(other)} in {key}; it knows {listed(known)}")
    levels, depth = len(config["block_out_channels"]), config["layers_per_block"]
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    rules = [Rule(ours, theirs) for ours, theirs in UNET_ENDS.items()]
    rules += _stage("mid_block", {0: "middle_block.0", 1: "middle_block.2"}, {0: "middle_block.1"})
    first = 1
    for level, count in enumerate(depths):
        blocks = {number: f"input_blocks.{first + number}" for number in range(count)}
        rules += _stage(f"down_blocks.{level}", _within(blocks, 0), _within(blocks, 1))
        rules.append(Rule(rf"down_blocks\.{level}\.downsamplers\.0\.conv", f"input_blocks.{first + count}.0.op"))
        first += count + 1
    first = 0
    for level, count in enumerate(reversed(depths)):
        blocks = {number: f"output_blocks.{first + number}" for number in range(count + 1)}
        rules += _stage(f"up_blocks.{level}", _within(blocks, 0), _within(blocks, 1))
        after = 2 if config["up_block_types"][level].startswith("CrossAttn") else 1
        rules.append(Rule(rf"up_blocks\.{level}\.upsamplers\.0\.conv", f"{blocks[count]}.{after}.conv"))
        first += count + 1
    return rules


def _within(blocks: dict[int, str], number: int) -> dict[int, str]:
    return {key: f"{block}.{number}" for key, block in blocks.items()}


def _stage(stage: str, resnets: dict[int, str], attentions: dict[int, str]) -> list[Rule]:
    """The resnets and attentions of a stage of a UNet, by number; names within an attention are the authors'."""
    start = re.escape(stage)
    rules = [
        Rule(rf"{start}\.resnets\.{number}\.{ours}", f"{block}.{theirs}")
        for number, block in resnets.items()
        for ours, theirs in RESNET.items()
    ]
    return rules + [Rule(rf"{start}\.attentions\.{number}\.(.+)", rf"{block}.\1") for number, block in attentions.items()]


LAYOUTS = {
    "UNet2DConditionModel": Layout(_unet, (r"\.attn2\.to_k$", r"^(add|class)_embedding\.linear_1$")),  # SD 1.x, 2.x, SDXL
    "FluxTransformer2DModel": Layout(_flux, (r"^(x|context)_embedder$", r"text_embedder\.linear_1$")),
    "QwenImageTransformer2DModel": Layout(lambda _: [], (r"^(img|txt)_in$",)),
    "T5EncoderModel": Layout(lambda _: [], (".",)),
}


def layout_of(model: Any) -> Layout:
    """The names of a model's class. Raises ModelError where they are not known."""
    kind = type(model).__name__
    if kind not in LAYOUTS:
        raise ModelError(
            f"ComfyUI's names for the quantized layers of a {kind} are not known here; known are {listed(LAYOUTS)}. "
            "--layout diffusers writes its weights as floats"
        )
    return LAYOUTS[kind]


def placer(model: Any) -> Callable[[str], Place]:
    """Tensor name -> Place, for a model.

    Raises:
        ModelError: when the class is not known; the function itself does where ComfyUI has no such tensor.
    """
    kind, rules = type(model).__name__, layout_of(model).rules(model.config)
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]

    def place(name: str) -> Place:
        if not rules:
            return Place(name)
        module, _, leaf = name.rpartition(".")
        for pattern, rule in compiled:
            found = pattern.fullmatch(module)
            if found:
                leaf = rule.leaf if rule.leaf and leaf == "weight" else leaf
                return Place(f"{found.expand(rule.target)}.{leaf}", rule.part, rule.swapped)
        raise ModelError(f"ComfyUI has no place for {name!r} of a {kind}; --layout diffusers writes the model as floats")

    return place
