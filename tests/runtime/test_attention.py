"""Integer attention: the engine gives the bits of the reference, and the reference is near to attention in float."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import PackedError
from halfbyte.metrics import sqnr
from halfbyte.runtime import engine
from halfbyte.runtime.attention import LEAST, STEPS, _power_codes, attention, factor_of, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (  # images, heads, queries, keys, channels of queries and of values
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 16, 16),
    (1, 2, 33, 64, 64, 24),
    (1, 1, 100, 65, 40, 40),
    (2, 2, 13, 200, 80, 130),
    (1, 1, 50, 640, 512, 512),
    (1, 1, 3, 70, 1100, 4),
)


def heads(shape, dtype=torch.float32, seed=0, spread=1.0, common=1.0):
    images, count, queries, keys, channels, values = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(images, count, queries, channels, generator=generator) * spread
    key = torch.randn(images, count, keys, channels, generator=generator)
    key += torch.randn(images, count, 1, channels, generator=generator) * common
    value = torch.randn(images, count, keys, values, generator=generator) + 0.3
    return [one.to(dtype) for one in (query, key, value)]


def expected_of(query, key, value):
    return reference(query, key, value, factor_of(None, query.shape[-1]))


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_bit_for_bit_the_reference(shape, dtype, spread, monkeypatch):
    given = heads(shape, dtype, spread=spread)
    expected = expected_of(*given)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(attention(*given), expected)


def test_codes_are_powers_of_two_within_rounding():
    steps = torch.arange(2 * LEAST, 1).float()
    off = _power_codes(steps).double() - 255 * 2 ** (steps.double() / STEPS)
    assert off.abs().max() < 0.52
    assert _power_codes(steps)[-1] == 255
    assert (_power_codes(steps).diff() >= 0).all()


def test_any_strides(monkeypatch):
    query, key, value = heads((2, 3, 20, 70, 24, 24))
    expected = expected_of(query, key, value)
    by_token = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (query, key, value)]
    by_channel = [one.transpose(-1, -2).contiguous().transpose(-1, -2) for one in (query, key, value)]
    shifted = [torch.cat((one, one), -1)[..., : one.shape[-1]] for one in (query, key, value)]
    for one in (by_token, by_channel, shifted, [query, by_channel[1], shifted[2]]):
        same(attention(*one), expected)
    shared = key[:, :1].expand(-1, 3, -1, -1)
    same(attention(query, shared, value), expected_of(query, shared.contiguous(), value))


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 40), st.integers(1, 150), st.integers(1, 70), st.floats(0, 30))
@settings(max_examples=60, deadline=None)
def test_outputs_lie_between_the_values(seed, count, queries, keys, channels, spread):
    given = heads((1, count, queries, keys, channels, channels), seed=seed, spread=spread)
    found = attention(*given)
    same(found, expected_of(*given))
    step = given[2].abs().amax(-2, keepdim=True) / 127
    assert (found <= given[2].amax(-2, keepdim=True) + step).all()
    assert (found >= given[2].amin(-2, keepdim=True) - step).all()


@pytest.mark.parametrize(
    ("shape", "spread", "common"),
    [
        ((1, 2, 64, 256, 64, 64), 1, 0),
        ((1, 2, 64, 4096, 40, 40), 1, 0),
        ((1, 2, 64, 4096, 40, 40), 2.5, 0),  # sharp: few keys have all the weight
        ((1, 2, 64, 1024, 64, 64), 1, 8),  # what keys have in common is most of them
        ((1, 2, 64, 77, 64, 64), 1.5, 1),
    ],
)
def test_near_to_attention_in_float(shape, spread, common):
    query, key, value = heads(shape, spread=spread, common=common)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert sqnr(exact, attention(query, key, value).double()) > 32


def test_rows_and_heads_with_a_nan(monkeypatch):
    shape = (1, 2, 20, 70, 16, 16)
    for which, rows in ((0, 1), (1, 20), (2, 20)):
        for wrong in (math.nan, math.inf, -math.inf):
            given = heads(shape)
            given[which][0, 1, 3, 5] = wrong
            expected = expected_of(*given)
            assert expected.isnan().sum() == rows * 16
            assert expected[:, 0].isfinite().all()
            for isa in engine.instruction_sets():
                monkeypatch.setenv("HALFBYTE_ISA", isa)
                same(attention(*given), expected)


@pytest.mark.parametrize("largest", [1e-40, 1e-30, 1e18, 3e38])
def test_extreme_values(largest, monkeypatch):
    given = [one * (largest / 8) for one in heads((1, 1, 5, 70, 16, 16))]
    expected = expected_of(*given)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(attention(*given), expected)


@pytest.mark.parametrize("size", [(2, 3, 20, 150), (2, 1, 1, 150), (20, 150), (150,), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias(size, dtype, monkeypatch):
    query, key, value = heads((2, 3, 20, 150, 24, 24), dtype)
    bias = torch.randn(size, generator=torch.Generator().manual_seed(3))
    bias[..., 30:] = -math.inf  # two blocks of keys that nobody sees
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), bias.double().expand(2, 3, 20, 150))
    with monkeypatch.context() as without:
        without.setattr("halfbyte.runtime.attention._engine_takes", lambda *_: False)
        expected = attention(query, key, value, bias=bias)
    assert sqnr(exact, expected.double()) > 32
    for isa in engine.instruction_sets():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        same(attention(query, key, value, bias=bias), expected)


def test_masks_of_all_and_of_nothing():
    query, key, value = heads((1, 2, 20, 150, 24, 24))
    same(attention(query, key, value, bias=torch.zeros(20, 150)), attention(query, key, value))
    bias = torch.zeros(20, 150)
    bias[3] = -math.inf
    assert attention(query, key, value, bias=bias)[:, :, 3].isnan().all()
    bias[3], bias[4, 5] = 0, math.nan
    exact = F.scaled_dot_product_attention(query, key, value, bias.nan_to_num(-math.inf))
    assert sqnr(exact, attention(query, key, value, bias=bias)) > 32


def test_empty_heads():
    for shape in ((0, 2, 3, 4, 8, 8), (1, 0, 3, 4, 8, 8), (1, 2, 0, 4, 8, 8), (1, 2, 3, 0, 8, 8)):
        given = heads(shape)
        same(attention(*given), F.scaled_dot_product_attention(*given))


def test_as_many_threads_as_torch_has():
    given = heads((2, 3, 200, 150, 24, 24))
    expected = attention(*given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same(attention(*given), expected)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused():
    query, key, value = heads((1, 2, 3, 4, 8, 8))
    with pytest.raises(PackedError, match="queries and keys need as many channels"):
        engine.attention(query[..., :7], key, value, 1.0)
    with pytest.raises(PackedError, match="as many keys as values"):
        engine.attention(query, key, value[:, :, :3], 1.0)
    for wrong in (key[:, :1], key[0], key.double(), torch.cat((key, key))):
        with pytest.raises(PackedError, match=r"takes floats \(images, heads, tokens, channels\), alike in the first two; got"):
            engine.attention(query, wrong, value, 1.0)
    with pytest.raises(PackedError, match=r"bias must be float32 \(\.\.\., 4\); got torch.float64 \(5,\)"):
        engine.attention(query, key, value, 1.0, torch.zeros(5, dtype=torch.float64))


def test_it_compiles():
    given = heads((1, 2, 30, 40, 16, 16))
    for bias in (None, torch.zeros(30, 40)):
        torch.library.opcheck(torch.ops.halfbyte.attention, (*given, 0.3, bias), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    same(compiled(*given), attention(*given))
