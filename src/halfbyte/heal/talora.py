"""TALoRA: a hub of H low-rank corrections for every quantized layer, and a router that picks one of them by the timestep.

    weight of layer l at timestep t:    Q(W + B_h A_h)      h = argmax of router(t)[l]

The sum is rounded, so after training each chosen correction melts into the 4-bit weights: run time costs nothing, storage grows to
as many weight sets as were ever chosen. The router is one small network for the whole model, from features of the timestep to a
softmax over H for every layer; its choice is hard, and its gradient that of the softmax (straight-through).

Each LoRA of a hub has input scales of its own, learned with it; biases are learned, and the gains and offsets of norms, which bring
every channel onto its grid. None of that costs anything at run time. The paper learns LoRAs only (`scale_rate=0, affine=False`).

The paper's hub size, rank and router are not public. Decided here:

- Corrections are measured in quantization steps: B_h A_h is multiplied by each output channel's own step (from the error its
  rounding leaves), so one learning rate suits every layer. Weight scales stay as calibrated.
- The router starts at an equal split of the timesteps, through a fixed prior on its logits. From random weights one LoRA tends to
  serve all timesteps, the others never learn, and so are never chosen.
- The router's gradient needs what the other LoRAs would have done: one more product a layer. It is taken every few steps only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import HealError
from halfbyte.formats import get_grid
from halfbyte.heal.method import Method
from halfbyte.heal.objective import Objective
from halfbyte.heal.routing import LoRASettings, Routing, by_choice
from halfbyte.heal.scales import NORM_RATE, learned_input, norm_parameters, weight_step
from halfbyte.layers import FAKE_QUANT, FakeQuant, apply_layer, follow_timesteps, input_to_rows, matrix_to_weight, weight_to_matrix
from halfbyte.quantizers import FixedScale

ROUTING = "talora_routing"  # the name of the router among the student's modules


class LoRALayer(FakeQuant):
    """A trainable quantized layer with a hub of LoRAs inside its quantizer; mixed into the torch layer class that names its kind.

    The hub is low-rank in the weight as a matrix (O, K): for a convolution A is a convolution with the layer's kernel, B a 1x1 one.
    """

    lora_a: nn.Parameter  # float32 (H, r, K)
    lora_b: nn.Parameter  # float32 (H, O, r)
    log_scale: Any  # nn.Parameter float32 (H,): log of the input's scale over the calibrated one; None where it is not learned
    unit: Tensor  # float32 (O, 1): what a product B A of 1 adds to a weight
    number: int  # of this layer in the router's output

    @classmethod
    def wrap(cls, layer: FakeQuant, number: int, routing: Routing) -> Any:
        """A layer like the given one, with a new hub: A random, B zero, so that it computes the same."""
        made = cls.like(layer)
        matrix = weight_to_matrix(made, made.weight.detach().float())
        (rows, count), settings = matrix.shape, routing.settings
        rank = min(settings.rank, rows, count)
        made.lora_a = nn.Parameter(matrix.new_empty(settings.loras, rank, count))
        for hub in made.lora_a:
            nn.init.kaiming_uniform_(hub.data, a=math.sqrt(5))
        made.lora_b = nn.Parameter(matrix.new_zeros(settings.loras, rows, rank))
        made.register_buffer("unit", weight_step(made) * math.sqrt(3 * count / rank), persistent=False)  # A has variance 1 / (3 K)
        made.register_parameter("log_scale", None)
        if settings.scale_rate and layer.activation_scale is not None:
            made.log_scale = nn.Parameter(torch.zeros(settings.loras, device=matrix.device))
        if settings.affine and layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
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

    def rounded_input(self, x: Tensor) -> Tensor:
        if self.log_scale is None:
            return super().rounded_input(x)
        chosen, _ = self.routing.of(self.number, len(x))  # type: ignore[attr-defined]
        rows = len(input_to_rows(self, x))  # type: ignore[arg-type]
        return learned_input(self, x, self.log_scale[chosen.repeat_interleave(rows // len(chosen))])

    def learned_scale(self, choice: Tensor) -> FixedScale:
        """Scales and zero points of the input where a table over time has the given choices (T,)."""
        assert self.activation_scale is not None
        scale = self.activation_scale * self.log_scale[choice].exp()
        zero = torch.zeros_like(scale) if self.activation_zero is None else self.activation_zero.expand(len(scale))
        return FixedScale(scale, zero)

    def forward(self, x: Tensor) -> Tensor:
        routing: Routing = self.routing  # type: ignore[attr-defined]
        chosen, probability = routing.of(self.number, x.shape[0])
        exact, x = x, self.rounded_input(x)

        def operation(part: Tensor, hub: int) -> Tensor:
            return apply_layer(self, part, self.rounded_weight(self.healed_weight(hub)), self.bias)

        y = by_choice(x, chosen, operation)
        if probability.requires_grad:
            corrections = [self.correction(hub).detach() for hub in range(len(self.lora_a))]
            y = _RouterGradient.apply(y, probability, x.detach(), self, corrections)
        return self.add_branch(y, exact)


KINDS: dict[type, type[LoRALayer]] = {
    kind: type(f"LoRA{layer.__name__}", (LoRALayer, layer), {"__doc__": f"{layer.__name__} with a hub of LoRAs."})
    for kind, layer in FAKE_QUANT.items()
}


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
        objective: what an error of the prediction counts.
    Raises:
        HealError: when the student has no layer to put LoRAs into.
    """

    name = "talora"

    def __init__(
        self,
        student: nn.Module,
        timesteps: Sequence[float],
        settings: LoRASettings,
        objective: Objective = Method.objective,
        seed: int = 0,
    ) -> None:
        self.student, self.settings, self.objective = student, settings, objective
        self.before: dict[str, Any] = lora_targets(student)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.routing = Routing(len(self.before), timesteps, settings).to(next(student.parameters()).device)
            self.layers: dict[str, Any] = {}
            for number, (name, layer) in enumerate(self.before.items()):
                kind = next(kind for kind in KINDS if isinstance(layer, kind))
                self.layers[name] = KINDS[kind].wrap(layer, number, self.routing)
        replace(student, self.layers)
        self.norms = norm_parameters(student) if settings.affine else {}
        self.untouched = {name: student.get_parameter(name).detach().clone() for name in self.norms}
        student.add_module(ROUTING, self.routing)
        self.handle = self.routing.listen(student)

    def trained(self) -> dict[str, float]:
        rates = {}
        for name, layer in self.layers.items():
            rates[f"{name}.lora_a"] = 1 / math.sqrt(layer.lora_a.shape[-1])  # as large as its entries are
            rates[f"{name}.lora_b"] = 1.0
            if layer.log_scale is not None:
                rates[f"{name}.log_scale"] = self.settings.scale_rate
            if self.settings.affine and layer.bias is not None:
                rates[f"{name}.bias"] = float(weight_step(layer).mean())
        rates |= {name: NORM_RATE * size for name, size in self.norms.items()}
        if self.routing.learns:
            rates |= {f"{ROUTING}.{name}": self.settings.router_rate for name, _ in self.routing.named_parameters()}
        return rates

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self.settings), "objective": self.objective.identity()}

    def before_step(self, step: int) -> None:
        self.routing.listening = self.routing.learns and step % self.settings.router_every == 0

    def remove(self) -> None:
        """Take hubs and router out again; the student is as it came."""
        self._take_out()
        restore(self.student, self.untouched)

    def _take_out(self) -> None:
        self.handle.remove()
        delattr(self.student, ROUTING)
        replace(self.student, self.before)

    @torch.no_grad()
    def melt(self) -> dict[str, Tensor]:
        """Replace the hubs by what they lead to: the weights and input scales of every chosen LoRA; the rest stays as learned.

        Returns:
            By layer: the choice at every timestep, uint8 (T,), numbered within the layer's own weight sets.
        """
        table = self.routing.table()
        timed = any(layer.spec.over_time for layer in self.student.modules() if isinstance(layer, FakeQuant))
        entries = torch.arange(table.shape[1]) if timed else last_of_runs(table)
        choices = {}
        for row, (name, layer) in zip(table, self.layers.items(), strict=True):
            self._leave(self.before[name], layer, row[entries])
            choices[name] = row.unique(return_inverse=True)[1].to(torch.uint8)
        self._take_out()
        if any(layer.spec.over_time for layer in self.before.values()):
            follow_timesteps(self.student, self.routing.timesteps[entries].tolist())
        return choices

    def _leave(self, before: Any, layer: Any, chosen: Tensor) -> None:
        """Put what a layer has learned into the one it came from, for tables with the given choices, (T,)."""
        used, choice = chosen.unique(return_inverse=True)
        weights = [layer.healed_weight(hub).detach() for hub in used.tolist()]
        if len(weights) == 1:
            before.weight = nn.Parameter(weights[0], requires_grad=False)
        else:
            before.set_weights(torch.stack(weights), choice.to(weights[0].device))
        if layer.bias is not None:
            before.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        if layer.log_scale is not None:
            several = len(used) > 1 or before.spec.activation.scale == "timestep"
            before.fix_scale(layer.learned_scale((chosen if several else used).long()))
            before.spec = before.spec.replace(activation=before.spec.activation.replace(scale="timestep" if several else "static"))


def last_of_runs(table: Tensor) -> Tensor:
    """The last entries of the longest runs over which no layer of a table (L, T) changes its choice: all that need be stored.

    Timesteps in between use the next entry above (`TimestepState.row`).
    """
    changes = (table[:, 1:] != table[:, :-1]).any(0)
    return torch.cat([changes.nonzero().flatten(), torch.tensor([table.shape[1] - 1])])


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


def restore(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Put values back in place of the parameters of the same names."""
    for name, value in parameters.items():
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, nn.Parameter(value))
