"""SQNR against the formula written out in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.metrics import sqnr


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sqnr_is_the_formula(dtype):
    reference, other = (draw(5, 7, seed=seed).to(dtype) for seed in (0, 1))
    r, o = reference.double().numpy(), other.double().numpy()
    assert sqnr(reference, other) == pytest.approx(10 * np.log10((r**2).sum() / ((r - o) ** 2).sum()), rel=1e-12)


def test_sqnr_of_a_tenth_is_twenty_decibels():
    assert sqnr(torch.ones(4), torch.full((4,), 0.9, dtype=torch.float64)) == pytest.approx(20)


def test_sqnr_sums_in_float64_over_chunks():
    reference = torch.full((2**20 + 3,), 0.1)  # more than one chunk, and a float32 sum of it would be off in the fourth digit
    other = reference.clone()
    other[-1] = 0.0
    assert sqnr(reference, other) == pytest.approx(10 * math.log10(2**20 + 3), rel=1e-12)


def test_sqnr_at_the_edges():
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr(one, one) == math.inf
    assert sqnr(zero, zero) == math.inf
    assert sqnr(zero, one) == -math.inf
    assert math.isnan(sqnr(one, torch.tensor([1.0, math.nan, 1.0])))
    assert sqnr(one, torch.tensor([1.0, math.inf, 1.0])) == -math.inf
    assert math.isnan(sqnr(torch.full((3,), math.inf), one))
    assert sqnr(one.requires_grad_(), 2 * one) == 0


def test_sqnr_refuses_other_shapes():
    with pytest.raises(HalfbyteError, match=r"shapes \(3,\) and \(1, 3\) differ"):
        sqnr(torch.ones(3), torch.ones(1, 3))
