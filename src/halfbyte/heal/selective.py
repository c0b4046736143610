"""QuEST's fine-tune (arXiv 2402.03666) of chosen layers: their weights, straight through, and the scales of inputs, as LSQ has it.

    loss of a row = local_weight * mean over chosen layers of ||o - o'||^2 / energy  +  global_weight * ||y - y'||^2

o and o' are what a layer puts out in the student (on quantized inputs) and in the float teacher, y and y' the two predictions,
norms are means over values. ||y - y'||^2 is an `Objective`: as it is, or, by default, the error of the next sample. The paper sums
squared errors of layers as they are; here each is divided by the energy of the layer's output, and their mean is taken, so that no
layer counts more for its scale and the two weights mean the same in every model. The paper's weights are 1 and 2; of errors so
divided, a local weight of 1 leaves 0.3 dB less than 0.2 (docs/log.md).

- A rounded weight follows Q(w): every update may flip it, in both directions. The authors' code freezes the round-up bits.
- Scales are learned as logarithms of what they are relative to calibration: they stay positive, and one rate suits all. Each row
  of a batch uses the scale of its own timestep; zero points and weight scales stay as calibrated.
- Biases of all layers and the gains and offsets of norms are learned with the critical layers: a few thousandths of the parameters,
  nothing at run time. The paper learns none of them (`affine=False`).
- The weights of all other layers are rounded once. Only what is trained has gradients and optimizer state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from halfbyte.errors import HealError
from halfbyte.heal.method import Method
from halfbyte.heal.objective import Objective, mean_square
from halfbyte.heal.scales import NORM_RATE, SCALE_RATE, learned_input, norm_parameters, weight_step
from halfbyte.heal.states import Batch, prediction
from halfbyte.heal.talora import replace, restore
from halfbyte.layers import FAKE_QUANT, FakeQuant, apply_layer


@dataclass(frozen=True)
class Stage:
    """What one stage trains."""

    name: str
    weights: tuple[str, ...]  # layers whose weight and bias are trained
    scales: tuple[str, ...]  # layers whose calibrated input scales are
    affine: bool = False  # whether the biases of all layers, and the gains and offsets of norms, are
    energy: Mapping[str, float] = field(repr=False, default_factory=dict)  # mean square of each trained layer's output

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "weights": list(self.weights), "scales": list(self.scales), "affine": self.affine}


@dataclass(frozen=True)
class LossWeights:
    """How the parts of the loss count, and how fast scales learn.

    Raises:
        HealError: for values that make no sense.
    """

    local_weight: float = 0.2
    global_weight: float = 2.0
    scale_rate: float = SCALE_RATE  # relative change of a scale where a weight moves by one step; 0: they stay as calibrated

    def __post_init__(self) -> None:
        for name in ("local_weight", "global_weight", "scale_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise HealError(f"{name} must be >= 0, got {getattr(self, name)!r}")
        if not self.local_weight and not self.global_weight:
            raise HealError("local_weight and global_weight are both 0, which leaves nothing to minimise; set one above 0")


class SelectiveLayer(FakeQuant):
    """A trainable quantized layer in which little is trained; mixed into the torch layer class that names its kind."""

    held: Tensor | None  # the rounded weight, where it is not trained
    log_scale: Any  # nn.Parameter float32 (T,): log of the input's scale over the calibrated one; None where it is not trained

    @classmethod
    def wrap(cls, layer: FakeQuant, weight: bool, scale: bool, bias: bool = False) -> Any:
        """A layer like the given one that computes the same, with parameters of its own for what is trained."""
        made = cls.like(layer)
        made.register_buffer("held", None, persistent=False)
        made.register_parameter("log_scale", None)
        if weight:
            made.weight = nn.Parameter(layer.weight.detach().clone())
        else:
            made.held = layer.rounded_weight(layer.weight.detach())
        if (weight or bias) and layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
        if scale and layer.activation_scale is not None:
            made.log_scale = nn.Parameter(torch.zeros_like(layer.activation_scale))
        return made

    def learned_scale(self) -> Tensor:
        """Scales of the input as they are now, float32 (T,)."""
        assert self.activation_scale is not None
        return self.activation_scale * self.log_scale.exp()  # type: ignore[no-any-return]

    def rounded_weight(self, weight: Tensor) -> Tensor:
        return super().rounded_weight(weight) if self.held is None else self.held

    def rounded_input(self, x: Tensor) -> Tensor:
        if self.log_scale is None:
            return super().rounded_input(x)
        return learned_input(self, x, self.log_scale[self.entry(self.log_scale, x)])

    def forward(self, x: Tensor) -> Tensor:
        rounded, weight = self.rounded_input(x), self.rounded_weight(self.weight)
        shape, strides, like = rounded.shape, rounded.stride(), rounded.new_empty(0)
        exact = x.detach() if self.held is None else None  # kept by `again`, so nothing that is not needed

        def again() -> Tensor:
            """What the product's backward pass takes for its input.

            torch keeps a convolution's input even where only the gradient of the input is asked for, which does not depend on it.
            Where the weight is trained it does; the scales' backward pass keeps the unrounded input anyway.
            """
            if exact is None:
                return like.new_empty_strided(shape, strides)
            with torch.no_grad():
                return self.rounded_input(exact)

        if self.held is None and self.log_scale is None:
            return self.add_branch(apply_layer(self, rounded, weight, self.bias), x)
        with _instead_of(rounded, again):
            return self.add_branch(apply_layer(self, rounded, weight, self.bias), x)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _instead_of(x: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    """While entered, autograd keeps a function that makes a tensor instead of the tensor."""
    pointer, shape = x.data_ptr(), x.shape  # x itself must not live on in here

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == pointer and saved.shape == shape else saved

    def unpack(kept: Tensor | None) -> Tensor:
        return again() if kept is None else kept

    return saved_tensors_hooks(pack, unpack)


KINDS: dict[type, type[SelectiveLayer]] = {
    kind: type(f"Selective{layer.__name__}", (SelectiveLayer, layer), {"__doc__": f"{layer.__name__} in which little is trained."})
    for kind, layer in FAKE_QUANT.items()
}


class Selective(Method):
    """One stage: put its layers into a student, train them, and take them out again with `melt` or `remove`.

    Args:
        student: with trainable quantized layers, all of which are replaced in place.
        teacher: the float model, with the same names.
        objective: what an error of the prediction counts.
    """

    name = "quest"

    def __init__(
        self, student: nn.Module, teacher: nn.Module, stage: Stage, weights: LossWeights, objective: Objective = Method.objective
    ) -> None:
        self.student, self.teacher, self.stage, self.settings, self.objective = student, teacher, stage, weights, objective
        self.before: dict[str, Any] = dict(quantized_layers(student))
        self.layers: dict[str, Any] = {}
        for name, layer in self.before.items():
            kind = next(kind for kind in KINDS if isinstance(layer, kind))
            self.layers[name] = KINDS[kind].wrap(layer, name in stage.weights, name in stage.scales, stage.affine)
        replace(student, self.layers)
        self.norms = norm_parameters(student) if stage.affine else {}
        self.untouched = {name: student.get_parameter(name).detach().clone() for name in self.norms}
        self.look: Callable[[str, Tensor], None] | None = None  # at the outputs of the trained layers, while a loss is computed
        self.handles: list[Any] = []
        if weights.local_weight:
            for model in (student, teacher):
                self.handles += [model.get_submodule(name).register_forward_hook(self._watch(name)) for name in stage.weights]

    def _watch(self, name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Tensor) -> None:
            if self.look is not None:
                self.look(name, output)

        return look

    def trained(self) -> dict[str, float]:
        rates = {name: NORM_RATE * size for name, size in self.norms.items()}
        for name in self.layers if self.stage.affine else self.stage.weights:
            layer = self.layers[name]
            parts = {"weight": name in self.stage.weights, "bias": layer.bias is not None}
            step = float(weight_step(layer).mean())
            rates |= {f"{name}.{part}": step for part, trained in parts.items() if trained}
        rates |= {
            f"{name}.log_scale": self.settings.scale_rate for name in self.stage.scales if self.layers[name].log_scale is not None
        }
        return rates

    def identity(self) -> dict[str, Any]:
        objective = {"objective": self.objective.identity()}
        return {"name": self.name, **asdict(self.settings), **objective, "stage": self.stage.identity()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        rows, local = len(batch.target), batch.target.new_zeros(len(batch.target), dtype=torch.float32)
        exact: dict[str, list[Tensor]] = {}

        def keep(name: str, output: Tensor) -> None:
            exact.setdefault(name, []).append(output)

        def compare(name: str, output: Tensor) -> None:  # at once, so that the teacher's output need not be kept
            nonlocal local
            with saved_tensors_hooks(_same, _same):  # where a block is computed again, this is no part of it
                error = mean_square(output.reshape(rows, -1), exact[name].pop(0).reshape(rows, -1))
                local = local + error / self.stage.energy[name]

        if self.handles:
            with torch.no_grad(), torch.autocast(batch.target.device.type, enabled=False):
                self._run(self.teacher, batch, keep)
        predicted = self._run(model, batch, compare if self.handles else None)
        losses = self.settings.global_weight * self.objective(predicted, batch)
        return losses + self.settings.local_weight / max(1, len(self.stage.weights)) * local

    def _run(self, model: nn.Module, batch: Batch, look: Callable[[str, Tensor], None] | None) -> Tensor:
        """What a model predicts; `look` is shown what its trained layers put out."""
        self.look = look
        try:
            return prediction(model(*batch.args, **batch.kwargs))
        finally:
            self.look = None

    def remove(self) -> None:
        """Take the layers out again; the student is as it came."""
        self._take_out()
        restore(self.student, self.untouched)

    def _take_out(self) -> None:
        for handle in self.handles:
            handle.remove()
        replace(self.student, self.before)

    @torch.no_grad()
    def melt(self) -> None:
        """Take the layers out and leave in the student what they have learned."""
        for name, layer in self.layers.items():
            before = self.before[name]
            if name in self.stage.weights:
                before.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
            if layer.bias is not None:
                before.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
            if layer.log_scale is not None:
                before.activation_scale = layer.learned_scale()
        self._take_out()


def quantized_layers(student: nn.Module) -> dict[str, FakeQuant]:
    """The layers that a student can be healed in, by name.

    Raises:
        HealError: when there is none, or one holds several weights already.
    """
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, FakeQuant)}
    if not layers:
        raise HealError(
            f"this {type(student).__name__} has no trainable quantized layers; run halfbyte.quantize with simulate=True on it first"
        )
    healed = next((name for name, layer in layers.items() if layer.spec.weight.sets > 1), None)
    if healed is not None:
        raise HealError(f"{healed} holds several weights already; heal the model as it was quantized, not a healed one")
    return layers


def parameters_of(student: nn.Module, stages: Sequence[Stage]) -> int:
    """How many parameters some stages train: weights, biases, scales and those of norms, each counted once."""
    layers: dict[str, Any] = dict(quantized_layers(student))
    affine = any(stage.affine for stage in stages)
    weights = {name for stage in stages for name in stage.weights}
    scales = {name for stage in stages for name in stage.scales}
    found = [layers[name].weight for name in weights] + [layers[name].bias for name in (layers if affine else weights)]
    found += [layers[name].activation_scale for name in scales]
    found += [student.get_parameter(name) for name in norm_parameters(student)] if affine else []
    return sum(one.numel() for one in found if one is not None)
