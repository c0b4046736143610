"""What carries the timestep: the table of architectures against what changing sample and timestep shows."""

import pytest
import torch
from torch import nn

from halfbyte.calibration import Call
from halfbyte.errors import HealError
from halfbyte.heal.temporal import temporal_layers, traced_layers
from halfbyte.targets import TARGETS
from halfbyte.timestep import ARGUMENTS


def calls(arguments):
    """Two calls of a model with these keyword arguments, at different timesteps."""
    name = next(name for name in ARGUMENTS if name in arguments)
    time = arguments[name]
    return Call((), arguments), Call((), {**arguments, name: time * 0 + (7 if time.max() > 1 else 0.25)})


@pytest.mark.parametrize("name", TARGETS)
def test_the_table_and_the_trace_agree(build, call, name):
    model = build(name)
    known = temporal_layers(model, *calls(call(name)))
    assert known
    assert set(known) == set(traced_layers(model, *calls(call(name))))


class Unknown(nn.Module):
    """A model of its own make: time and class are joined, and one projection reads the sample too."""

    def __init__(self):
        super().__init__()
        self.clock, self.label, self.into = nn.Linear(1, 8), nn.Linear(3, 8), nn.Linear(8, 4)
        self.mixed, self.body = nn.Linear(8, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x, t, label=None):
        time = self.clock(torch.as_tensor(t, dtype=torch.float32).view(-1, 1)) + self.label(label)
        mixed = self.mixed(time + x.mean())
        return self.body(x + self.into(time.relu())[..., None, None] + mixed[..., None, None])


@pytest.mark.parametrize("positional", [True, False])
def test_models_that_nobody_listed_are_traced(positional):
    torch.manual_seed(0)
    x, label = torch.randn(2, 4, 5, 5), torch.eye(3)[:2]
    made = [
        Call((x, torch.tensor([t, t])), {"label": label}) if positional else Call((), {"x": x, "t": [t, t], "label": label})
        for t in (10.0, 500.0)
    ]
    assert temporal_layers(Unknown(), *made) == ["clock", "into"]


def test_calls_that_show_nothing_are_refused(build, call):
    arguments = call("UNet2DModel")
    with pytest.raises(HealError, match="both are the same"):
        traced_layers(build("UNet2DModel"), Call((), arguments), Call((), arguments))
    with pytest.raises(HealError, match="none of x, label is a float tensor"):
        traced_layers(Unknown(), Call((), {"x": 1, "t": 5}), Call((), {"x": 1, "t": 6}))
