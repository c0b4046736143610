"""One double-stream and one single-stream block of FLUX's shape in plain torch, for machines without diffusers.

Widths, heads and the order of operations are those of FLUX.1 (Black Forest Labs 2024): 3072 wide, 24 heads, a four times wider MLP,
queries and keys normed and rotated, every block modulated by the embedded timestep.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TOKENS, WORDS = 3072, 24, 4096, 512  # tokens of a picture of 1024x1024, and of its text


class Attention(nn.Module):
    """Queries, keys and values of one stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in "qkv")
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in "qk")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, t, c) to three (b, heads, t, c / heads)."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class Stream(nn.Module):
    """What the picture and the text each have of their own in a double-stream block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation, self.attention = nn.Linear(width, 6 * width), Attention(width, heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_up = parts
        x = x + gate * self.to_out(attended)
        inner = self.up(self.norm(x) * (1 + scale) + shift)
        return x + gate_up * self.down(F.gelu(inner, approximate="tanh"))  # type: ignore[no-any-return]


class FluxPair(nn.Module):
    """Takes hidden_states (b, tokens, 64), encoder_hidden_states (b, words, 4096), temb (b, c), rotation (2, t, c / heads)."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder, self.proj_out = nn.Linear(64, width), nn.Linear(4096, width), nn.Linear(width, 64)
        self.picture, self.text = Stream(width, heads), Stream(width, heads)
        self.modulation, self.attention = nn.Linear(width, 3 * width), Attention(width, heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_mlp, self.proj_single = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
        temb, words = F.silu(temb)[:, None], encoder_hidden_states.shape[1]
        x, text = self.both_streams(self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states), temb, rotation)
        x = self.one_stream(torch.cat((text, x), 1), temb, rotation)
        return self.proj_out(x[:, words:])  # type: ignore[no-any-return]

    def both_streams(self, x: Tensor, text: Tensor, temb: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        streams, parts, made = ((self.text, text), (self.picture, x)), [], []
        for stream, tokens in streams:
            shift, scale, *rest = stream.modulation(temb).chunk(6, -1)
            parts.append(rest)
            made.append(stream.attention(stream.norm(tokens) * (1 + scale) + shift))
        attended = attend(rotation, *(torch.cat(both, 2) for both in zip(*made, strict=True)))
        split = attended.split((text.shape[1], x.shape[1]), 1)
        found = [stream.finish(tokens, y, part) for (stream, tokens), y, part in zip(streams, split, parts, strict=True)]
        return found[1], found[0]

    def one_stream(self, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(temb).chunk(3, -1)
        normed = self.norm(x) * (1 + scale) + shift
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")
        attended = attend(rotation, *self.attention(normed))
        return x + gate * self.proj_single(torch.cat((attended, mlp), -1))  # type: ignore[no-any-return]


def attend(rotation: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, heads, t, c) to (b, t, heads * c)."""
    return F.scaled_dot_product_attention(rotated(q, rotation), rotated(k, rotation), v).transpose(1, 2).flatten(2)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of pairs of neighbouring channels."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), -1).flatten(-2)
    return (x.float() * rotation[0] + turned * rotation[1]).to(x.dtype)


def arguments(width: int = WIDTH, heads: int = HEADS, tokens: int = TOKENS, words: int = WORDS) -> dict[str, Any]:
    """Of one call, bfloat16."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    angles = torch.randn(tokens + words, width // heads, generator=draw)
    return {
        "hidden_states": noise(1, tokens, 64),
        "encoder_hidden_states": noise(1, words, 4096),
        "temb": noise(1, width),
        "rotation": torch.stack((angles.cos(), angles.sin())),
    }
