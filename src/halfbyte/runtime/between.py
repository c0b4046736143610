"""Modules between packed layers that our engine runs faster than torch does, in the 16-bit types on the CPU.

A packed model's group norms and GELUs are given another class; parameters, names and hooks stay. In float32, on other
devices, under autocast and where gradients are wanted they do what they always did. So a float32 model, packed or simulated, draws
the very same images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.runtime.pointwise import gelu, group_norm

HALVES = (torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    """Whether the engine is to run what this is the input of."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype in HALVES and not wants_gradient and not torch.is_autocast_enabled("cpu")


class GroupNorm(nn.GroupNorm):
    """A group norm by the engine, with the SiLU that follows it where it is asked for."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if takes(x):
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)
        found = super().forward(x)
        return F.silu(found) if silu else found


class GELU(nn.GELU):
    """GELU by tanh by the engine."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if takes(x) and self.approximate == "tanh" else super().forward(x)


StandIns = dict[type[nn.Module], type[nn.Module]]
STAND_INS: StandIns = {nn.GroupNorm: GroupNorm, nn.GELU: GELU}
LATER: list[Callable[[], StandIns]] = []  # those of plug-ins, imported when they are needed first


def take_over(model: nn.Module) -> None:
    """Have the engine run the modules of a model that it can, until `hand_back`.

    A model that saves itself keeps its own class, whose name it writes.
    """
    while LATER:
        STAND_INS.update(LATER.pop()())
    for module in model.modules():
        if module is not model or not hasattr(model, "save_pretrained"):
            module.__class__ = STAND_INS.get(type(module), type(module))


def hand_back(model: nn.Module) -> None:
    """The modules as they were before `take_over`."""
    known = {ours: theirs for theirs, ours in STAND_INS.items()}
    for module in model.modules():
        module.__class__ = known.get(type(module), type(module))
