"""GELU, GEGLU and group norms between layers: the engine gives the bits of the reference, and the reference is near to torch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import PackedError
from halfbyte.runtime import engine
from halfbyte.runtime.pointwise import exact_gelus, geglu, gelu, gelus, group_norm, normed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ODD = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, -88.5, 3e38])
NORMS = (  # shape, groups
    ((1, 2, 1, 1), 1),
    ((2, 32, 9, 7), 4),
    ((3, 6, 5), 3),
    ((1, 320, 16, 16), 32),
    ((5, 96, 20, 20), 32),
    ((2, 8), 2),
    ((2, 33, 3, 2, 5), 11),
)


def values(shape, dtype, seed=0, spread=2.0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + 0.3
    return made.to(dtype)


def images(shape, dtype, **options):
    """Channels innermost in memory."""
    return values(shape, dtype, **options).movedim(1, -1).contiguous().movedim(-1, 1)


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 33, 20000])
def test_gelu_bit_for_bit(dtype, count, monkeypatch):
    x = values((count,), dtype, spread=5.0)
    x[: len(ODD)] = ODD[:count].to(dtype)
    expected = gelus(x.float()).to(dtype)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(gelu(x), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu_is_near_to_torch(dtype):
    x = torch.linspace(-12, 12, 4001).to(dtype)
    exact = F.gelu(x.double(), approximate="tanh")
    limit = exact.abs() * max(5e-6, torch.finfo(dtype).eps) + 1e-7
    assert ((gelu(x).double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 2), (7, 62), (2, 3, 64), (5, 4000)], ids=str)
def test_geglu_bit_for_bit(dtype, shape, monkeypatch):
    x = values(shape, dtype, spread=5.0)
    x.view(-1)[: len(ODD)] = ODD[: x.numel()].to(dtype)
    part, gate = x.float().chunk(2, -1)
    expected = (part * exact_gelus(gate)).to(dtype)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(geglu(x), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_geglu_is_near_to_torch(dtype):
    gate = torch.linspace(-12, 12, 4001).to(dtype)
    exact = F.gelu(gate.double())
    limit = exact.abs() * max(1.5e-5, torch.finfo(dtype).eps) + 1e-7
    assert ((geglu(torch.stack([torch.ones_like(gate), gate], -1))[:, 0].double() - exact).abs() <= limit).all()


def test_gelu_of_any_layout():
    x = values((4, 6, 8, 10), torch.bfloat16)
    expected = gelus(x.float()).bfloat16()
    others = (x.transpose(1, 3), x[:, ::2], x[..., 3:], x.to(memory_format=torch.channels_last), x[:1, :1, :1].expand(3, 6, 8, 10))
    for other in others:
        assert torch.equal(gelu(other), gelus(other.float()).bfloat16())
    assert gelu(x.transpose(1, 3)).stride() == x.transpose(1, 3).stride()
    assert torch.equal(gelu(x), expected)


@pytest.mark.parametrize(("shape", "groups"), NORMS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_norms_bit_for_bit(shape, groups, dtype, affine, silu, monkeypatch):
    x = images(shape, dtype)
    weight, bias = (values(shape[1:2], torch.float32, seed=seed).to(dtype) if affine else None for seed in (1, 2))
    expected = normed(x, groups, weight, bias, 1e-5, silu)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(group_norm(x, groups, weight, bias, 1e-5, silu), expected)
    if x.numel() == 2:
        return  # torch refuses a value a channel
    exact = F.group_norm(x.float(), groups, *(None if one is None else one.float() for one in (weight, bias)), 1e-5)
    exact = F.silu(exact) if silu else exact
    torch.testing.assert_close(expected.float(), exact, atol=1e-4, rtol=2 * torch.finfo(dtype).eps + 1e-5)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 200), st.floats(0, 100))
@settings(max_examples=60, deadline=None)
def test_norms_of_any_size(seed, count, groups, width, pixels, spread):
    x = images((count, groups * width, pixels), torch.bfloat16, seed=seed, spread=spread)
    found = group_norm(x, groups, None, None, 1e-5)
    same(found, normed(x, groups, None, None, 1e-5) if x.numel() else x)
    assert found.movedim(1, -1).is_contiguous()


def test_threads_change_nothing():
    x, few = images((7, 64, 30, 30), torch.bfloat16), images((1, 640, 31, 31), torch.bfloat16)
    kept, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append([group_norm(one, 32, None, None, 1e-5) for one in (x, few)] + [gelu(x)])
    torch.set_num_threads(kept)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_a_nan_stays_in_its_group():
    x = images((2, 8, 5, 5), torch.bfloat16)
    x[1, 3, 2, 2] = float("nan")
    found = group_norm(x, 4, None, None, 1e-5).isnan()
    assert found[1, 2:4].all()
    assert found.sum() == 2 * 25


def test_torch_keeps_what_it_does_well():
    large, planar = images((1, 8, 32, 32), torch.bfloat16), values((2, 8, 5, 5), torch.bfloat16)
    for x in (large, planar):
        assert torch.equal(group_norm(x, 4, None, None, 1e-5), F.group_norm(x, 4))
    assert torch.equal(group_norm(planar, 4, None, None, 1e-5, True), F.silu(F.group_norm(planar, 4)))


def test_refusals():
    x = images((2, 8, 5, 5), torch.bfloat16)
    with pytest.raises(PackedError, match=r"takes floats, got torch\.int32"):
        engine.gelu(torch.ones(3, dtype=torch.int32))
    with pytest.raises(PackedError, match=r"takes floats \(..., 2 C\), got torch.float32 \(2, 3\)"):
        engine.geglu(torch.ones(2, 3))
    with pytest.raises(PackedError, match="channels innermost"):
        engine.group_norm(x.contiguous(), 4, None, None, 1e-5)
    with pytest.raises(PackedError, match="8 channels takes as many"):
        engine.group_norm(x, 4, torch.ones(7), None, 1e-5)
    with pytest.raises(PackedError, match="share the channels evenly"):
        engine.group_norm(x, 3, None, None, 1e-5)


def test_operators_are_registered_as_torch_wants():
    x = images((2, 8, 5, 5), torch.bfloat16)
    torch.library.opcheck(engine.gelu, (x,))
    torch.library.opcheck(engine.geglu, (values((3, 8), torch.bfloat16),))
    torch.library.opcheck(engine.group_norm, (x, 4, torch.ones(8), None, 1e-5))
    torch.library.opcheck(engine.group_norm, (x, 4, None, None, 1e-5, True))
