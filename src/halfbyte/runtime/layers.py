"""Packed layers: 4-bit codes in memory, exact integers when they run.

They are real subclasses of the torch layers (adapters such as LoRA look for that), but hold no float weight. `weight` answers with
a zero-memory stand-in of the right shape, dtype and device whose `.data` refuses, so that code which would write into it
(`fuse_lora`, for one) fails with a sentence instead of losing its work.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CorruptError, PackedError
from halfbyte.formats import get_grid
from halfbyte.layers import FLOAT32_BUFFERS as FLOAT32_BUFFERS
from halfbyte.layers import Quantizable, QuantizedLayer, adopt, follow_timesteps, matrix_shape, scale_input
from halfbyte.packing import pack_multipliers, pack_nibbles, unpack_multipliers, unpack_nibbles
from halfbyte.quantizers import QuantizedWeight, decode_weight
from halfbyte.recipe import LayerSpec
from halfbyte.runtime import cpu, gpu
from halfbyte.runtime.backends import engine_plan
from halfbyte.runtime.between import take_over
from halfbyte.runtime.ops import quantized_forward
from halfbyte.runtime.tiled import Tiled

BUFFERS = (
    "weight_codes", "weight_scale", "weight_multiplier", "weight_choice", "input_scale", "activation_scale", "activation_zero",
)  # fmt: skip


# What may be asked of a stand-in: nothing that needs its values, or would change them.
METADATA = {
    "__get__", "__repr__", "__len__", "__format__", "__hash__", "dim", "size", "stride", "numel", "nelement", "element_size",
    "get_device", "is_contiguous", "is_floating_point", "is_complex", "is_same_size", "detach", "expand", "requires_grad_",
    "untyped_storage", "data_ptr", "is_pinned",
}  # fmt: skip


class PackedWeight(Tensor):
    """Stands where a float weight would: shape, dtype and device, no values. Whatever needs its values fails with a sentence.

    `.data` is the stand-in itself: adapters look at its shape, and fail where they would write into it.
    """

    _is_hf_initialized = True  # transformers draws random values for weights that a checkpoint lacks, unless they say this

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") not in METADATA:
            raise PackedError(
                "a packed 4-bit layer has no float weight to read or write; "
                "merge the adapter into the float model and quantize that"
            )
        return super().__torch_function__(function, types, args, kwargs)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, _: Tensor) -> None:
        raise PackedError("a packed 4-bit layer has no float weight to replace; quantize the float model that has the new one")


class _NoBackward(torch.autograd.Function):
    """Lets a forward pass through that nobody differentiates, and refuses the backward that somebody asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG004
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        raise PackedError("packed layers are for inference and pass no gradients; quantize with simulate=True to train")


class Packed(Tiled, QuantizedLayer):
    """What all packed layers share; mixed into the torch layer class that names their kind."""

    bias: Any  # nn.Parameter or None
    weight_codes: Tensor  # uint8 (O, ceil(K / 2)) for 4-bit grids, (O, K) for 8-bit ones; (sets, ...) where there are several
    weight_scale: Tensor  # float32 (O, 1), the same for all sets
    weight_multiplier: Tensor | None  # uint8, nibbles (O, ceil(ceil(K / subgroup) / 2)), or (sets, ...)
    plan: cpu.Plan | str  # how the C++ engine runs this layer, or why it does not
    gpu_plan: gpu.Plan | str  # likewise the GPU's

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Called with sizes, as PEFT does to make a small layer of the kind it adapts, it gives the plain torch layer."""
        if sizes or options:
            return next(kind for kind, packed in PACKED.items() if packed is cls)(*sizes, **options)
        return super().__new__(cls)

    @classmethod
    def empty(cls, layer: Quantizable, spec: LayerSpec, smoothed: bool = False, timesteps: int = 1) -> Any:
        """A layer of the right sizes whose codes and scales are yet to be loaded, on the device of the given layer's weight.

        Args:
            smoothed: whether it has an input scale. timesteps: entries of its tables over time.
        """
        hindrance = spec.simulated_only()
        if hindrance:
            raise PackedError(f"{spec.describe()} cannot be packed: {hindrance}; it exists for simulation (simulate=True)")
        made = adopt(cls, layer)  # type: ignore[arg-type]
        made.spec, made.bias = spec, layer.bias
        made.plan, made.gpu_plan = cpu.plan_for(made, spec), gpu.plan_for(made, spec)
        for name in BUFFERS:
            made.register_buffer(name, None)
        made.register_buffer("weight_tiles", None)  # never saved: saving asks for the codes, which takes its place
        for name, (shape, dtype) in packed_shapes(layer, spec, smoothed, timesteps).items():
            setattr(made, name, torch.empty(shape, dtype=dtype, device=layer.weight.device))
        return made

    def store(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Take what is stored of a weight (`packed_tensors`), or of all its sets, which share their scale."""
        for name in ("weight_codes", "weight_multiplier"):
            if name in parts[0]:
                setattr(self, name, parts[0][name] if len(parts) == 1 else torch.stack([part[name] for part in parts]))
        self.weight_scale = parts[0]["weight_scale"]

    @property
    def weight(self) -> Tensor:
        layer: Any = self
        bias = self.bias
        dtype = torch.float32 if bias is None else bias.dtype
        if isinstance(layer, nn.Linear):
            shape: tuple[int, ...] = (layer.out_features, layer.in_features)
        elif layer.transposed:
            shape = (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size)
        else:
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return torch.zeros((), dtype=dtype, device=self.weight_scale.device).expand(shape).as_subclass(PackedWeight)

    def stored_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of what a checkpoint holds of this layer (bias aside), in whichever order its codes are now."""
        tables = (self.weight_choice, self.activation_scale)
        entries = max(len(table) for table in (*tables, (0,)) if table is not None)
        return packed_shapes(self, self.spec, self.input_scale is not None, entries)  # type: ignore[arg-type]

    def levels(self, chosen: int = 0) -> Tensor:
        """The integers of the weight, or of one of its sets, multipliers applied: float32 whole numbers (O, K)."""
        layer: Any = self
        spec, (_, count), stored, multiplier = self.spec.weight, matrix_shape(layer), self.weight_multiplier, None
        codes = self.weight_codes if spec.sets == 1 else self.weight_codes[chosen]
        if get_grid(spec.grid).bits == 4:
            codes = unpack_nibbles(codes, count)
        if stored is not None:
            one = stored if spec.sets == 1 else stored[chosen]
            multiplier = unpack_multipliers(one, -(-count // spec.subgroup), spec.max_multiple > 0)
        return decode_weight(codes, multiplier, spec)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._infer(x)
        with torch.no_grad():
            y = self._infer(x)
        return _NoBackward.apply(x, y) if x.requires_grad else y

    def _infer(self, x: Tensor) -> Tensor:
        layer: Any = self
        plan = engine_plan(layer, x)
        factors = self._buffers["input_scale"]
        scaled = x if factors is None else scale_input(layer, x, factors)
        chosen, fixed = self.chosen_set(), self.fixed_scale(scaled)
        if plan is None or (fixed is not None and fixed.scale.ndim):  # the engine takes one scale for all rows
            activation = self.spec.activation
            return quantized_forward(self, scaled, self.levels(chosen), self.weight_scale, self.bias, activation, fixed)
        if isinstance(plan, gpu.Plan):
            return gpu.forward(layer, plan, scaled, chosen, fixed)
        return cpu.forward(layer, plan, scaled, chosen, fixed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec.describe()}"  # type: ignore[misc]


def packed_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A quantized weight as it is stored: codes, multipliers if it has them, and scale. Rows can be made apart and put together."""
    four_bit = get_grid(weight.spec.grid).bits == 4
    made = {"weight_codes": pack_nibbles(weight.codes()) if four_bit else weight.codes().contiguous()}
    made["weight_scale"] = weight.scale.contiguous()
    if weight.multiplier is not None:
        made["weight_multiplier"] = pack_multipliers(weight.multiplier, weight.spec.max_multiple > 0)
    return made


def packed_shapes(
    layer: Quantizable, spec: LayerSpec, smoothed: bool = False, timesteps: int = 1
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a packed layer's stored tensors (bias aside)."""
    (rows, count), weight, activation = matrix_shape(layer), spec.weight, spec.activation
    sets = (weight.sets,) if weight.sets > 1 else ()
    four_bit = get_grid(weight.grid).bits == 4
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_codes": ((*sets, rows, (count + 1) // 2 if four_bit else count), torch.uint8),
        "weight_scale": ((rows, 1), torch.float32),
    }
    if weight.has_multipliers:
        groups = -(-count // weight.subgroup)
        shapes["weight_multiplier"] = ((*sets, rows, (groups + 1) // 2), torch.uint8)
    if sets:
        shapes["weight_choice"] = ((timesteps,), torch.uint8)
    if activation is not None and activation.scale != "dynamic":
        entries = (timesteps if activation.scale == "timestep" else 1,)
        shapes["activation_scale"] = (entries, torch.float32)
        if activation.zero_point:
            shapes["activation_zero"] = (entries, torch.uint8)
    if smoothed:
        shapes["input_scale"] = ((layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels,), torch.float32)
    return shapes


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]
    """nn.Linear on 4-bit codes."""


class PackedConv1d(Packed, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d on 4-bit codes."""


class PackedConv2d(Packed, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d on 4-bit codes.

    Its output is channels-last where its input is, or where the weight would be: that of the float layer was, or the model was told
    `.to(memory_format=torch.channels_last)`. So says torch's own rule.
    """

    channels_last = False

    @classmethod
    def empty(cls, layer: Quantizable, spec: LayerSpec, smoothed: bool = False, timesteps: int = 1) -> Any:
        made = super().empty(layer, spec, smoothed, timesteps)
        weight = layer.weight
        made.channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return made

    def after_norm(self, norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor | None:
        """This layer's output for SiLU(norm(x + shift)), of which nothing is kept; None where the C++ engine does not run it so.

        Args:
            x: float (B, C, H, W). shift: float (B, C).
        """
        plan = engine_plan(self, x)
        if not isinstance(plan, cpu.Plan) or plan.grow or self._buffers["input_scale"] is not None or x.ndim != 4:
            return None
        chosen, fixed = self.chosen_set(), self.fixed_scale(x)
        if fixed is not None and fixed.scale.ndim:
            return None
        return cpu.forward(self, plan, x, chosen, fixed, (norm.num_groups, norm.weight, norm.bias, norm.eps, shift))

    def makes_channels_last(self, x: Tensor) -> bool:
        return self.channels_last or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        stand_in = fn(torch.zeros((2, 2, 2, 2), device=self.weight_scale.device).contiguous(memory_format=layout))
        self.channels_last = not stand_in.is_contiguous()
        return self


class PackedConvTranspose1d(Packed, nn.ConvTranspose1d):  # type: ignore[misc, override]
    """nn.ConvTranspose1d on 4-bit codes."""


class PackedConvTranspose2d(Packed, nn.ConvTranspose2d):  # type: ignore[misc, override]
    """nn.ConvTranspose2d on 4-bit codes."""


PACKED: dict[type, type[Packed]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
}


def install(
    model: nn.Module, specs: Mapping[str, LayerSpec], smoothed: Collection[str] = (), timesteps: Sequence[float] = ()
) -> None:
    """Put empty packed layers in place of the named float ones, for a loader to fill.

    Args:
        specs: by layer name. `smoothed`: the names of those that carry an input scale.
        timesteps: those that tables over time have an entry for; the model's calls are followed where there are any.
    Raises:
        CorruptError: when a name is not a Linear or convolution layer of the model.
    """
    everywhere = dict(model.named_modules(remove_duplicate=False))
    made = {}
    for name, spec in specs.items():
        layer = everywhere.get(name)
        kind = next((kind for kind in PACKED if isinstance(layer, kind)), None)
        if kind is None:
            raise CorruptError(f"the checkpoint has a quantized layer {name!r}; this {type(model).__name__} has no such layer")
        made[layer] = PACKED[kind].empty(layer, spec, name in smoothed, len(timesteps))  # type: ignore[arg-type]
    for name, layer in everywhere.items():  # a layer used in two places is replaced in both
        if layer in made:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[layer])
    take_over(model)
    if timesteps:
        follow_timesteps(model, timesteps)
