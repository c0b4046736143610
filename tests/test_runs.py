"""What long runs share: digests that see every change, fingerprints that name the first difference, signals that wait."""

import os
import signal

import pytest
import torch
from torch import nn

from halfbyte.errors import ResumeError
from halfbyte.runs import StopSignal, check_fingerprint, digest, flatten


def test_digests_see_names_types_shapes_and_values():
    x = torch.arange(6.0)
    variants = [{"a": x}, {"b": x}, {"a": x.double()}, {"a": x.view(2, 3)}, {"a": x + 1}, {"a": x, "b": x}]
    assert len({digest(variant) for variant in variants}) == len(variants)
    layer = nn.Linear(2, 3)
    assert digest(layer) == digest(layer.state_dict()) == digest(layer)


def test_fingerprints_name_what_differs(tmp_path):
    own = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    check_fingerprint(own, {"a": {"b": 1, "c": (1, 2)}, "d": "x"}, tmp_path)
    for other, words in (
        ({"a": {"b": 2, "c": [1, 2]}, "d": "x"}, r"its a\.b is 1, this run's is 2"),
        ({"a": {"b": 1, "c": [1, 2]}}, r'its d is "x", this run\'s is "nothing"'),
        ({**own, "e": 1}, r'its e is "nothing", this run\'s is 1'),
    ):
        with pytest.raises(ResumeError, match=words):
            check_fingerprint(own, other, tmp_path)
    assert flatten(own) == {"a.b": 1, "a.c": [1, 2], "d": "x"}


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_the_first_signal_is_noted_and_the_second_acts():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with StopSignal():
        pass
    assert signal.getsignal(signal.SIGINT) is before
