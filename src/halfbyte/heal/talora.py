"""TALoRA: a hub of H low-rank corrections for every quantized layer, and a router that picks one of them by the timestep.

    weight of layer l at timestep t:    Q(W + B_h A_h)      h = argmax of router(t)[l]

The sum is rounded, so after training each chosen correction melts into the 4-bit weights: run time costs nothing, storage grows to
as many weight sets as were ever chosen. The router is one small network for the whole model, from features of the timestep to a
softmax over H for every layer; its choice is hard, and its gradient that of the softmax (straight-through).

The paper's hub size, rank and router are not public. Decided here:

- Corrections are measured in quantization steps: B_h A_h is multiplied by each output channel's own step (from the error its
  rounding leaves), so one learning rate suits every layer. Weight scales stay as calibrated.
- The router starts at an equal split of the timesteps, through a fixed prior on its logits. From random weights one LoRA tends to
  serve all timesteps, the others never learn, and so are never chosen.
- The router's gradient needs what the other LoRAs would have done: one more product a layer. It is taken every few steps only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, HealError
from halfbyte.formats import get_grid
from halfbyte.heal.distill import Method, mean_square
from halfbyte.heal.states import Batch, prediction
from halfbyte.layers import FAKE_QUANT, FakeQuant, apply_layer, follow_timesteps, matrix_to_weight, weight_to_matrix
from halfbyte.timestep import timestep_argument

ROUTING = "talora_routing"  # the name of the router among the student's modules
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

    def __post_init__(self) -> None:
        if self.routing not in ("router", "split"):
            raise HealError(f"routing must be 'router' or 'split', got {self.routing!r}")
        for name in ("loras", "rank", "hidden", "router_every", "router_rate"):
            if not 0 < getattr(self, name) <= 4096:
                raise HealError(f"{name} must be 1 to 4096, got {getattr(self, name)!r}")
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


class LoRALayer(FakeQuant):
    """A trainable quantized layer with a hub of LoRAs inside its quantizer; mixed into the torch layer class that names its kind.

    The hub is low-rank in the weight as a matrix (O, K): for a convolution A is a convolution with the layer's kernel, B a 1x1 one.
    """

    lora_a: nn.Parameter  # float32 (H, r, K)
    lora_b: nn.Parameter  # float32 (H, O, r)
    unit: Tensor  # float32 (O, 1): what a product B A of 1 adds to a weight
    number: int  # of this layer in the router's output

    @classmethod
    def wrap(cls, layer: FakeQuant, number: int, routing: Routing) -> Any:
        """A layer like the given one, with a new hub: A random, B zero, so that it computes the same."""
        made = cls.from_float(layer, layer.spec, layer.weight_scale)  # type: ignore[arg-type]
        for name in ("input_scale", "activation_scale", "activation_zero"):
            setattr(made, name, getattr(layer, name))
        made.timestep = layer.timestep
        matrix = weight_to_matrix(made, made.weight.detach().float())
        (rows, count), settings = matrix.shape, routing.settings
        rank = min(settings.rank, rows, count)
        made.lora_a = nn.Parameter(matrix.new_empty(settings.loras, rank, count))
        for hub in made.lora_a:
            nn.init.kaiming_uniform_(hub.data, a=math.sqrt(5))
        made.lora_b = nn.Parameter(matrix.new_zeros(settings.loras, rows, rank))
        noise = (made.quantized_weight().dequantize() - matrix).square().mean(1, keepdim=True)
        step = torch.where(noise > 0, (12 * noise).sqrt(), made.weight_scale.amax(1, keepdim=True))
        made.register_buffer("unit", step * math.sqrt(3 * count / rank), persistent=False)  # A has variance 1 / (3 K)
        made.number = number
        object.__setattr__(made, "routing", routing)  # not a child: the student holds it once
        return made

    def correction(self, hub: int) -> Tensor:
        """B_h A_h, shaped as the weight."""
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return matrix_to_weight(self, self.lora_b[hub] @ self.lora_a[hub] * self.unit)  # type: ignore[arg-type]

    def healed_weight(self, hub: int) -> Tensor:
        """W + B_h A_h, not rounded."""
        return self.weight + self.correction(hub)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        routing: Routing = self.routing  # type: ignore[attr-defined]
        chosen, probability = routing.of(self.number, x.shape[0])
        x = self.rounded_input(x)

        def operation(part: Tensor, hub: int) -> Tensor:
            return apply_layer(self, part, self.rounded_weight(self.healed_weight(hub)), self.bias)

        y = by_choice(x, chosen, operation)
        if probability.requires_grad:
            corrections = [self.correction(hub).detach() for hub in range(len(self.lora_a))]
            y = _RouterGradient.apply(y, probability, x.detach(), self, corrections)
        return y


KINDS: dict[type, type[LoRALayer]] = {
    kind: type(f"LoRA{layer.__name__}", (LoRALayer, layer), {"__doc__": f"{layer.__name__} with a hub of LoRAs."})
    for kind, layer in FAKE_QUANT.items()
}


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


class _RouterGradient(torch.autograd.Function):
    """The layer's output forward; backward, for every row and LoRA h, how much B_h A_h in place of B_0 A_0 would raise the loss.

    That is the gradient of the softmax's one-hot straight-through weights, up to a constant a row, to which softmax is blind.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, probability: Tensor, x: Tensor, layer: Any, corrections: list[Tensor]) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.layer, ctx.corrections = layer, corrections
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), first = ctx.saved_tensors, ctx.corrections[0]
        scores = [torch.zeros(len(x), device=x.device)]
        for correction in ctx.corrections[1:]:
            change = apply_layer(ctx.layer, x, (correction - first).to(x.dtype), None)
            scores.append((gradient.float() * change.float()).flatten(1).sum(1))
        return gradient, torch.stack(scores, 1), None, None, None


class TALoRA(Method):
    """Put hubs into a student, train them and the router, and melt them into the weights.

    Args:
        student: with trainable quantized layers, which are replaced in place.
        timesteps: ascending, as the denoiser takes them: the entries of the finished tables.
        gamma: float32 (T,): weight of the loss at each of them; None: 1.
    Raises:
        HealError: when the student has no layer to put LoRAs into.
    """

    name = "talora"

    def __init__(
        self, student: nn.Module, timesteps: Sequence[float], settings: LoRASettings, gamma: Tensor | None = None, seed: int = 0
    ) -> None:
        self.student, self.settings, self.gamma = student, settings, gamma
        self.before: dict[str, Any] = lora_targets(student)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.routing = Routing(len(self.before), timesteps, settings).to(next(student.parameters()).device)
            self.layers: dict[str, Any] = {}
            for number, (name, layer) in enumerate(self.before.items()):
                kind = next(kind for kind in KINDS if isinstance(layer, kind))
                self.layers[name] = KINDS[kind].wrap(layer, number, self.routing)
        replace(student, self.layers)
        student.add_module(ROUTING, self.routing)
        self.handle = self.routing.listen(student)

    def trained(self) -> dict[str, float]:
        rates = {}
        for name, layer in self.layers.items():
            rates[f"{name}.lora_a"] = 1 / math.sqrt(layer.lora_a.shape[-1])  # as large as its entries are
            rates[f"{name}.lora_b"] = 1.0
        if self.routing.learns:
            rates |= {f"{ROUTING}.{name}": self.settings.router_rate for name, _ in self.routing.named_parameters()}
        return rates

    def identity(self) -> dict[str, Any]:
        weights = None if self.gamma is None else [round(float(self.gamma[index]), 5) for index in (0, len(self.gamma) // 2, -1)]
        return {"name": self.name, **asdict(self.settings), "gamma": weights}

    def before_step(self, step: int) -> None:
        self.routing.listening = self.routing.learns and step % self.settings.router_every == 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = mean_square(prediction(model(*batch.args, **batch.kwargs)), batch.target)
        if self.gamma is None:
            return losses
        times = self.routing.timesteps
        index = torch.searchsorted(times, batch.timesteps.to(times)).clamp(max=len(times) - 1)
        return losses * self.gamma.to(losses.device)[index]

    @torch.no_grad()
    def melt(self) -> dict[str, Tensor]:
        """Replace the hubs by the weights they lead to, those that any timestep chooses.

        Returns:
            By layer: the choice at every timestep, uint8 (T,), numbered within the layer's own weight sets.
        """
        choices = {}
        for row, (name, layer) in zip(self.routing.table(), self.layers.items(), strict=True):
            used, choice = row.unique(return_inverse=True)
            weights = [layer.healed_weight(hub).detach() for hub in used.tolist()]
            if len(weights) == 1:
                self.before[name].weight = nn.Parameter(weights[0], requires_grad=False)
            else:
                self.before[name].set_weights(torch.stack(weights), choice.to(weights[0].device))
            choices[name] = choice.to(torch.uint8)
        self.handle.remove()
        delattr(self.student, ROUTING)
        replace(self.student, self.before)
        if any(len(choice.unique()) > 1 for choice in choices.values()):
            follow_timesteps(self.student, self.routing.timesteps.tolist())
        return choices


def lora_targets(student: nn.Module) -> dict[str, Any]:
    """The layers that get LoRAs, by name: quantized, with weights of fewer than 8 bits.

    Raises:
        HealError: when there is none, or one holds several weights already.
    """
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, FakeQuant)}
    if not layers:
        raise HealError(
            f"this {type(student).__name__} has no trainable quantized layers; run halfbyte.quantize with simulate=True on it first"
        )
    found = {name: layer for name, layer in layers.items() if get_grid(layer.spec.weight.grid).bits < 8}
    if not found:
        raise HealError(
            f"none of the {len(layers)} quantized layers has weights of fewer than 8 bits, so there is nothing to heal; choose "
            "another recipe"
        )
    healed = next((name for name, layer in found.items() if layer.spec.weight.sets > 1), None)
    if healed is not None:
        raise HealError(f"{healed} holds several weights already; heal the model as it was quantized, not a healed one")
    return found


def replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in place of those of the same names, and in every other place those are used in."""
    old = {model.get_submodule(name): layer for name, layer in layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in old:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, old[module])
