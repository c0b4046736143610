"""Attention of diffusers models, replaced by another: every module whose processor calls `scaled_dot_product_attention`.

That function of torch is intercepted while such a module runs, there and only there. What takes its place is `integer_attention`,
or for grids that no kernel runs the simulation of methods/attention.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfbyte.errors import ModelError
from halfbyte.quantizers import straight_through
from halfbyte.runtime.attention import attention

MARK = "_halfbyte_attention"  # on modules whose attention is replaced: an `Interception`
SDPA = Callable[..., Tensor]  # as `scaled_dot_product_attention`


def integer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in integers; gradients are those of attention in float.

    Args:
        query: float (..., L, d). key: float (..., S, d). value: float (..., S, e). The others: as there.
    Returns:
        As the query's dtype, (..., L, e).
    Raises:
        ModelError: for dropout above 0.
    """
    if dropout_p:
        raise ModelError(f"attention in integers has no dropout, got {dropout_p}; call eval() on the model")
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    bias = attn_mask
    if is_causal:
        bias = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -math.inf)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        exact = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
        return straight_through(exact, attention(query.detach(), key.detach(), value.detach(), scale, bias))
    return attention(query, key, value, scale, bias)


class _Intercepted(TorchFunctionMode):
    """While entered, `scaled_dot_product_attention` is another function."""

    def __init__(self, instead: SDPA) -> None:
        super().__init__()
        self.instead, self.calls = instead, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        return self.instead(*args, **(kwargs or {}))


class Interception:
    """What an attention module runs in place of its class's forward.

    Args:
        name: of the module, for messages. instead: what is called in place of `scaled_dot_product_attention`.
    """

    def __init__(self, module: nn.Module, name: str, instead: SDPA) -> None:
        self.module, self.forward, self.name, self.instead = module, module.forward, name, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = _Intercepted(self.instead)
        with mode:
            output = self.forward(*args, **kwargs)
        if not mode.calls:
            processor = type(getattr(self.module, "processor", None)).__name__
            raise ModelError(
                f"the attention {self.name!r} cannot be quantized: its {processor} does not call torch's "
                "scaled_dot_product_attention; set a processor that does, or add its name to the recipe's keep"
            )
        return output


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a diffusers model, by name: those that take a processor."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and hasattr(module, "processor") and hasattr(module, "set_processor")
    }


def replace_attention(model: nn.Module, names: Iterable[str], instead: SDPA = integer_attention) -> None:
    """Have the named attention modules call another function, until `release_attention`.

    Raises:
        ModelError: when there are none, or one is no attention module.
    """
    release_attention(model)
    chosen, known = list(names), attention_modules(model)
    unknown = next((name for name in chosen if name not in known), None)
    if unknown is not None:
        raise ModelError(f"this {type(model).__name__} has no attention {unknown!r}")
    if not chosen:
        raise ModelError(
            f"this {type(model).__name__} has no attention of diffusers whose products could be quantized; "
            "set the recipe's attention to null"
        )
    for name in chosen:
        module = known[name]
        own = Interception(module, name, instead)
        setattr(module, "forward", own)  # noqa: B010  (mypy: a method)
        setattr(module, MARK, own)


def in_integers(model: nn.Module) -> list[str]:
    """The names of the modules whose attention is `integer_attention`."""
    found = {name: vars(module).get(MARK) for name, module in model.named_modules()}
    return [name for name, own in found.items() if own is not None and own.instead is integer_attention]


def release_attention(model: nn.Module) -> None:
    """Attention as it was before `replace_attention`."""
    for module in model.modules():
        own = vars(module).pop(MARK, None)
        if own is None:
            continue
        own.instead = F.scaled_dot_product_attention  # where others (accelerate, say) have wrapped it since
        if vars(module).get("forward") is own:
            del module.forward
