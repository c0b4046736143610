"""Tracing: outputs of one-sided functions are followed through what keeps their values, and lost where values are mixed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfbyte.calibration import Call, collect
from halfbyte.tracing import ActivationTrace

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
PATHS = {  # what is done to X -> the source that is found
    "SiLU": (F.silu, "SiLU"),
    "GELU": (lambda x: F.gelu(x, approximate="tanh"), "GELU"),
    "in place": (lambda x: F.silu(x.clone(), inplace=True), "SiLU"),
    "module": (nn.SiLU(), "SiLU"),
    "views": (lambda x: F.silu(x).flatten(2).transpose(1, 2).contiguous().view(2, 4, 4, 4)[:, 1:], "SiLU"),
    "dropout": (lambda x: F.dropout(F.silu(x), 0.5, training=False), "SiLU"),
    "dropout module": (nn.Sequential(nn.SiLU(), nn.Dropout(0.3)).eval(), "SiLU"),
    "cast": (lambda x: F.silu(x).to(torch.bfloat16), "SiLU"),
    "upsampled": (lambda x: F.interpolate(F.silu(x), scale_factor=2.0, mode="nearest"), "SiLU"),
    "concatenated": (lambda x: torch.cat([F.silu(x), F.silu(2 * x)], 1), "SiLU"),
    "chunks": (lambda x: F.gelu(x).chunk(2, 1)[1], "GELU"),
    "half of a concatenation": (lambda x: torch.cat([F.silu(x), x], 1), None),
    "sum": (lambda x: F.silu(x) + x, None),
    "product of a GEGLU": (lambda x: F.gelu(x) * x, None),
    "linear": (lambda x: F.linear(F.silu(x), torch.eye(4)), None),
    "none": (lambda x: x.flatten(1), None),
}


@pytest.mark.parametrize("path", PATHS)
def test_sources(path):
    function, expected = PATHS[path]
    with ActivationTrace() as trace, torch.no_grad():
        assert trace.source(function(X)) == expected


def test_memory_of_what_is_gone_is_given_back():
    with ActivationTrace() as trace:
        for _ in range(5):
            F.silu(X)
        kept = F.silu(X)
    assert list(trace._sources.keys()) == [kept]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.after, self.before, self.sometimes = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, flag):
        y = self.after(F.silu(self.before(x)))
        return self.sometimes(F.silu(y) if flag else y)


def test_a_layer_is_one_sided_when_all_its_calls_are():
    for flags, expected in (((True, True), "SiLU"), ((True, False), None), ((False, True), None)):
        found = collect(Branches(), [Call((X, flag), {}) for flag in flags], ["before", "after", "sometimes"])
        assert {name: one.source for name, one in found.items()} == {"before": None, "after": "SiLU", "sometimes": expected}
