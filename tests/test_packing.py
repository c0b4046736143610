"""The nibble order, pinned by golden bytes; every shape round-trips; what does not fit is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, CorruptError
from halfbyte.packing import pack_nibbles, unpack_nibbles

shapes = st.lists(st.integers(0, 5), max_size=3).flatmap(lambda lead: st.integers(0, 33).map(lambda n: (*lead, n)))


def codes_of(*values):
    return torch.tensor(values, dtype=torch.uint8)


GOLDEN = {
    "0 1 2 3 4 5 6 7": "10325476",
    "15 0": "0f",
    "0 15": "f0",
    "9 10 11 12 13": "a9cb0d",  # an odd tail: the high nibble is code 0
    "8": "08",
    "": "",
}


@pytest.mark.parametrize(("codes", "packed"), GOLDEN.items(), ids=lambda text: text or "none")
def test_golden_bytes(codes, packed):
    expected = torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8)
    values = codes_of(*map(int, codes.split()))
    assert torch.equal(pack_nibbles(values), expected)
    assert torch.equal(unpack_nibbles(expected, len(values)), values)


def test_each_row_is_packed_on_its_own():
    rows = codes_of(*range(1, 7)).view(2, 3)
    assert pack_nibbles(rows).tolist() == [[0x21, 0x03], [0x54, 0x06]]


def test_all_pairs():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack_nibbles(pairs)
    assert packed.flatten().tolist() == [low + 16 * high for low in range(16) for high in range(16)]
    assert torch.equal(unpack_nibbles(packed, 2), pairs)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_round_trip(shape, seed):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    before = codes.clone()
    packed = pack_nibbles(codes)
    assert (packed.dtype, packed.is_contiguous()) == (torch.uint8, True)
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, shape[-1]), codes)
    assert torch.equal(codes, before)


def test_strided_codes_pack_like_contiguous_ones():
    codes = torch.randint(0, 16, (6, 10), dtype=torch.uint8)
    for view in (codes.t(), codes[:, 1::3], codes[:, 1:8], codes[:1].expand(4, 10)):
        assert torch.equal(pack_nibbles(view), pack_nibbles(view.clone(memory_format=torch.contiguous_format)))
        assert torch.equal(unpack_nibbles(pack_nibbles(view), view.shape[-1]), view)
        assert pack_nibbles(view).is_contiguous()


def test_the_padding_nibble_is_ignored_when_read():
    assert unpack_nibbles(codes_of(0x21, 0xF3), 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("packed", "count", "got"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), 4, "rows of 3"),
        (torch.zeros(2, 3, dtype=torch.uint8), 7, "rows of 3"),
        (torch.zeros(2, 0, dtype=torch.uint8), 1, "rows of 0"),
        (torch.zeros(2, 1, dtype=torch.uint8), 0, "rows of 1"),
        (torch.zeros(2, 3, dtype=torch.int8), 6, "torch.int8"),
        (torch.zeros(2, 3), 6, "torch.float32"),
    ],
)
def test_rows_that_cannot_hold_the_codes_are_corrupt(packed, count, got):
    with pytest.raises(CorruptError, match=got) as caught:
        unpack_nibbles(packed, count)
    assert f"{count} packed codes need uint8 rows of {(count + 1) // 2} bytes" in str(caught.value)
    assert isinstance(caught.value, CheckpointError)
