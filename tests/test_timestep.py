"""The timestep of a denoiser's call, read however it is passed, and the row of a table it stands for."""

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.errors import CalibrationError
from halfbyte.timestep import TimestepState

SAMPLE = torch.zeros(2, 3)


class Denoiser(nn.Module):
    """(sample, timestep, condition), as the UNets and transformers of diffusers have it."""

    def forward(self, sample, timestep, condition=None):
        return sample


class Optional(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None, **kwargs):
        return hidden_states


class KeywordOnly(nn.Module):
    def forward(self, sample, *conditions, timestep):
        return sample


class ShortName(nn.Module):
    def forward(self, x, t):
        return x


class Plural(nn.Module):
    def forward(self, timesteps, x):
        return x


class Both(nn.Module):
    """Where several names are there, `timestep` is the one."""

    def forward(self, x, t, timestep):
        return x


CALLS = {
    "positional": (Denoiser, (SAMPLE, 5), {}, 5),
    "keyword": (Denoiser, (SAMPLE,), {"timestep": 5}, 5),
    "all by keyword": (Denoiser, (), {"timestep": 5, "sample": SAMPLE}, 5),
    "with more behind": (Denoiser, (SAMPLE, 5, SAMPLE), {}, 5),
    "third, by keyword": (Optional, (SAMPLE,), {"timestep": 5, "guidance": 9}, 5),
    "third, positional": (Optional, (SAMPLE, None, 5), {}, 5),
    "keyword only behind *args": (KeywordOnly, (SAMPLE, 77, 88), {"timestep": 5}, 5),
    "named t": (ShortName, (SAMPLE, 5), {}, 5),
    "named timesteps, first": (Plural, (5, SAMPLE), {}, 5),
    "timestep before t": (Both, (SAMPLE, 7, 5), {}, 5),
}
VALUES = {
    "int": (999, 999.0),
    "float": (0.25, 0.25),
    "0-d tensor": (torch.tensor(12), 12.0),
    "one-element tensor": (torch.tensor([12]), 12.0),
    "equal steps": (torch.tensor([40, 40, 40]), 40.0),
    "mixed steps: the largest": (torch.tensor([3, 900, 17]), 900.0),
    "float tensor": (torch.tensor([0.5]), 0.5),
    "bfloat16 tensor": (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
    "zero": (torch.tensor(0), 0.0),
    "numpy scalar": (np.int64(7), 7.0),
}


@pytest.mark.parametrize(("kind", "args", "kwargs", "expected"), CALLS.values(), ids=CALLS)
def test_the_timestep_is_found_however_it_is_passed(kind, args, kwargs, expected):
    state, denoiser = TimestepState(), kind()
    assert state.value is None
    state.attach(denoiser)
    denoiser(*args, **kwargs)
    assert state.value == expected
    assert isinstance(state.value, float)


@pytest.mark.parametrize(("given", "expected"), VALUES.values(), ids=VALUES)
def test_any_kind_of_number_is_a_timestep(given, expected):
    state, denoiser = TimestepState(), Denoiser()
    state.attach(denoiser)
    denoiser(SAMPLE, given)
    assert state.value == expected


def test_each_call_replaces_the_last_and_a_call_without_one_does_not():
    state, denoiser = TimestepState(), Optional()
    state.attach(denoiser)
    for step in (900, 500, 0):
        denoiser(SAMPLE, timestep=step)
        assert state.value == step
    denoiser(SAMPLE, timestep=7)
    denoiser(SAMPLE)
    denoiser(SAMPLE, timestep=None)
    assert state.value == 7


def test_a_removed_hook_no_longer_follows():
    state, denoiser = TimestepState(), Denoiser()
    handle = state.attach(denoiser)
    denoiser(SAMPLE, 3)
    handle.remove()
    denoiser(SAMPLE, 4)
    assert state.value == 3


def test_two_denoisers_keep_two_states():
    states, denoisers = [TimestepState(), TimestepState()], [Denoiser(), Denoiser()]
    for state, denoiser in zip(states, denoisers, strict=True):
        state.attach(denoiser)
    denoisers[0](SAMPLE, 1)
    denoisers[1](SAMPLE, 2)
    assert [state.value for state in states] == [1, 2]


def test_the_layers_inside_see_the_timestep_of_the_call_under_way():
    state, seen = TimestepState(), []

    class Outer(nn.Module):
        def forward(self, sample, timestep):
            seen.append(state.value)
            return sample

    denoiser = Outer()
    state.attach(denoiser)
    denoiser(SAMPLE, 11)
    denoiser(SAMPLE, timestep=torch.tensor([12]))
    assert seen == [11, 12]


def test_a_forward_without_a_timestep_is_refused():
    class Plain(nn.Module):
        def forward(self, sample, time):
            return sample

    with pytest.raises(CalibrationError, match=r"Plain\.forward\(sample, time\) has no argument named timestep, timesteps, t"):
        TimestepState().attach(Plain())


TABLE = [0, 100, 250, 999]


@pytest.mark.parametrize(
    ("value", "row"),
    [(-1, 0), (0, 0), (0.5, 1), (99.9, 1), (100, 1), (100.001, 2), (250, 2), (251, 3), (998, 3), (999, 3), (1000, 3), (1e9, 3)],
)
def test_the_row_is_the_nearest_at_or_above(value, row):
    state = TimestepState()
    state.value = float(value)
    assert state.row(TABLE) == row
    at_or_above = [step for step in TABLE if step >= value] or TABLE[-1:]
    assert TABLE[state.row(TABLE)] == min(at_or_above)


def test_a_table_of_one_row_serves_every_step():
    state = TimestepState()
    for state.value in (0.0, 500.0, 2000.0):
        assert state.row([500]) == 0
        assert state.row((500.0,)) == 0


def test_no_row_before_the_first_call_nor_in_an_empty_table():
    state = TimestepState()
    with pytest.raises(CalibrationError, match="not been called since its hook was attached"):
        state.row(TABLE)
    state.value = 5.0
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        state.row([])


def at(*times):
    """A state that has seen a call at these timesteps."""
    state, denoiser = TimestepState(TABLE), Denoiser()
    state.attach(denoiser)
    denoiser(SAMPLE, torch.tensor(times))
    return state


def test_rows_have_the_entries_of_calls_of_their_own():
    times = [250.0, 0.0, 100.5, 1e9, -3.0, 250.001]
    found = at(*times).rows(len(times))
    assert found.dtype == torch.int64
    assert found.tolist() == [at(time).row(TABLE) for time in times]
    assert at(*times).rows(12).tolist() == [row for row in found.tolist() for _ in range(2)]


def test_one_entry_for_all_rows_where_they_agree():
    for state in (at(40), at(40, 40), at(20, 90)):  # 20 and 90 have the same entry
        assert state.rows(6) is None
    state, denoiser = TimestepState(TABLE), Denoiser()
    state.attach(denoiser)
    denoiser(SAMPLE, torch.tensor([1, 900]))
    assert state.rows(2) is not None
    denoiser(SAMPLE, 900)
    assert state.rows(2) is None


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_rows_that_cannot_be_told_apart_are_refused(rows):
    with pytest.raises(CalibrationError, match=f"got {rows} rows in a call with 2 timesteps"):
        at(1, 900).rows(rows)


def test_no_rows_before_the_first_call():
    with pytest.raises(CalibrationError, match="not been called"):
        TimestepState(TABLE).rows(2)
