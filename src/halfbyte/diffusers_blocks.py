"""Blocks of diffusers whose steps between layers our engine runs faster than torch does: see `runtime.between`."""

from typing import Any

import torch.nn.functional as F
from diffusers.models import activations, resnet, upsampling
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from halfbyte.runtime.between import GroupNorm, StandIns, takes
from halfbyte.runtime.layers import PackedConv2d
from halfbyte.runtime.pointwise import geglu, gelu

MOST_UPSAMPLED = 2**31  # values, beyond which torch's upsampling fails with channels innermost (pytorch issue 141831)


class EngineGELU(activations.GELU):
    """A feed-forward's first layer and GELU, the latter by the engine."""

    def gelu(self, gate: Tensor) -> Tensor:
        return gelu(gate) if takes(gate) and self.approximate == "tanh" else super().gelu(gate)


class EngineGEGLU(activations.GEGLU):
    """A feed-forward's first layer and gate, the latter by the engine."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not takes(hidden_states) or args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return geglu(self.proj(hidden_states))


class EngineResnetBlock2D(resnet.ResnetBlock2D):
    """A residual block that quantizes the output of its norms and SiLUs at once, and whose sums are made in place."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not takes(input_tensor) or not self.is_plain():
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        hidden = after_norm(self.norm1, self.conv1, input_tensor)
        if hidden is None:
            hidden = self.conv1(self.norm1(input_tensor, silu=True))
        hidden = self.second(hidden, temb)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = add_to_output(self.conv2, hidden, shortcut)
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor

    def second(self, hidden: Tensor, temb: Tensor | None) -> Tensor:
        """The second convolution of the first one's output."""
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        found = None
        if (temb is None or shift is not None) and is_bare(self.dropout):
            found = after_norm(self.norm2, self.conv2, hidden, shift)
        if found is not None:
            return found
        temb = temb if shift is None else shift[:, :, None, None]
        if temb is not None:
            hidden = add_to_output(self.conv1, hidden, temb)
        return self.conv2(self.dropout(self.norm2(hidden, silu=True)))  # type: ignore[no-any-return]

    def is_plain(self) -> bool:
        """Whether its options are those of most models: no resampling, no norm modulated by the timestep, no hooked SiLU."""
        norms = isinstance(self.norm1, GroupNorm) and isinstance(self.norm2, GroupNorm)
        silu = isinstance(self.nonlinearity, nn.SiLU) and is_bare(self.nonlinearity)
        parts = silu and self.upsample is None and self.downsample is None
        return norms and parts and self.time_embedding_norm == "default" and not self.training


class EngineUpsample2D(upsampling.Upsample2D):
    """Nearest neighbours with channels innermost, of whatever batch: diffusers re-orders those of 64 images and more."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.norm is None and self.interpolate and not self.use_conv_transpose and not args and not kwargs
        if not plain or not takes(hidden_states) or 4 * hidden_states.numel() > MOST_UPSAMPLED:
            return super().forward(hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        how = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        larger = F.interpolate(hidden_states, mode="nearest", **how)
        if not self.use_conv:
            return larger
        return (self.conv if self.name == "conv" else self.Conv2d_0)(larger)  # type: ignore[no-any-return]


class EngineTransformer2DModel(Transformer2DModel):
    """A UNet's transformer that leaves channels innermost: diffusers re-orders what its last layer, or the next, re-orders back."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        sizes = (batch_size, height, width, inner_dim)
        if not takes(hidden_states):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, *sizes)  # type: ignore[no-any-return]
        tokens = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        image = tokens.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return add_to_output(self.proj_out, image if self.use_linear_projection else self.proj_out(image), residual)


def after_norm(norm: GroupNorm, conv: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor | None:
    """conv(SiLU(norm(x + shift))) in one step of the engine; None where there is none, or somebody looks at what lies between."""
    if not isinstance(conv, PackedConv2d) or not is_bare(norm) or not is_bare(conv):
        return None
    return conv.after_norm(norm, x, shift)


def add_to_output(layer: nn.Module, output: Tensor, other: Tensor) -> Tensor:
    """The sum, in place where nobody else can hold the layer's output."""
    return output.add_(other) if is_bare(layer) and output.dtype == other.dtype else output + other


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward and nothing else: no hooks, no forward of its own (accelerate's, say)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return not hooked and "forward" not in module.__dict__


ENGINE_BLOCKS: StandIns = {  # for `runtime.between.STAND_INS`
    activations.GELU: EngineGELU,
    activations.GEGLU: EngineGEGLU,
    resnet.ResnetBlock2D: EngineResnetBlock2D,
    upsampling.Upsample2D: EngineUpsample2D,
    Transformer2DModel: EngineTransformer2DModel,
}
