"""Tables of ablations on a tiny model in the demo's place: runs are kept, none is made twice, a rival gets the same time."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest

from halfbyte import demo
from halfbyte.bench import ablation
from halfbyte.bench.ablation import Effort, Row, run_table, table
from halfbyte.errors import HalfbyteError

BENCH = Path(__file__).parents[2] / "bench"
EFFORT = Effort(steps=2, batch=2, images=2, sampler_steps=2, calibrate=1)
ROWS = {
    "not healed": Row("int4-w4a4", published="6.95"),
    "quest": Row("int4-w4a4", {"method": "quest", "share": 0.3}),
    "lora, same time": Row("int4-w4a4", {"method": "lora", "dfa": "off"}, as_long_as="quest"),
}


@pytest.fixture
def tiny(pipe, monkeypatch):
    """The tiny pipeline in place of the demo's; distances are the mean of the images."""

    def load():
        made = copy.copy(pipe)
        made.register_modules(unet=copy.deepcopy(pipe.unet))
        return made

    monkeypatch.setattr(demo, "load_pipeline", load)
    monkeypatch.setattr(ablation, "frechet_to_real", lambda images: float(images.mean()))


def test_rows_are_run_with_every_seed_and_kept(tiny, tmp_path, monkeypatch):
    file = tmp_path / "runs.json"
    found = run_table(ROWS, [0, 1], EFFORT, file)
    assert list(found) == ["float", *ROWS]
    assert all(set(found[name]) == {"0", "1"} for name in ROWS)
    assert found["not healed"]["0"].keys() == {"frechet", "sqnr", "psnr"}
    healed = found["quest"]["1"]
    assert healed["steps"] == 2
    assert 0 < healed["share"] <= 30
    assert healed["training"] < healed["seconds"]
    assert healed["sqnr"] != found["not healed"]["1"]["sqnr"]
    assert json.loads(file.read_text())["runs"] == found

    def refuse(*arguments):
        raise AssertionError("a kept run is made again")

    monkeypatch.setattr(ablation, "run_row", refuse)
    assert run_table(ROWS, [0, 1], EFFORT, file) == found
    with pytest.raises(HalfbyteError, match=r"holds runs with .*; give another -o"):
        run_table(ROWS, [0], Effort(steps=3), file)


def test_a_rival_gets_the_same_time(tiny, monkeypatch):
    given = {}

    def run(row, seed, effort, states, reference, seconds=None):
        given[row.as_long_as] = seconds
        return {"training": 7.5}

    monkeypatch.setattr(ablation, "run_row", run)
    run_table(ROWS, [3], EFFORT)
    assert given == {"": None, "quest": 7.5}


def test_the_table_has_means_and_spreads():
    runs = {"0": {"frechet": 1.0, "steps": 10.0}, "1": {"frechet": 2.0, "steps": 20.0}}
    made = table("title", ROWS, {"float": {"0": {"frechet": 0.5}}, "not healed": runs})
    cells = {column.header: list(column.cells) for column in made.columns}
    assert cells["Frechet"] == ["0.50", "1.50 ± 0.71"]
    assert cells["steps"] == ["", "15 ± 7"]
    assert cells["PSNR dB"] == ["", ""]
    assert cells["published"] == ["", "6.95"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["healing", "quest"])
def test_the_benches_run(name, tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "not healed" in text
    assert ("peak memory of a step" in text) == (name == "quest")


def test_the_parts_of_a_recipe_cover_the_model(tiny):
    part = runpy.run_path(str(BENCH / "quest.py"))["part"]
    from halfbyte.conversion import decide_by, quantizable_layers

    unet = demo.load_pipeline().unet
    layers = quantizable_layers(unet)
    chosen = []
    for temporal in (True, False):
        decide = decide_by(unet, part("quest-w4a8", temporal))
        chosen.append({name for name, layer in layers.items() if decide(name, layer)[0] is not None})
    assert chosen[0] == {name for name in layers if "time_emb" in name}
    assert chosen[1] == {*layers} - chosen[0]
