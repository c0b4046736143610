"""Peaks of memory, against allocations whose size is known."""

import torch

from halfbyte.heal.memory import peak_memory, peak_of

MEGA = 1 << 20


def test_the_peak_is_of_what_is_alive_at_once():
    def work():
        first = torch.ones(4 * MEGA, dtype=torch.uint8)
        del first
        second, third = torch.ones(2 * MEGA, dtype=torch.uint8), torch.ones(3 * MEGA, dtype=torch.uint8)
        return second[:1], third[:1]

    assert 5 * MEGA <= peak_of(work) < 5.2 * MEGA


def test_the_backward_pass_counts():
    x = torch.ones(MEGA // 4, requires_grad=True)  # 1 MB

    def work():
        x.exp().exp().sum().backward()
        x.grad = None

    assert 3 * MEGA <= peak_of(work) <= 5 * MEGA


def test_a_process_has_a_peak():
    before = peak_memory()
    kept = torch.ones(before + 64 * MEGA, dtype=torch.uint8)
    assert peak_memory() > before
    assert kept[-1] == 1
