"""Where a packed layer's codes stand: in the neutral order of the checkpoint, or in the tiles that the C++ engine reads.

Never in both, or 4 bits would take the memory of 8. The first forward re-orders the codes into tiles and drops the neutral ones;
whoever asks for the neutral ones afterwards (`state_dict`, a move to another device, `layer.weight_codes`) gets them back, bit for
bit, and the tiles are dropped in turn. So there is nothing to invalidate: neutral codes, where present, are the truth.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.runtime import cpu
from halfbyte.runtime.mapped import give_back

NEUTRAL = ("weight_codes", "weight_multiplier")
_CHANGING = threading.RLock()  # held while any layer changes its form; a thread in a forward keeps the tiles it has


class Tiled:
    """Mixed into packed layers; expects the buffers of NEUTRAL and a buffer `weight_tiles` that is not saved."""

    weight_tiles: Tensor | None  # uint8 (bytes,), or (sets, bytes)
    weight_codes: Tensor
    weight_multiplier: Tensor | None

    def tiles(self) -> Tensor:
        """The codes in the engine's order; re-orders them if they are not."""
        if not torch.compiler.is_compiling():
            return to_tiles(self)
        # Traced: the tiles are an input of the graph, like any buffer. A graph traced before there are any makes them, once; the
        # next call finds them and is traced anew.
        buffers: dict[str, Any] = self._buffers
        if buffers["weight_codes"] is None:
            return buffers["weight_tiles"]  # type: ignore[no-any-return]
        tiles = cpu.reorder(torch.ops.halfbyte.pack, buffers["weight_codes"], buffers["weight_multiplier"], self)
        buffers["weight_tiles"], buffers["weight_codes"], buffers["weight_multiplier"] = tiles, None, None
        return tiles

    def neutral(self) -> tuple[Tensor, Tensor | None]:
        """Codes and multipliers in the order of the checkpoint; they stay so."""
        buffers: dict[str, Any] = self._buffers
        if torch.compiler.is_compiling() and buffers["weight_codes"] is not None:  # traced: no locks in a graph
            return buffers["weight_codes"], buffers["weight_multiplier"]
        return self.weight_codes, self.weight_multiplier

    def to_neutral(self) -> None:
        """Codes and multipliers back in the order of the checkpoint; the tiles are dropped."""
        buffers = self.__dict__.get("_buffers", {})
        if buffers.get("weight_tiles") is None:
            return
        with _CHANGING, torch.inference_mode(False), torch.no_grad():
            if (tiles := buffers["weight_tiles"]) is None:  # another thread was faster
                return
            buffers["weight_codes"], buffers["weight_multiplier"] = cpu.from_tiles(self, tiles)
            buffers["weight_tiles"] = None

    def __getattr__(self, name: str) -> Any:
        if name not in NEUTRAL:
            return super().__getattr__(name)  # type: ignore[misc]
        with _CHANGING:
            self.to_neutral()
            return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NEUTRAL:
            self.to_neutral()  # a new tensor beside the old other one
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.to_neutral()
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _save_to_state_dict(self, *args: Any) -> None:
        with _CHANGING:
            self.to_neutral()
            super()._save_to_state_dict(*args)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.to_neutral()
        super()._load_from_state_dict(*args)  # type: ignore[misc]


def to_tiles(layer: Any) -> Tensor:
    """The layer's tiles; made from its neutral codes, which are dropped, if it holds those."""
    buffers = layer._buffers
    tiles: Tensor | None = buffers["weight_tiles"]
    if tiles is not None:
        return tiles
    if "_hf_hook" in vars(layer):  # accelerate puts buffers in place by name before every call, and takes them away after it
        return cpu.make_tiles(layer)
    with _CHANGING, torch.inference_mode(False), torch.no_grad():
        if (tiles := buffers["weight_tiles"]) is None:  # else another thread was faster
            tiles = buffers["weight_tiles"] = cpu.make_tiles(layer)
            for name in NEUTRAL:
                if buffers[name] is not None:
                    give_back(buffers[name])
                buffers[name] = None
        return tiles
