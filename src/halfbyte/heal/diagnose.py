"""Where numbers stopped being numbers: one more forward pass, watched layer by layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.heal.states import Batch


def culprit(model: nn.Module, batches: Sequence[Batch], losses: Sequence[Tensor]) -> str:
    """The first tensor of a model that is not finite, in words, and the timestep it was met at.

    Args:
        model: with the gradients of the failed step still on its parameters.
        batches, losses: of that step; losses (rows,) a batch.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds NaN or infinite values already"
    for batch, loss in zip(batches, losses, strict=True):
        layer = _first_layer(model, batch)
        bad = (~loss.isfinite()).nonzero()
        row = int(bad[0]) if len(bad) else int(loss.argmax())
        where = f"timestep {float(batch.timesteps[row]):g}"
        if layer is not None:
            return f"the first values that are not finite come out of layer {layer!r}, at {where}"
        if len(bad):
            return f"all layers are finite, but not the loss, at {where}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the loss is finite, but not the gradient of {name}, near {where}"
    return f"the loss overflowed near {where}"


@torch.no_grad()
def _first_layer(model: nn.Module, batch: Batch) -> str | None:
    """The first module without children whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return look

    leaves = [(name, module) for name, module in model.named_modules() if name and not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
