"""Families of layers quantized one at a time: which layers belong where, for a UNet and a transformer, and what is written."""

import copy
import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import demo
from halfbyte.bench.families import INT4, families_json, families_table, family_in, measure_families
from halfbyte.calibration import find_denoiser
from halfbyte.conversion import edges_of, quantizable_layers
from halfbyte.evaluate import float_states
from halfbyte.report.bars import write_bars
from halfbyte.sensitivity import damage_of

BENCH = Path(__file__).parents[2] / "bench"
NAMED = ("feed-forward", "attention", "convolution", "time embedding", "skip", "others")
UNET = {"convolution", "attention", "time embedding", "skip", "others"}
DIT = {"feed-forward", "attention", "time embedding", "others"}


def families_of(pipe):
    model = find_denoiser(pipe)
    return {name: family_in(edges_of(model)[0], name, layer) for name, layer in quantizable_layers(model).items()}


def test_every_layer_has_a_family(pipe, dit):
    unet, transformer = families_of(pipe), families_of(dit)
    assert set(unet.values()) == UNET < {*NAMED}
    assert unet["up_blocks.0.resnets.0.conv1"] == unet["up_blocks.0.resnets.0.conv_shortcut"] == "skip"
    assert unet["down_blocks.0.resnets.0.conv1"] == unet["down_blocks.0.downsamplers.0.conv"] == "convolution"
    assert unet["mid_block.attentions.0.to_q"] == unet["mid_block.attentions.0.to_out.0"] == "attention"
    assert unet["conv_in"] == "others"
    assert set(transformer.values()) == DIT
    assert transformer["transformer_blocks.0.ff.net.0.proj"] == transformer["transformer_blocks.1.ff.net.2"] == "feed-forward"
    assert transformer["transformer_blocks.0.norm1.linear"] == "time embedding"


def test_a_family_does_the_damage_of_its_layers_together(dit):
    found = measure_families(dit, images=2, steps=2)
    assert {one.family for one in found} == DIT
    assert sum(one.layers for one in found) == len(quantizable_layers(dit.transformer))
    assert [one.total("INT4") for one in found] == sorted((one.total("INT4") for one in found), reverse=True)
    one = next(one for one in found if one.family == "feed-forward")
    layers = {name: layer for name, layer in quantizable_layers(dit.transformer).items() if ".ff." in name}
    with torch.no_grad():
        assert damage_of(dit.transformer, float_states(dit, 2, 2, 0, 2), layers, INT4) == pytest.approx(one.damage["INT4"])
    assert one.layers == len(layers) == 4
    assert one.weights == sum(layer.weight.numel() for layer in layers.values())
    shares = one.normalized("INT4")
    assert shares["together"] == one.total("INT4") == pytest.approx(4 * shares["a layer"])
    assert shares["a million parameters"] == pytest.approx(1e6 * one.total("INT4") / one.weights)
    assert one.total("INT4 weights") < one.total("INT4")
    assert families_table("a title", found).row_count == len(found)
    assert json.loads(json.dumps(families_json({"dit": found}, {"steps": 2})))["models"]["dit"][0]["normalized"]["INT4"]["together"]


def test_bars_are_as_long_as_their_numbers(tmp_path):
    write_bars({"Together": {"<unet>": {"one": 1.0, "two": 4.0}, "dit": {}}}, tmp_path / "page.html", "Title", "Lead.", "damage")
    page = (tmp_path / "page.html").read_text()
    assert page.index("two") < page.index("--width: 100.0%") < page.index("one</th>") < page.index("--width: 25.0%")
    assert "&lt;unet&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_the_bench_runs_on_models_given_by_path(pipe, dit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_pipeline", lambda: pipe)
    dit.save_pretrained(tmp_path / "dit")
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["sensitivity", "demo", str(tmp_path / "dit"), "--table", "families", "--smoke", "-o", str(out)]
    )
    runpy.run_path(str(BENCH / "sensitivity.py"), run_name="__main__")
    assert "feed-forward" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["models"]) == {"demo", str(tmp_path / "dit")}
    assert out.with_suffix(".html").read_text().count("<caption>") == 6


@pytest.mark.slow
def test_the_bench_of_budgets_runs(pipe, tmp_path, monkeypatch, capsys):
    def load():
        made = copy.copy(pipe)
        made.register_modules(unet=copy.deepcopy(pipe.unet))
        return made

    monkeypatch.setattr(demo, "load_pipeline", load)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["sensitivity", "--table", "budgets", "--smoke", "-o", str(out)])
    runpy.run_path(str(BENCH / "sensitivity.py"), run_name="__main__")
    assert "measured ms" in " ".join(capsys.readouterr().out.split())
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows if row["measured"] is None] == ["INT4, groups of 64", "NVFP4", "6 bits, e2m3"]
    for uniform, spent in itertools.pairwise(rows):
        if spent["name"].startswith("  budget"):
            assert spent["bits"] <= uniform["bits"] + 1e-6
            assert spent["input_bits"] <= uniform["input_bits"] + 1e-6
    assert rows[-1]["name"] == "float"
    assert all(row["predicted"] <= rows[-1]["predicted"] * 1.0001 for row in rows if "of the float model" in row["name"])
