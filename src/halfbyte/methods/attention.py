"""Attention's two matrix products in low precision, simulated: the softmax output, and queries, keys and values where asked.

    P = softmax(Q K^T / sqrt(d))            O = P V

Both products can run in integers as long as no scale changes along what they sum over. Q K^T sums over the d channels of a head: a
scale for each token of Q and of K. P V sums over the tokens of V: a scale for each row of P, and for each channel of V. A row's
largest probability maps to the top level; as P = exp(S - max) / sum, that is the fixed scale 1 / top of a fused kernel's
unnormalized exponentials. (One scale for all rows loses rows over many tokens altogether: 4096 equal probabilities are all below
half of 1 / 255.)

No kernel here runs this: values are rounded, the products stay in float. It works for every diffusers attention whose processor
calls `torch.nn.functional.scaled_dot_product_attention`, which is intercepted there and only there.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfbyte.errors import ModelError
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


class _Intercepted(TorchFunctionMode):
    """While entered, `scaled_dot_product_attention` is `quantized_attention`."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec, self.calls = spec, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        return quantized_attention(*args, **(kwargs or {}), spec=self.spec)


class QuantizedProducts:
    """Hooks around one attention module that have its products quantized.

    Args:
        name: of the module, for messages.
    """

    def __init__(self, name: str, spec: AttentionSpec) -> None:
        self.name, self.spec = name, spec
        self.entered: list[_Intercepted] = []

    def attach(self, attention: nn.Module) -> None:
        attention.register_forward_pre_hook(self._enter)
        attention.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        mode = _Intercepted(self.spec)
        mode.__enter__()
        self.entered.append(mode)

    def _leave(self, attention: Any, _: Any, output: Any) -> None:
        mode = self.entered.pop()
        mode.__exit__(None, None, None)
        if output is not None and not mode.calls:
            raise ModelError(
                f"the attention {self.name!r} cannot be quantized: its {type(attention.processor).__name__} does not call torch's "
                "scaled_dot_product_attention; set a processor that does, or add its name to the recipe's keep"
            )


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a diffusers model, by name: those that take a processor."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and hasattr(module, "processor") and hasattr(module, "set_processor")
    }


def quantize_attention(model: nn.Module, spec: AttentionSpec, names: Iterable[str]) -> None:
    """Have the products of the named attention modules quantized, until the end of the model.

    Raises:
        ModelError: when there are none.
    """
    chosen = list(names)
    if not chosen:
        raise ModelError(
            f"this {type(model).__name__} has no attention of diffusers whose products could be quantized; "
            "set the recipe's attention to null"
        )
    for name in chosen:
        QuantizedProducts(name, spec).attach(model.get_submodule(name))
