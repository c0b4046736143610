"""Memory of mapped files is given back, and nothing is lost by it."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.layers import FAKE_QUANT
from halfbyte.recipe import ActivationSpec, LayerSpec, WeightSpec
from halfbyte.runtime import engine
from halfbyte.runtime.mapped import give_back
from halfbyte.runtime.weights import pack_layer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is given back on Linux alone")
MEGA = 1 << 20


def in_files():
    """Resident bytes of this process that lie in mapped files."""
    return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def test_pages_of_files_leave_memory_and_can_be_read_again(tmp_path):
    save_file({"a": torch.randint(255, (48 * MEGA,), dtype=torch.uint8), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    total, before = loaded["a"].sum(), in_files()
    give_back(loaded["a"])
    assert before - in_files() > 40 * MEGA
    assert loaded["a"].sum() == total
    assert loaded["b"].tolist() == [1, 1, 1]


def test_other_memory_is_left_alone():
    for tensor in (torch.arange(1 << 20), torch.ones(0), torch.empty(5, device="meta")):
        before = tensor.clone()
        give_back(tensor)
        assert tensor.device.type == "meta" or torch.equal(tensor, before)


@pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}")
def test_a_layer_is_not_held_twice(tmp_path):
    spec = LayerSpec(WeightSpec("lzs4", 4, scale="absmax"), ActivationSpec("int8"))
    layer = pack_layer(FAKE_QUANT[nn.Linear].from_float(nn.Linear(8192, 8192, bias=False), spec))
    x = torch.randn(3, 8192)
    save_file({**layer.state_dict(), "other": torch.ones(3)}, tmp_path / "layer.safetensors")
    with torch.no_grad():
        expected = layer(x)
        loaded = load_file(tmp_path / "layer.safetensors")
        other, before = loaded.pop("other"), in_files()
        layer.load_state_dict(loaded, assign=True)
        del loaded
        assert torch.equal(layer(x), expected)
    assert in_files() - before < 8 * MEGA  # of 40
    assert other.tolist() == [1, 1, 1]
