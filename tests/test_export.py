"""Exported models: ordinary diffusers models whose weights are those that the packed layers multiply with."""

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError
from halfbyte.export import export, unpack
from halfbyte.hub import is_packed


def test_a_folder_is_written_that_needs_no_halfbyte(build, call, tmp_path):
    from diffusers import UNet2DModel

    model = build("UNet2DModel")
    hb.quantize(model, "quartz-w4a8")
    weights = {name: (layer.levels() * layer.weight_scale).flatten().sort().values for name, layer in packed_layers(model).items()}
    hb.save(model, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "float", "fp32")
    assert "quantization_config" not in (tmp_path / "float" / "config.json").read_text()
    loaded = UNet2DModel.from_pretrained(str(tmp_path / "float"))
    assert not is_packed(loaded)
    assert all(torch.equal(loaded.get_submodule(name).weight.flatten().sort().values, one) for name, one in weights.items())
    with torch.no_grad():
        difference = loaded(**call("UNet2DModel")).sample - model(**call("UNet2DModel")).sample
    assert 0 < difference.norm() < 0.1 * model(**call("UNet2DModel")).sample.norm()  # the 8-bit inputs
    again = UNet2DModel.from_pretrained(str(export(tmp_path / "out", tmp_path / "half")))
    assert next(again.parameters()).dtype in (torch.bfloat16, torch.float32)


def test_what_would_be_lost_is_refused(build, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ModelError, match="nothing to export"):
        unpack(model)
    hb.quantize(model, "int4-w4a4")
    model[0].spec = model[0].spec.replace(weight=model[0].spec.weight.replace(sets=2))
    with pytest.raises(ModelError, match="2 sets of weights, chosen by timestep"):
        unpack(model)
    assert is_packed(model)
    with pytest.raises(ModelError, match="dtype must be one of bf16"):
        export(tmp_path, tmp_path / "out", "int4")
