"""Benchmarks run, account for every contestant, and say what is wrong with what was asked."""

import json

import pytest
import torch

from halfbyte.bench import layers, models, pipelines, timing
from halfbyte.bench.run import run, table
from halfbyte.cli import app
from halfbyte.conversion import memory_bytes, packed_layers
from halfbyte.errors import ModelError


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_are_timed_beside_their_rivals(kind):
    rows = run([kind], smoke=True)
    found = {row["contestant"] for row in rows}
    assert found >= {*layers.SPECS, "torch fp32", "torch bf16"}
    assert all(row["seconds"] > 0 and row["tops"] > 0 for row in rows)
    assert all((row["weight_bytes_of_bf16"] is None) == (row["contestant"] not in layers.SPECS) for row in rows)
    assert all(row["contestant"] not in row["ratio_to"] for row in rows)
    assert table(rows).row_count == len(rows)


def test_a_whole_model_is_timed_beside_its_float_twins():
    rows = run(["pipeline"], smoke=True)
    assert [row["contestant"] for row in rows] == ["quartz-w4a8", "quartz-w4a4", "quartz-w4a8+attention", *pipelines.FLOATS]
    assert all(row["weight_bytes_of_bf16"] < 0.3 for row in rows[:3])


def test_the_contestants_take_turns():
    turns = []
    seconds = timing.medians({name: lambda name=name: turns.append(name) for name in "ab"}, timing.Effort(rounds=3, least=0.0))
    assert set(seconds) == {"a", "b"}
    assert turns[-6:] == ["a", "b"] * 3


def test_a_contestant_that_took_its_time_has_one_turn_and_one_call_before():
    turns = []
    timing.medians({name: lambda name=name: turns.append(name) for name in "ab"}, timing.Effort(rounds=3, most=0.0))
    assert turns == ["a", "b", "a", "b"]


@pytest.mark.parametrize("name", models.SUBJECTS)
def test_every_model_can_be_built_and_called(name):
    """On the meta device: shapes only."""
    subject = models.SUBJECTS[name]
    with torch.device("meta"):
        model = subject.build().bfloat16()

    def meta(value):
        if isinstance(value, dict):
            return {key: meta(entry) for key, entry in value.items()}
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    arguments = subject.arguments(torch.bfloat16)
    assert model(**meta(arguments))[0].shape[0] == len(next(iter(arguments.values())))
    assert packed_layers(model) == {}
    assert memory_bytes(model) == (0, 0)


MISTAKES = {"kind": (["all"], []), "model": (["pipeline"], ["sd3"])}


@pytest.mark.parametrize(("kinds", "names"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_not_there_is_refused(kinds, names):
    with pytest.raises(ModelError, match="there is no benchmark"):
        run(kinds, names, smoke=True)


def test_the_command_writes_its_figures(tmp_path):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["bench", "linear", "--smoke", "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "Times as fast as torch bf16" in (tmp_path / "out.html").read_text()
    written = json.loads((tmp_path / "out.json").read_text())
    assert {row["contestant"] for row in written["rows"]} >= set(layers.SPECS)
    assert "backend" in written["environment"]
    listed = CliRunner().invoke(app, ["bench", "--list"])
    assert all(name in listed.output for name in models.SUBJECTS)
