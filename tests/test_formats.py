"""Number grids against literal tables, an exact-fraction oracle of the tie rule, and an independent implementation of FP4."""

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import formats
from halfbyte.errors import HalfbyteError, RecipeError
from halfbyte.formats import ALIASES, GRIDS, Grid, decode, encode, get_grid, levels_to_codes, minifloat, round_to_grid

# The integer each code stands for, written out: what a decoder in any other language must hold.
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12]
E3M0 = [0, 1, 2, 4, 8, 16, 32, 64]
ONE_TO_SEVEN = [1, 2, 3, 4, 5, 6, 7]
TABLES = {
    "int4": [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1],
    "lzs4": [0, *ONE_TO_SEVEN, 0, -1, -2, -3, -4, -5, -6, -7],
    "e2m1": [*E2M1, 0, -1, -2, -3, -4, -6, -8, -12],
    "e1m2": [0, *ONE_TO_SEVEN, 0, -1, -2, -3, -4, -5, -6, -7],
    "e3m0": [*E3M0, 0, -1, -2, -4, -8, -16, -32, -64],
    "ue2m2": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
    "ue1m3": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    "ue3m1": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
    "int8": [*range(128), *range(-128, 0)],
    "uint8": list(range(256)),
}
LARGEST_SHIFT = {"int4": 0, "lzs4": 4, "e2m1": 3, "e1m2": 4, "e3m0": 0, "ue2m2": 3, "ue1m3": 4, "ue3m1": 0, "int8": 0, "uint8": 0}
SIGN_MAGNITUDE = ("lzs4", "e2m1", "e1m2", "e3m0")

every_grid = pytest.mark.parametrize("name", TABLES)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
near = st.floats(-300, 300, width=32)  # where the levels are
quick = settings(max_examples=40, deadline=None)


def tensor(values):
    return torch.tensor(np.asarray(values, dtype=np.float32))


def all_codes(name):
    return torch.arange(len(TABLES[name]), dtype=torch.uint8)


def oracle(value, name):
    """The documented rule in exact fractions: the nearest level; of two equally near, the one of even magnitude index."""
    exact, magnitudes = Fraction(float(value)), sorted({abs(level) for level in TABLES[name]})
    return min(TABLES[name], key=lambda level: (abs(exact - level), magnitudes.index(abs(level)) % 2))


def midpoints(name):
    levels = sorted(set(TABLES[name]))
    return [(low + high) / 2 for low, high in itertools.pairwise(levels)]


def test_the_tables_are_all_the_grids_that_run():
    assert {name for name, grid in GRIDS.items() if not grid.simulated_only} == set(TABLES)
    assert all(grid.name == name for name, grid in GRIDS.items())


@every_grid
def test_levels_by_code(name):
    assert list(get_grid(name).levels) == TABLES[name]
    assert decode(all_codes(name), get_grid(name)).tolist() == TABLES[name]


@every_grid
def test_what_is_derived_from_a_table(name):
    grid, levels = get_grid(name), TABLES[name]
    assert (grid.top, grid.bottom, grid.signed) == (max(levels), min(levels), min(levels) < 0)
    assert len(levels) == 2**grid.bits
    assert grid.contiguous == (set(levels) == set(range(min(levels), max(levels) + 1)))
    assert grid.largest_shift == LARGEST_SHIFT[name]


@every_grid
def test_levels_fit_their_byte_at_the_largest_shift_and_would_not_at_one_more(name):
    grid = get_grid(name)
    limits = torch.iinfo(grid.decoded_dtype)
    shifted = [level << grid.largest_shift for level in grid.levels]
    assert limits.min <= min(shifted)
    assert max(shifted) <= limits.max
    if grid.bits == 4 and name != "int4":  # which carries none, see Grid.largest_shift
        assert max(shifted) * 2 > limits.max


WIDE = [name for name, grid in GRIDS.items() if grid.simulated_only and not grid.codebook]
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]  # fmt: skip  (the published table, rounded to float32 after arithmetic of little precision)


def test_nf4_is_the_published_table():
    grid, values = GRIDS["nf4"], torch.linspace(-1.2, 1.2, 1001)
    assert grid.levels == pytest.approx(NF4, abs=3e-7)
    assert grid.simulated_only
    nearest = torch.tensor(grid.levels)[(values[:, None] - torch.tensor(grid.levels)).abs().argmin(1)]
    assert torch.equal(round_to_grid(values, grid), nearest)
    assert torch.equal(decode(encode(values, grid), grid), nearest)


@pytest.mark.parametrize("name", WIDE)
def test_simulated_grids_are_the_floats_their_name_says(name):
    """specs: E + M = bits - sign; normal 2**(e - b) * (1 + f / 2**M), subnormal 2**(1 - b) * f / 2**M, no infinities."""
    grid = get_grid(name)
    exponent, mantissa = (int(part) for part in name.removeprefix("u").removeprefix("e").split("m"))
    assert exponent + mantissa == grid.bits - (not name.startswith("u"))
    magnitudes = [
        Fraction(2) ** max(e, 1) * (Fraction(f, 2**mantissa) + (e > 0)) for e in range(2**exponent) for f in range(2**mantissa)
    ]
    assert list(grid.magnitudes) == [value / magnitudes[1] for value in magnitudes]
    codes = torch.arange(2**grid.bits, dtype=torch.int32).to(torch.uint8)
    again = encode(decode(codes, grid), grid)
    assert torch.equal(decode(again, grid), decode(codes, grid))
    assert ((again == codes) | (decode(codes, grid) == 0)).all()


@pytest.mark.parametrize(("exponent", "mantissa"), [(1, 2), (1, 3), (2, 1), (2, 2), (3, 0), (3, 1), (4, 3), (5, 2)])
def test_minifloat_is_a_tiny_ieee_float(exponent, mantissa):
    subnormal = [Fraction(m, 2**mantissa) for m in range(2**mantissa)]
    normal = [(1 + Fraction(m, 2**mantissa)) * 2 ** (e - 1) for e in range(1, 2**exponent) for m in range(2**mantissa)]
    values = subnormal + normal
    smallest = min(value for value in values if value)
    assert list(minifloat(exponent, mantissa)) == [value / smallest for value in values]


def test_an_alias_is_the_same_grid():
    assert ALIASES == {"uint4": "ue1m3"}
    assert get_grid("uint4") is get_grid("ue1m3")


def test_an_unknown_grid_is_refused_with_the_names_of_all():
    with pytest.raises(RecipeError, match="unknown grid 'nf9'") as caught:
        get_grid("nf9")
    assert all(repr(name) in str(caught.value) for name in [*TABLES, "uint4"])
    assert isinstance(caught.value, HalfbyteError)


@every_grid
def test_every_code_survives_decoding_and_encoding(name):
    """Negative zero (code 8 of the sign-magnitude grids) comes back as code 0; every other code as itself."""
    expected = list(range(len(TABLES[name])))
    if name in SIGN_MAGNITUDE:
        expected[8] = 0
    levels = decode(all_codes(name), get_grid(name))
    assert encode(levels, get_grid(name)).tolist() == expected
    assert levels_to_codes(levels, get_grid(name)).tolist() == expected


@every_grid
def test_zero_has_no_sign(name):
    grid = get_grid(name)
    assert not decode(all_codes(name), grid)[decode(all_codes(name), grid) == 0].signbit().any()
    zeros = tensor([0.0, -0.0, 1e-45, -1e-45, 0.25, -0.25, 0.5, -0.5])
    rounded = round_to_grid(zeros, grid)
    assert rounded.tolist() == [0.0] * 8
    assert not rounded.signbit().any()
    assert encode(zeros, grid).tolist() == [0] * 8


@every_grid
def test_midpoints_and_their_float32_neighbours(name):
    middle = np.array(midpoints(name), dtype=np.float32)
    assert middle.tolist() == midpoints(name)
    for values in (middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))):
        expected = [oracle(value, name) for value in values]
        assert round_to_grid(tensor(values), get_grid(name)).tolist() == expected
        codes = encode(tensor(values), get_grid(name))
        assert [TABLES[name][code] for code in codes.tolist()] == expected


def test_ties_written_out():
    """The seven midpoints of E2M1 go to even mantissas; on integers the rule is round half to even."""
    assert round_to_grid(tensor([0.5, 1.5, 2.5, 3.5, 5, 7, 10]), get_grid("e2m1")).tolist() == [0, 2, 2, 4, 4, 8, 8]
    assert round_to_grid(tensor([-7.5, -6.5, -0.5, 0.5, 1.5, 6.5]), get_grid("int4")).tolist() == [-8, -6, 0, 0, 2, 6]
    assert round_to_grid(tensor([9, 11, 13, 15, 18, 22, 26]), get_grid("ue2m2")).tolist() == [8, 12, 12, 16, 16, 24, 24]


@every_grid
def test_saturation_at_both_ends(name):
    low, high = min(TABLES[name]), max(TABLES[name])
    above = tensor([high, high + 0.5, high + 1, 2 * high, 1e10, 3.4e38])
    assert round_to_grid(above, get_grid(name)).tolist() == [high] * 6
    assert round_to_grid(tensor([low - 0.5, low - 1, low - 300, -1e10, -3.4e38]), get_grid(name)).tolist() == [low] * 5


def test_e2m1_against_an_independent_implementation():
    """ml_dtypes counts in units of 1, this grid in units of its smallest subnormal, 0.5."""
    generator = np.random.default_rng(0)
    awkward = [0.0, -0.0, 1e-45, 1e-38, 0.49999997, 0.5, 0.50000006, 12, 13.999, 14, 14.001, 24, 1e4, 3.4e38]
    middle = np.array(midpoints("e2m1"), dtype=np.float32)
    values = np.concatenate(
        [
            generator.normal(0, 5, 20_000).astype(np.float32),
            generator.integers(-64, 64, 2_000).astype(np.float32) / 4,
            np.float32(awkward),
            -np.float32(awkward),
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
        ]
    )
    expected = (values * np.float32(0.5)).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2
    assert np.array_equal(round_to_grid(tensor(values), get_grid("e2m1")).numpy(), expected)


@pytest.mark.parametrize(("name", "dtype"), [("int8", np.int8), ("uint8", np.uint8)])
def test_eight_bit_codes_are_the_bytes_of_the_integers(name, dtype):
    values = np.random.default_rng(0).normal(0, 150, 5_000).astype(np.float32)
    limits = np.iinfo(dtype)
    expected = np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
    assert np.array_equal(encode(tensor(values), get_grid(name)).numpy(), expected.view(np.uint8))


@every_grid
@quick
@given(values=st.lists(near | float32s, min_size=1, max_size=20))
def test_rounding_is_nearest_and_idempotent(name, values):
    grid = get_grid(name)
    rounded = round_to_grid(tensor(values), grid)
    assert rounded.tolist() == [oracle(value, name) for value in np.float32(values)]
    assert torch.equal(round_to_grid(rounded, grid), rounded)
    assert torch.equal(decode(encode(tensor(values), grid), grid), rounded)


@every_grid
@quick
@given(values=st.lists(near | float32s, min_size=2, max_size=20))
def test_rounding_is_monotone(name, values):
    rounded = round_to_grid(tensor(sorted(values)), get_grid(name))
    assert (rounded.diff() >= 0).all()


@pytest.mark.parametrize("name", SIGN_MAGNITUDE)
@quick
@given(values=st.lists(near | float32s, min_size=1, max_size=20))
def test_rounding_is_odd(name, values):
    rounded = round_to_grid(tensor(values), get_grid(name))
    assert torch.equal(round_to_grid(-tensor(values), get_grid(name)), -rounded)


@every_grid
def test_shapes_dtypes_and_strides(name):
    grid = get_grid(name)
    values = torch.linspace(-20, 20, 60).view(3, 4, 5)
    for view in (values, values.transpose(0, 2), values[:, ::2], values[:0], values[0, 0, 0]):
        before = view.clone()
        rounded, codes = round_to_grid(view, grid), encode(view, grid)
        assert (rounded.dtype, rounded.shape) == (torch.float32, view.shape)
        assert (codes.dtype, codes.shape) == (torch.uint8, view.shape)
        assert rounded.flatten().tolist() == [oracle(value, name) for value in view.flatten().tolist()]
        assert torch.equal(view, before), "the input is not changed"


def test_a_grid_is_frozen_and_hashable():
    grid = get_grid("e2m1")
    with pytest.raises(AttributeError):
        grid.name = "mine"
    assert len({grid, Grid("e2m1", minifloat(2, 1), "sign-magnitude"), get_grid("int4")}) == 2


@pytest.fixture
def fresh_caches():
    """Each use of a grid builds tensors once per process; forget them before and after."""
    caches = [function for function in vars(formats).values() if hasattr(function, "cache_clear")]
    assert caches
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("first_use", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_the_first_use_of_a_grid_does_not_decide_its_precision(first_use):
    """Loaders build models under another default dtype or device; what is cached there must serve everyone after."""
    probe = tensor([0.501, 2.501, 5.01, 10.02])
    if isinstance(first_use, torch.dtype):
        torch.set_default_dtype(first_use)
        try:
            codes = encode(probe, get_grid("e2m1"))
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with first_use:
            codes = encode(probe, get_grid("e2m1"))
    assert decode(codes, get_grid("e2m1")).tolist() == [1, 3, 6, 12]
    assert round_to_grid(probe, get_grid("e2m1")).tolist() == [1, 3, 6, 12]


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.mantissa_bits])
def test_rounding_by_addition_is_rounding_by_table(name):
    """The fast path against the table search, on midpoints, their neighbours, extremes and random values."""
    grid = GRIDS[name]
    magnitudes = torch.tensor(grid.magnitudes, dtype=torch.float32)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    draw = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            middle,
            middle.nextafter(torch.tensor(torch.inf)),
            middle.nextafter(torch.tensor(0.0)),
            magnitudes,
            torch.randn(10_000, generator=draw) * grid.top / 3,
            torch.randn(10_000, generator=draw) * 2,
            torch.tensor([0.0, 1e-40, 1e30, torch.inf]),
        ]
    )
    values = torch.cat([values, -values])
    index = torch.bucketize((values if grid.signed else values.clamp(min=0)).abs(), formats._boundaries(grid), right=True)
    expected = magnitudes[index].copysign(values if grid.signed else values.clamp(min=0)).add(0.0)
    found = round_to_grid(values, grid)
    assert torch.equal(found, expected)
    assert not (found.signbit() & (found == 0)).any()
    strided = values[: len(values) // 2 * 2].view(2, -1).T
    assert torch.equal(round_to_grid(strided, grid), expected[: len(values) // 2 * 2].view(2, -1).T)


def test_mantissa_bits_are_those_of_minifloats_alone():
    for name, grid in GRIDS.items():
        wanted = int(name[-1]) if "m" in name and not grid.contiguous else None
        assert grid.mantissa_bits == wanted, name
    assert Grid("odd", (0, 1, 2, 3, 5, 6, 8, 12), "sign-magnitude").mantissa_bits is None
