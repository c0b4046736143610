"""docs/format.md against what is written: its golden bytes are produced, and read back."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import halfbyte as hb
from halfbyte.checkpoint import LAYOUT_KEYS
from halfbyte.layers import FAKE_QUANT
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime.weights import pack_layer

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
SPECS = {
    spec.describe(): spec
    for spec in (
        WeightSpec("int4", scale="absmax"),
        WeightSpec("e2m1", scale="absmax"),
        WeightSpec("lzs4", 4, scale="absmax"),
        WeightSpec("e2m1", scale="absmax", max_multiple=10),
    )
}
LINES = re.search(r"```golden\n(.*?)```", PAGE, re.DOTALL)[1].strip().splitlines()
GOLDEN = [re.fullmatch(r"(\S+)\s+(\[.*\])\s+([0-9a-f ]+?)(?: \| ([0-9a-f ]+))?", line.strip()).groups() for line in LINES]


def packed(layer, weight, spec):
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32).view_as(layer.weight))
    return pack_layer(FAKE_QUANT[type(layer)].from_float(layer, LayerSpec(spec, ActivationSpec("int8"))))


@pytest.mark.parametrize(("name", "weights", "codes", "multipliers"), GOLDEN, ids=[line[0] + line[2][:5] for line in GOLDEN])
def test_the_golden_bytes_of_the_page(name, weights, codes, multipliers):
    values = json.loads(weights)
    layer = packed(nn.Linear(len(values), 1, bias=False), values, SPECS[name])
    assert layer.weight_codes.numpy().tobytes().hex(" ") == codes
    assert layer.weight_scale.numpy().tobytes().hex(" ") == "00 00 80 3f"
    assert (layer.weight_multiplier.numpy().tobytes().hex(" ") if multipliers else None) == multipliers


def test_convolutions_are_stored_tap_by_tap():
    layer = packed(nn.Conv2d(2, 1, (1, 3), bias=False), [[1, 2, 3], [4, 5, 7]], SPECS["int4"])
    assert layer.weight_codes.numpy().tobytes().hex(" ") in PAGE
    assert layer.levels().tolist() == [[1, 4, 2, 5, 3, 7]]


def test_the_keys_and_tensors_of_a_saved_model_are_the_documented_ones(pipe, tmp_path):
    hb.quantize(pipe, "quartz-w4a4")
    hb.save(pipe, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["quantization_config"]
    documented = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))
    assert set(entry) <= documented
    assert documented == LAYOUT_KEYS
    tensors = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    for name in entry["layers"]:
        suffixes = {key.rpartition(".")[2] for key in tensors if key.startswith(name + ".")}
        assert suffixes <= set(re.findall(r"`NAME\.(\w+)`", PAGE))
