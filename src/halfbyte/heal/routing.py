"""Which LoRA serves which timestep: the router of TALoRA, and how rows of mixed timesteps find their weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, HealError
from halfbyte.heal.scales import SCALE_RATE
from halfbyte.timestep import timestep_argument

FEATURES = 64  # of a timestep, as the router sees it
SCALE = 1000.0  # timesteps in fractions of 1 are stretched to this for those features


@dataclass(frozen=True)
class LoRASettings:
    """Size of the hub, and who chooses.

    Raises:
        HealError: for values that make no sense.
    """

    loras: int = 2
    rank: int = 16
    routing: Literal["router", "split"] = "router"  # split: equal parts of the timesteps, fixed
    hidden: int = 64  # width of the router
    router_every: int = 4  # optimizer steps between two of the router
    router_rate: float = 0.3  # its learning rate, over that of the LoRAs
    scale_rate: float = SCALE_RATE  # relative change of an input's scale where a weight moves by one step; 0: as calibrated
    affine: bool = True  # learn biases, and the gains and offsets of norms, too

    def __post_init__(self) -> None:
        if self.routing not in ("router", "split"):
            raise HealError(f"routing must be 'router' or 'split', got {self.routing!r}")
        for name in ("loras", "rank", "hidden", "router_every", "router_rate"):
            if not 0 < getattr(self, name) <= 4096:
                raise HealError(f"{name} must be 1 to 4096, got {getattr(self, name)!r}")
        if not 0 <= self.scale_rate < math.inf:
            raise HealError(f"scale_rate must be >= 0, got {self.scale_rate!r}")
        if self.loras > 255:
            raise HealError(f"loras must be 1 to 255, got {self.loras}")


class Routing(nn.Module):
    """Which LoRA serves which row of the denoiser's call under way; a module of the student, called before its forward.

    Args:
        layers: how many layers choose.
        timesteps: ascending; those that the finished tables will have an entry for. Calls in between use the next one above.
    """

    timesteps: Tensor  # float64 (T,)
    features: Tensor  # float32 (T, FEATURES)
    prior: Tensor  # float32 (T, H)

    def __init__(self, layers: int, timesteps: Sequence[float], settings: LoRASettings) -> None:
        super().__init__()
        self.settings, self.layers = settings, layers
        times = torch.tensor(timesteps, dtype=torch.float64)
        self.register_buffer("timesteps", times, persistent=False)
        self.register_buffer("features", _features(times), persistent=False)
        self.register_buffer("prior", _prior(len(timesteps), settings.loras), persistent=False)
        if settings.routing == "router" and settings.loras > 1:
            self.inner = nn.Linear(FEATURES, settings.hidden)
            self.outer = nn.Linear(settings.hidden, layers * settings.loras)
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        self.argument: tuple[str, int] = ("", 0)
        self.listening = False  # whether this step teaches the router
        self.probability: Tensor | None = None  # float32 (rows, L, H)
        self.chosen: Tensor | None = None  # int64 (rows, L), on the CPU

    @property
    def learns(self) -> bool:
        return hasattr(self, "inner")

    def forward(self, index: Tensor) -> Tensor:
        """Softmax over the LoRAs, float32 (rows, L, H), at entries of `timesteps`, int64 (rows,)."""
        logits = self.prior[index][:, None].expand(-1, self.layers, -1)
        if self.learns:
            hidden = nn.functional.silu(self.inner(self.features[index]))
            logits = logits + self.outer(hidden).view(-1, self.layers, self.settings.loras)
        return logits.softmax(-1)

    def listen(self, denoiser: nn.Module) -> Any:
        """Choose before every call of a denoiser; returns the hook's handle."""
        self.argument = timestep_argument(denoiser)
        return denoiser.register_forward_pre_hook(self._choose, with_kwargs=True, prepend=True)

    def _choose(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self.argument
        value = torch.as_tensor(kwargs[name] if name in kwargs else args[position]).detach().reshape(-1)
        values = value.to(self.timesteps.device, torch.float64)
        index = torch.searchsorted(self.timesteps, values).clamp(max=len(self.timesteps) - 1)
        with torch.autocast(index.device.type, enabled=False), torch.set_grad_enabled(self.listening and torch.is_grad_enabled()):
            self.probability = self(index)
        self.chosen = self.probability.detach().argmax(-1).cpu()

    def of(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """For the rows of a layer's input: their LoRAs, int64 on the CPU (rows,), and all probabilities, float32 (rows, H).

        Raises:
            CalibrationError: outside a call, or when the rows are no multiple of the call's timesteps.
        """
        if self.chosen is None or self.probability is None:
            raise CalibrationError("no timestep is known yet: the layer was called outside its denoiser")
        repeats, rest = divmod(rows, len(self.chosen))
        if rest:
            raise CalibrationError(
                f"a layer got {rows} rows in a call with {len(self.chosen)} timesteps; whose they are is unknown"
            )
        return self.chosen[:, layer].repeat_interleave(repeats), self.probability[:, layer].repeat_interleave(repeats, 0)

    @torch.no_grad()
    def table(self) -> Tensor:
        """The choice of every layer at every timestep, uint8 (L, T)."""
        probability: Tensor = self(torch.arange(len(self.timesteps), device=self.timesteps.device))
        return probability.argmax(-1).T.to("cpu", torch.uint8).contiguous()


def _features(times: Tensor) -> Tensor:
    """Sine and cosine features of timesteps (Vaswani et al. 2017)."""
    stretched = times.float() * (SCALE if float(times.max()) <= 1 else 1.0)
    angles = stretched[:, None] * torch.exp(torch.arange(FEATURES // 2) * (-math.log(10000.0) / (FEATURES // 2)))
    return torch.cat([angles.cos(), angles.sin()], 1)


def _prior(count: int, loras: int) -> Tensor:
    """Logits (T, H) that split the timesteps equally: each LoRA's fall off with the distance from the middle of its part."""
    place = (torch.arange(count) + 0.5) / count * loras
    return -(place[:, None] - (torch.arange(loras) + 0.5)).square()


def by_choice(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`operation(rows, number)` on the rows of x that chose each number, in the order of x.

    Rows in the order of their timesteps mostly lie together already; slices need no copies, which gathered rows do.

    Args:
        x: (rows, ...). chosen: integers (rows,) on the CPU.
    """
    runs, lengths = chosen.unique_consecutive(return_counts=True)
    numbers = runs.unique().tolist()
    if len(numbers) == 1:
        return operation(x, numbers[0])
    if len(runs) == len(numbers):
        parts = zip(x.split(lengths.tolist()), runs.tolist(), strict=True)
        return torch.cat([operation(part, number) for part, number in parts])
    places = [(chosen == number).nonzero().flatten().to(x.device) for number in numbers]
    gathered = [operation(x.index_select(0, place), number) for place, number in zip(places, numbers, strict=True)]
    return torch.cat(gathered).index_select(0, torch.cat(places).argsort())
