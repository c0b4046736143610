"""Calibrated scales of an input, a row each, and how they are learned: against one row at a time, and slow formulas."""

import numpy as np
import pytest
import torch

from halfbyte.formats import GRIDS
from halfbyte.quantizers import FixedScale, quantize_activation, round_activation, round_learned
from halfbyte.recipe import ActivationSpec

SPECS = [
    ActivationSpec(name, zero_point=not grid.signed, scale="timestep")
    for name, grid in GRIDS.items()
    if not grid.simulated_only and name != "nf4"
]
SPECS += [
    ActivationSpec("lzs4", max_shift=4, scale="static"),
    ActivationSpec("ue1m3", max_shift=4, zero_point=True, scale="static"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=ActivationSpec.describe)


def make(spec, rows=7, pixels=3, channels=33, seed=0):
    """An input, and scales and zero points that cut some of it off."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, pixels, channels, generator=draw)
    scale = (0.5 + torch.rand(rows, generator=draw)) * 1.5 / spec.top
    zero = torch.randint(0, spec.top // 2, (rows,), generator=draw) if spec.zero_point else torch.zeros(rows).long()
    return x, scale, zero


@every_spec
def test_each_row_is_rounded_as_it_would_be_alone(spec):
    for shape in [(7, 3, 33), (1, 1, 1), (5, 300, 200)]:  # the last is handled in several parts
        x, scale, zero = make(spec, *shape)
        x[0, 0, 0] = 0.0
        alone = [quantize_activation(row[None], spec, FixedScale(scale, zero).at(index)) for index, row in enumerate(x)]
        integers, scales = quantize_activation(x, spec, FixedScale(scale, zero))
        assert torch.equal(integers, torch.cat([one for one, _ in alone]))
        assert torch.equal(scales, torch.cat([one for _, one in alone]))
        assert torch.equal(round_activation(x, spec, FixedScale(scale, zero)), integers * scales)


def test_a_row_that_is_not_finite_harms_no_other():
    x, scale, zero = make(SPECS[0])
    expected = round_activation(x, SPECS[0], FixedScale(scale, zero))
    x[2, 1, 5] = torch.inf
    found = round_activation(x, SPECS[0], FixedScale(scale, zero))
    assert found[2].isnan().all()
    keep = torch.arange(len(x)) != 2
    assert torch.equal(found[keep], expected[keep])


def slow_gradients(x, scale, zero, spec, rounded, gradient):
    """LSQ's equation 3 in float64, value by value."""
    top = spec.top
    bottom = 0 if spec.zero_point else -top - (spec.grid in ("int4", "int8"))
    of_x, of_scale = np.zeros(x.shape), np.zeros(len(x))
    for row, pixel, channel in np.ndindex(*x.shape):
        value, step, above = float(x[row, pixel, channel]), float(scale[row]), float(gradient[row, pixel, channel])
        level = float(rounded[row, pixel, channel]) / step
        units = value / step + int(zero[row])
        inside = bottom <= units <= top
        of_x[row, pixel, channel] = above * inside
        of_scale[row] += above * (level - value / step if inside else level)
    return of_x, of_scale


@every_spec
@pytest.mark.parametrize("integers", [torch.int64, torch.uint8], ids=["calibrated", "packed"])
def test_learned_rounding_has_the_same_bits_and_the_gradients_of_lsq(spec, integers):
    x, scale, zero = make(spec, 4, 2, 19)
    zero = zero.to(integers)
    x.requires_grad_()
    scale.requires_grad_()
    rounded = round_learned(x, scale, zero, spec)
    assert torch.equal(rounded.detach(), round_activation(x.detach(), spec, FixedScale(scale.detach(), zero)))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    rounded.backward(gradient)
    of_x, of_scale = slow_gradients(x.detach(), scale.detach(), zero, spec, rounded.detach(), gradient)
    assert 0 < np.count_nonzero(of_x) < of_x.size, "nothing is cut off, or everything"
    assert np.allclose(x.grad, of_x)
    assert np.allclose(scale.grad, of_scale, rtol=1e-4, atol=1e-4)


def test_only_the_input_is_kept_for_the_backward_pass():
    x, scale, zero = make(SPECS[0])
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        round_learned(x, scale, zero, SPECS[0])
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]
