"""The table of times: every call of every layer is in it, equal ones once; what is kept of it, and when it is made again."""

import json

import pytest
from diffusers import DDIMPipeline

from halfbyte import sensitivity as room
from halfbyte.bench.latency import known_latency, measure_latency
from halfbyte.conversion import quantizable_layers
from halfbyte.errors import CheckpointError, HalfbyteError, ModelError
from halfbyte.latency import FLOAT, Latency


@pytest.fixture
def times(pipe):
    turns = []
    made = measure_latency(pipe, room.LADDER, rounds=1, progress=lambda *turn: turns.append(turn))
    assert turns[-1][1] == turns[-1][2] == len(turns) == 2
    return made


def test_every_call_of_every_layer_is_measured_equal_ones_once(pipe, times):
    assert set(times.calls) == set(quantizable_layers(pipe.unet))
    assert all(sum(made.values()) == 1 for made in times.calls.values())  # this model calls each layer once
    assert {case for made in times.calls.values() for case in made} == set(times.cases)
    assert times.calls["mid_block.resnets.0.conv1"] == times.calls["mid_block.resnets.1.conv1"]
    (case,) = times.calls["mid_block.resnets.0.conv1"]
    assert case == "Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) of 1x32x4x4"
    packed = {*room.LADDER} - {"w6a6"}  # which has no packed form
    assert all(set(made) == {*packed, FLOAT} for made in times.cases.values())
    assert all(value > 0 for made in times.cases.values() for value in made.values())
    assert times.predict({}) == times.total > 0
    assert next(pipe.unet.parameters()).dtype.itemsize == 4  # the model is left as it was


def test_guided_models_are_measured_with_both_passes(dit):
    times = measure_latency(dit, {"w8a8": room.LADDER["w8a8"]}, "fp32", rounds=1)
    (case,) = times.calls["transformer_blocks.0.attn1.to_q"]
    assert case.endswith("of 2x16x32")


def test_times_are_saved_and_broken_tables_are_refused(times, tmp_path):
    times.save(tmp_path / "times.json")
    assert Latency.load(tmp_path / "times.json") == times
    data = json.loads((tmp_path / "times.json").read_text())
    for change in ({"total": "x"}, {"cases": {}}, {"cases": 3}, {"calls": {"a": {"b": "c"}}}, {"more": 1}, {"environment": None}):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(HalfbyteError, match=r"bad\.json is no table of times \(.*\); remove it to measure again"):
            Latency.load(tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Latency.load(tmp_path / "nowhere.json")


def test_times_of_something_else_are_not_used(times, tmp_path):
    file = tmp_path / "times.json"
    assert known_latency(file, room.LADDER, "bf16") is None
    times.save(file)
    assert known_latency(file, room.LADDER, "bf16") == times
    assert known_latency(file, room.LADDER, "fp32") is None
    assert known_latency(file, {"w8a8": room.LADDER["w8a8"]}, "bf16") is None
    times.environment["threads"] = "512"
    times.save(file)
    assert known_latency(file, room.LADDER, "bf16") is None


def test_an_unknown_dtype_is_refused(pipe):
    assert isinstance(pipe, DDIMPipeline)
    with pytest.raises(ModelError, match="dtype of a step must be one of 'bf16', 'fp32', got 'int3'"):
        measure_latency(pipe, room.LADDER, "int3")
