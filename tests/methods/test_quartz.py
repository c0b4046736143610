"""The paper's dataflow gives exactly the integers of the generic quantizers, by the arithmetic the paper describes."""

import pytest
import torch

from halfbyte.errors import RecipeError
from halfbyte.formats import GRIDS
from halfbyte.methods.quartz import flags, largest_bits, paper_product, restore, stage1, suppress
from halfbyte.presets import PRESETS
from halfbyte.quantizers import quantize_activation, quantize_weight, weight_scale
from halfbyte.recipe import ActivationSpec, WeightSpec

NEAREST = ActivationSpec("lzs4", max_shift=4)
TRUNCATE = NEAREST.replace(rounding="truncate", peak=127)
UNSIGNED = ActivationSpec("ue1m3", max_shift=4, zero_point=True)
ACTIVATIONS = {
    "nearest": NEAREST,
    "nearest, subgroup 32": NEAREST.replace(subgroup=32),
    "nearest, subgroup 8": NEAREST.replace(subgroup=8),
    "127": NEAREST.replace(peak=127),
    "truncated": TRUNCATE,
    "truncated, subgroup 32": TRUNCATE.replace(subgroup=32),
    "unsigned": UNSIGNED,
    "unsigned, subgroup 32": UNSIGNED.replace(subgroup=32),
    "e2m1": ActivationSpec("e2m1", max_shift=3),
}
WEIGHTS = {
    "lzs4": WeightSpec("lzs4", scale="absmax", max_shift=4),
    "lzs4, subgroup 32": WeightSpec("lzs4", scale="absmax", max_shift=4, subgroup=32),
    "lzs4, subgroup 24": WeightSpec("lzs4", scale="absmax", max_shift=4, subgroup=24),
    "e2m1": WeightSpec("e2m1", scale="absmax", max_shift=3),
    "int4": WeightSpec("int4", scale="absmax"),
}


def inputs(channels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    plain = torch.randn(5, channels, generator=generator)
    outlier = plain.clone()
    outlier[:, channels // 2] *= 50
    return {
        "plain": plain,
        "outlier": outlier,
        "after SiLU": torch.nn.functional.silu(3 * plain),
        "zeros": torch.zeros(2, channels),
        "one value": torch.nn.functional.one_hot(torch.tensor([0, channels - 1]), channels).float(),
        "all at the top": torch.full((2, channels), 3.0),
        "all at the bottom": torch.full((2, channels), -3.0),
        "halves": torch.arange(2 * channels).view(2, channels) % 15 * 0.5 - 3.5,
        "tiny": plain * 1e-30,
    }


# A subgroup of its own each: the int8 integers, FLAG, and the 4-bit words rounded to nearest and truncated.
HAND = [
    ([3, -2, 5, 0], 0, [3, -2, 5, 0], [3, -2, 5, 0]),
    ([100, 3, -2, 10], 4, [6, 0, 0, 1], [6, 0, 0, 0]),
    ([15, 1, -7, 8], 1, [7, 0, -4, 4], [7, 0, -3, 4]),
    ([127, -64, 20, 5], 4, [7, -4, 1, 0], [7, -4, 1, 0]),
    ([0, 0, 0, 0], 0, [0, 0, 0, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("x_hat", "flag", "rounded", "cut"), HAND)
def test_worked_examples(x_hat, flag, rounded, cut):
    x_hat = torch.tensor([x_hat], dtype=torch.int32)
    assert flags(x_hat, NEAREST).tolist() == [[flag]]
    for spec, words in ((NEAREST, rounded), (TRUNCATE, cut)):
        x4, found = suppress(x_hat, spec)
        assert x4.tolist() == [words]
        assert found.tolist() == [[flag]]
        assert restore(x4, found, 16).tolist() == [[word << flag for word in words]]


def test_a_value_above_the_top_code_may_take_one_shift_more():
    x4, flag = suppress(torch.tensor([[31, 31, 31, 16]], dtype=torch.int32), NEAREST)
    assert (x4.tolist(), flag.tolist()) == ([[4, 4, 4, 2]], [[3]])


FLAG_TABLE = {range(0, 8): 0, range(8, 16): 1, range(16, 32): 2, range(32, 64): 3, range(64, 128): 4}
UNSIGNED_TABLE = {range(0, 16): 0, range(16, 32): 1, range(32, 64): 2, range(64, 128): 3, range(128, 256): 4}


@pytest.mark.parametrize(("spec", "table"), [(NEAREST, FLAG_TABLE), (UNSIGNED, UNSIGNED_TABLE)], ids=["signed", "unsigned"])
def test_flag_of_every_magnitude(spec, table):
    for magnitudes, flag in table.items():
        for sign in (1, -1) if spec is NEAREST else (1,):
            groups = torch.zeros(len(magnitudes), spec.subgroup, dtype=torch.int32)
            groups[:, 3] = sign * torch.tensor(magnitudes, dtype=torch.int32)
            assert (flags(groups, spec) == flag).all()


def test_or_of_magnitudes_has_the_top_bit_of_the_largest():
    x_hat = torch.tensor([[5, -8, 3, 0, 64, -1]], dtype=torch.int32)
    assert largest_bits(x_hat, 4).tolist() == [[5 | 8 | 3, 64 | 1]]


@pytest.mark.parametrize("channels", [1, 16, 77])
@pytest.mark.parametrize("spec", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_the_steps_are_the_generic_quantizer(spec, channels):
    for kind, x in inputs(channels).items():
        integers, scale = quantize_activation(x[:, None], spec)
        x_hat, s, z = stage1(x, spec)
        x4, flag = suppress(x_hat, spec)
        assert torch.equal(restore(x4, flag, spec.subgroup) - z, integers[:, 0].to(torch.int32)), kind
        assert torch.equal(s, scale[:, 0]), kind
        assert x_hat.abs().max() <= spec.top
        assert set(x4.unique().tolist()) <= set(GRIDS[spec.grid].levels)
        lowest = flags(x_hat, spec)
        assert ((flag == lowest) | (flag == lowest + 1)).all(), kind
        if spec.rounding == "truncate":
            assert torch.equal(flag, lowest), kind


@pytest.mark.parametrize("channels", [1, 77, 130])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("spec", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_paper_product_is_the_int8_product(spec, weight, channels):
    w = torch.randn(7, channels, generator=torch.Generator().manual_seed(1))
    stored = quantize_weight(w, weight_scale(w, weight), weight)
    w_flags = None if stored.multiplier is None else stored.multiplier.log2().to(torch.int32)
    levels = stored.levels.to(torch.int32)
    w4 = levels if w_flags is None else levels >> w_flags.repeat_interleave(weight.subgroup, 1)[:, :channels]
    for kind, x in inputs(channels).items():
        integers, _ = quantize_activation(x[:, None], spec)
        expected = integers[:, 0].long() @ levels.long().T
        x_hat, _, z = stage1(x, spec)
        x4, flag = suppress(x_hat, spec)
        product = paper_product(x4, flag, w4, w_flags, spec.subgroup, weight.subgroup)
        assert product.dtype == torch.int32
        assert torch.equal(product.long() - z.long() * levels.sum(1), expected), kind


def test_paper_product_at_the_largest_integers():
    channels = 33
    x4 = torch.full((1, channels), 7, dtype=torch.int32)
    flag = torch.full((1, 3), 4, dtype=torch.int32)
    assert paper_product(x4, flag, -x4, flag).tolist() == [[-112 * 112 * channels]]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("quartz")])
def test_quartz_presets_round_the_activation_as_described(name):
    """Each preset's activation, with the groups of stage 1 cut into rows."""
    for spec in filter(None, (PRESETS[name].inner.activation, PRESETS[name].after_silu)):
        if not spec.max_shift:
            continue
        x = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
        expected, scale = quantize_activation(x[:, None], spec)
        rows = x.view(-1, spec.group or 192)
        x_hat, s, z = stage1(rows, spec.replace(group=0))
        x4, flag = suppress(x_hat, spec)
        values = ((restore(x4, flag, spec.subgroup) - z) * s).view(x.shape)
        assert torch.equal(values, (expected * scale)[:, 0])


def test_stage1_refuses_groups():
    with pytest.raises(RecipeError, match="groups of 64; cut the tokens"):
        stage1(torch.zeros(1, 64), NEAREST.replace(group=64))
