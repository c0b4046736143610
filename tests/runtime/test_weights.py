"""The engine's scales, codes and multipliers are those of plain torch, bit for bit, on every instruction set."""

import itertools

import pytest
import torch
from torch import nn

from halfbyte import quantizers
from halfbyte.errors import NonFiniteError
from halfbyte.layers import FAKE_QUANT
from halfbyte.presets import PRESETS
from halfbyte.recipe import LayerSpec, WeightSpec
from halfbyte.runtime import engine, weights
from halfbyte.runtime.backends import backend

pytestmark = pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}")

SPECS = {
    spec.describe() + ("" if spec.scale == "search" else " absmax"): spec
    for spec in (
        *(WeightSpec("lzs4", 4, subgroup) for subgroup in (16, 32, 7)),
        WeightSpec("lzs4", 2, 16),
        WeightSpec("lzs4", 4, 16, "absmax"),
        WeightSpec("e1m2", 4, 32),
        *(WeightSpec("e2m1", 3, subgroup) for subgroup in (16, 32)),
        *(WeightSpec(grid) for grid in ("int4", "lzs4", "e1m2", "e2m1", "e3m0", "int8")),
        WeightSpec("int4", subgroup=48),
        *(WeightSpec("e2m1", subgroup=subgroup, max_multiple=10) for subgroup in (16, 32, 7)),
        *(WeightSpec(grid, max_multiple=16) for grid in ("lzs4", "int4")),
        WeightSpec("e2m1", scale="absmax", max_multiple=10),
        WeightSpec("e1m2", subgroup=24, max_multiple=3),
        WeightSpec("int8", scale="absmax"),
    )
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 3, 16, 33, 128, 259, 530)


def rows_of(count, dtype):
    """Normal and heavy-tailed rows; levels, midpoints and saturated peaks, where ties abound; and awkward ones."""
    generator = torch.Generator().manual_seed(count)
    normal, tails = torch.randn(2, 6, count, generator=generator)
    quarters = torch.randint(-480, 481, (6, count), generator=generator) / 4
    awkward, ramp = torch.zeros(9, count), torch.linspace(-1, 1, count)
    awkward[1], awkward[2, -1], awkward[3, 0], awkward[4, ::2] = 0.3, -7e-3, 5.0, -1.5
    awkward[5], awkward[6], awkward[7], awkward[8] = 1e-40, ramp * 1e-37, ramp * 3e38, ramp.abs() * 2e19 + 1e-21
    rows = torch.cat([normal, normal * tails.exp() * 0.02, quarters, awkward]).to(dtype)
    return rows.nan_to_num(0, 6e4, -6e4)  # the largest are infinities in float16


@pytest.fixture
def choose(monkeypatch):
    def set_variables(name, isa):
        monkeypatch.setenv("HALFBYTE_BACKEND", name)
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        backend.cache_clear()

    yield set_variables
    backend.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_engine_rounds_as_torch_does(choose, spec, dtype):
    for count in COUNTS:
        matrix = rows_of(count, dtype)
        choose("reference", "")
        assert not weights.takes(matrix, spec)
        expected, quality = weights.pack_rows(matrix, spec, "")
        for isa in engine.instruction_sets():
            choose("cpu", isa)
            assert weights.takes(matrix, spec)
            found, energies = weights.pack_rows(matrix, spec, "")
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), (count, isa, name)
            assert energies.signal == pytest.approx(quality.signal, rel=1e-12)
            assert energies.noise == pytest.approx(quality.noise, rel=1e-9)


def test_rows_that_are_not_finite_have_no_scale_and_are_named():
    for spec, bad in itertools.product(SPECS.values(), (torch.nan, torch.inf, -torch.inf)):
        matrix = torch.ones(3, 40)
        matrix[1, 39] = bad
        assert weights.weight_scale(matrix, spec).isnan().view(-1).tolist() == [False, True, False]
        with pytest.raises(NonFiniteError, match="the layer holds 1 NaN or infinite values of 120"):
            weights.pack_rows(matrix, spec, "the layer")


def test_what_the_engine_does_not_take_is_searched_in_torch():
    matrix = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    others = [WeightSpec("int4", norm=2.4), WeightSpec("int4", group=16), PRESETS["nvfp4-w4a4"].inner.weight]
    for spec in others:
        assert not weights.takes(matrix, spec)
        assert torch.equal(weights.weight_scale(matrix, spec), quantizers.weight_scale(matrix, spec))
    spec = WeightSpec("lzs4", 4)
    assert not weights.takes(matrix.double(), spec)
    assert torch.equal(weights.weight_scale(matrix.double(), spec), weights.weight_scale(matrix, spec))
    assert not weights.takes(matrix[:0], spec)


def test_any_strides_any_number_of_threads_and_inference_mode():
    spec = WeightSpec("lzs4", 4)
    matrix = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    expected, quality = weights.pack_rows(matrix, spec, "")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            found, energies = weights.pack_rows(matrix.t().contiguous().t(), spec, "")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert energies == quality


def test_the_engine_refuses_what_does_not_fit():
    matrix, scale, codes = torch.ones(2, 20), torch.ones(2, 1), torch.empty(2, 10, dtype=torch.uint8)
    plain = engine.weight_format(WeightSpec("int4"))
    with pytest.raises(ValueError, match="20 bytes of codes; got 18"):
        engine.round_weights(matrix, plain, scale, codes[:, :9].contiguous(), None)
    with pytest.raises(ValueError, match="4 bytes of multipliers; got 0"):
        engine.round_weights(matrix, engine.weight_format(WeightSpec("lzs4", 4, 8)), scale, codes, None)
    with pytest.raises(ValueError, match="2 rows and 1 scales"):
        engine.round_weights(matrix, plain, scale[:1], codes, None)
    with pytest.raises(ValueError, match="int4 cannot carry shifts up to 1"):
        engine.search_scales(matrix, (plain[0], 1, 16, 0), [1.0])
    with pytest.raises(ValueError, match="int4 cannot carry multiples up to 17"):
        engine.search_scales(matrix, (plain[0], 0, 16, 17), [1.0])


@pytest.mark.parametrize("spec", [WeightSpec("lzs4", 4), WeightSpec("e2m1", norm=2.4), WeightSpec("int8", scale="absmax")])
@pytest.mark.parametrize("layer", [nn.Linear(37, 9), nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 4, 2, groups=2)], ids=str)
def test_layers_are_packed_and_judged_as_torch_does(choose, layer, spec):
    made = FAKE_QUANT[type(layer)].from_float(layer, LayerSpec(spec))
    choose("reference", "scalar")
    exact, quality = weights.pack_layer(made), weights.weight_quality(layer, made)
    choose("cpu", "scalar")
    found = weights.pack_layer(made)
    assert all(torch.equal(found.get_buffer(name), tensor) for name, tensor in exact.named_buffers() if tensor is not None)
    assert weights.weight_quality(layer, made) == pytest.approx(quality, rel=1e-6)
