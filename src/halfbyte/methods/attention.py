"""Attention's two matrix products in low precision, simulated: the softmax output, and queries, keys and values where asked.

    P = softmax(Q K^T / sqrt(d))            O = P V

Values are rounded, the products stay in float. Q K^T sums over the d channels of a head: a scale for each token of Q and of K. P V
sums over the tokens of V: a scale for each row of P, whose largest probability maps to the top level, and for each channel of V.
(One scale for all rows loses rows over many tokens altogether: 4096 equal probabilities are all below half of 1 / 255.)

All in 8 bits (`recipe.INTEGERS`) it is not simulated but computed in integers, by runtime/attention.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import get_grid
from halfbyte.quantizers import absmax_scale, round_activation, straight_through
from halfbyte.recipe import ActivationSpec, AttentionSpec


def round_rows(x: Tensor, grid: str) -> Tensor:
    """Values rounded with a scale for every vector along the last axis; float32, gradients pass straight through.

    Unsigned grids are for values >= 0; their scale maps the largest value to the top level, and 0 stays 0.
    """
    values = x.detach().float()
    rows = values.reshape(-1, 1, values.shape[-1])
    if get_grid(grid).signed:
        rounded = round_activation(rows, ActivationSpec(grid))
    else:
        top = get_grid(grid).top
        scale = absmax_scale(rows[:, 0], top)[:, None, None]
        rounded = (rows / scale).round().clamp(0, top) * scale
    return straight_through(x.float(), rounded.view(values.shape))


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    spec: AttentionSpec,
) -> Tensor:
    """`scaled_dot_product_attention` with rounded operands, in float32.

    Args:
        query: float (..., L, d). key: float (..., S, d). value: float (..., S, e). The others: as there.
    Returns:
        As the query's dtype, (..., L, e).
    """
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    q, k, v = query.float(), key.float(), value.float()
    if spec.operands is not None:
        q, k = round_rows(q, spec.operands), round_rows(k, spec.operands)
        v = round_rows(v.transpose(-1, -2), spec.operands).transpose(-1, -2)
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = F.dropout(scores.softmax(-1), dropout_p)
    if spec.softmax is not None:
        weights = round_rows(weights, spec.softmax)
    return (weights @ v).to(query.dtype)
