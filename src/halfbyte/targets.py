"""What is known of architectures by class name: which layers are its edges, which read the output of a SiLU or GELU, which carry
the timestep.

Patterns are regular expressions searched in the dotted layer name. A class that is not listed falls back to order: its first and
last layer are the edges (see `conversion`).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Patterns of one architecture."""

    edges: tuple[str, ...]  # first and last layers, held at 8 bits
    after_silu: tuple[str, ...] = ()  # inputs are one-sided: outputs of SiLU or GELU
    temporal: tuple[str, ...] = ()  # inputs depend on the timestep and not on the sample; empty: not known

    def is_edge(self, name: str) -> bool:
        return _matches(self.edges, name)

    def is_after_silu(self, name: str) -> bool:
        return _matches(self.after_silu, name)

    def is_temporal(self, name: str) -> bool:
        return _matches(self.temporal, name)


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


_RESNET = (r"resnets\.\d+\.(conv1|conv2|time_emb_proj)$", r"(time|add)_embedding\.linear_2$", r"^conv_out$")
_EMBEDDERS = (r"(timestep|text|guidance)_embedder\.linear_2$",)
_GELU_FEED_FORWARD = (r"\.ff(_context)?\.net\.2$",)

_TIMESTEP = (r"(^|\.)timestep_embedder\.",)

UNET = Target(edges=(r"^conv_in$", r"^conv_out$"), after_silu=_RESNET, temporal=(r"^time_embedding\.", r"\.time_emb_proj$"))
TARGETS: dict[str, Target] = {
    "UNet2DModel": UNET,  # DDPM, LDM
    "UNet2DConditionModel": UNET,  # SD 1.x, 2.x, SDXL; its feed-forwards are GEGLU, whose product is two-sided
    "DiTTransformer2DModel": Target(
        edges=(r"^pos_embed\.proj$", r"^proj_out_2$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"norm1\.linear$", r"^proj_out_1$"),
        temporal=(*_TIMESTEP, r"norm1\.linear$", r"^proj_out_1$"),
    ),
    "PixArtTransformer2DModel": Target(
        edges=(r"^pos_embed\.proj$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"^adaln_single\.linear$", r"^caption_projection\.linear_2$"),
        temporal=(*_TIMESTEP, r"^adaln_single\.linear$"),
    ),
    "SanaTransformer2DModel": Target(  # its feed-forward is a gated convolution; only the depthwise layer reads a plain SiLU
        edges=(r"^patch_embed\.proj$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, r"^time_embed\.linear$", r"^caption_projection\.linear_2$", r"\.ff\.conv_depth$"),
        temporal=(*_TIMESTEP, r"^time_embed\.linear$"),
    ),
    "SD3Transformer2DModel": Target(
        edges=(r"^pos_embed\.proj$", r"^context_embedder$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"norm1(_context)?\.linear$", r"^norm_out\.linear$"),
        temporal=(*_TIMESTEP, r"norm1(_context)?\.linear$", r"^norm_out\.linear$"),
    ),
    "FluxTransformer2DModel": Target(  # single blocks join attention and GELU before proj_out: two-sided
        edges=(r"^x_embedder$", r"^context_embedder$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"norm1?(_context)?\.linear$", r"^norm_out\.linear$"),
        temporal=(*_TIMESTEP, r"norm1?(_context)?\.linear$", r"^norm_out\.linear$"),
    ),
}

TARGETS |= {
    "AuraFlowTransformer2DModel": Target(
        edges=(r"^pos_embed\.proj$", r"^context_embedder$", r"^proj_out$"),
        after_silu=(r"^time_step_proj\.linear_2$", r"norm1(_context)?\.linear$", r"^norm_out\.linear$"),
    ),
    "HunyuanDiT2DModel": Target(
        edges=(r"^pos_embed\.proj$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"extra_embedder\.linear_2$", r"norm1\.linear$", r"^norm_out\.linear$"),
    ),
    "CogVideoXTransformer3DModel": Target(
        edges=(r"^patch_embed\.text_proj$", r"^patch_embed\.proj$", r"^proj_out$"),
        after_silu=(r"^time_embedding\.linear_2$", *_GELU_FEED_FORWARD, r"norm[12]\.linear$", r"^norm_out\.linear$"),
    ),
    "WanTransformer3DModel": Target(  # its first layer is a 3-D convolution, which stays in float
        edges=(r"^patch_embedding$", r"^proj_out$"),
        after_silu=(r"(time|text)_embedder\.linear_2$", r"time_proj$", r"\.ffn\.net\.2$"),
    ),
    "LTXVideoTransformer3DModel": Target(
        edges=(r"^proj_in$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, *_GELU_FEED_FORWARD, r"^time_embed\.linear$", r"^caption_projection\.linear_2$"),
    ),
    "LuminaNextDiT2DModel": Target(
        edges=(r"^patch_embedder\.proj$", r"^norm_out\.linear_2$"),
        after_silu=(*_EMBEDDERS, r"norm1\.linear$", r"^norm_out\.linear_1$"),
    ),
    "Lumina2Transformer2DModel": Target(
        edges=(r"^x_embedder$", r"caption_embedder\.1$", r"^norm_out\.linear_2$"),
        after_silu=(*_EMBEDDERS, r"norm1\.linear$", r"^norm_out\.linear_1$"),
    ),
    "QwenImageTransformer2DModel": Target(
        edges=(r"^img_in$", r"^txt_in$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, r"\.(img|txt)_mod\.1$", r"\.(img|txt)_mlp\.net\.2$", r"^norm_out\.linear$"),
    ),
    "ZImageTransformer2DModel": Target(
        edges=(r"^all_x_embedder\.[\d-]+$", r"^cap_embedder\.1$", r"^all_final_layer\.[\d-]+\.linear$"),
        after_silu=(r"^t_embedder\.mlp\.2$", r"^all_final_layer\.[\d-]+\.adaLN_modulation\.1$"),
    ),
    "Flux2Transformer2DModel": Target(  # its feed-forwards are SwiGLU, whose product is two-sided
        edges=(r"^x_embedder$", r"^context_embedder$", r"^proj_out$"),
        after_silu=(*_EMBEDDERS, r"stream_modulation(_img|_txt)?\.linear$", r"^norm_out\.linear$"),
    ),
}

GROUPS = {  # what a recipe means by "@modulation" and so on, in any architecture -> patterns of layer names
    "modulation": (  # scales and shifts made from the timestep: few rows, seen by every token
        r"norm\w*\.linear(_1)?$", r"modulation(_img|_txt)?\b", r"_mod\.\d+$", r"adaln_single\.linear$", r"time_emb_proj$",
        r"\btime_proj$", r"^time_embed\.linear$",
    ),
    "text": (  # the text stream and what embeds the prompt
        r"add_[kqv]_proj$", r"to_add_out$", r"ff_context\b", r"context_embedder", r"\btxt_\w+", r"caption_(projection|embedder)",
        r"context_refiner", r"text_(embedder|proj)", r"^cap_embedder", r"norm1_context",
    ),
    "skip": (r"up_blocks\.\d+\.resnets\.\d+\.(conv1|conv_shortcut)$", r"skip_linear$"),  # read a concatenation with an early output
}  # fmt: skip

FAMILIES = {  # in words -> patterns of layer names; the first that matches counts
    "time embedding": (r"time_emb", r"(timestep|time|add)_embedd", r"norm\w*\.linear", r"adaln", r"emb_layers"),
    "attention input": (r"(to|add)_[qkv](kv)?(_proj)?$", r"\b(q|k|v|qkv|query|key|value|in)_?(proj)?$"),
    "attention output": (r"to_(add_)?out", r"out_proj$", r"proj_attn$"),
    "feed-forward": (r"\bff", r"mlp", r"feed_?forward", r"proj_mlp"),
    "shortcut": (r"shortcut", r"skip"),
    "resampling": (r"(down|up)samplers?\b",),
}


def matches(pattern: str, name: str) -> bool:
    """Whether a recipe's pattern means a layer: a regular expression searched in its name, or "@" and a name of GROUPS."""
    return _matches(GROUPS[pattern[1:]], name) if pattern.startswith("@") else re.search(pattern, name) is not None


def family_of(name: str, layer: object) -> str:
    """What a layer is for, by its name; by its class, such as "convolution", where the name says nothing."""
    found = next((family for family, patterns in FAMILIES.items() if _matches(patterns, name)), None)
    return found or ("convolution" if "Conv" in type(layer).__name__ else "linear")
