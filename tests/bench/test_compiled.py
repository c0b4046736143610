"""The GPU kernels compile for real cards, which need not be at hand: they fit, do not spill, and multiply by int8 instructions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.runtime import gpu

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (extra 'triton')")

COUNT = """
import json, sys
import torch
from halfbyte.bench import compiled
from halfbyte.recipe import ActivationSpec, WeightSpec
from halfbyte.runtime import launches

grid = launches.InputGrid(*compiled._input(ActivationSpec("int8")))
packed, images = compiled._packed(WeightSpec("lzs4", 4), 640, 640), compiled._packed(WeightSpec("lzs4", 4), 320, 9 * 320)
seen = {"linear": set(), "convolution": set()}
for step in range(50):
    with compiled._compiling_for(compiled.TARGETS["sm_90"], False) as found:
        launches.linear(compiled._tensor(65 + 83 * step, 640), packed, grid)
    seen["linear"] |= {id(one) for one, _ in found}
for height in range(16, 66):
    with compiled._compiling_for(compiled.TARGETS["sm_90"], False) as found:
        sizes = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, height, height + 3)
        launches.conv2d(compiled._tensor(1, height, height + 3, 320), sizes, images, grid)
    seen["convolution"] |= {id(one) for one, _ in found}
print(json.dumps({name: len(kernels) for name, kernels in seen.items()}))
"""


def compiling(tmp_path_factory):
    """The environment of a process that compiles: the test run's own may interpret."""
    folder = str(tmp_path_factory.getbasetemp().parent / "triton")
    kept = {name: value for name, value in os.environ.items() if name != gpu.INTERPRET}
    return {**kept, "TRITON_CACHE_DIR": folder}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"])
def test_kernels_fit_every_kind_of_card(target, tmp_path, tmp_path_factory):
    file = tmp_path / "kernels.json"
    command = [sys.executable, SCRIPT, "--compile-only", target, "--json", file]
    done = subprocess.run(command, env=compiling(tmp_path_factory), capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr
    kernels = json.loads(file.read_text())["kernels"]
    assert {one["name"] for one in kernels} >= {
        "range_kernel",
        "quantize_kernel",
        "decode_kernel",
        "product_kernel",
        "few_rows_kernel",
    }
    assert not [(one["name"], one["tiles"], one["grids"], one["fault"]) for one in kernels if one["fault"]]
    assert done.returncode == 0, done.stderr
    if target == "sm_90":
        assert {one["matrix"] for one in kernels if one["name"] == "product_kernel"} <= {
            "IGMMA.64x64x32.S8.S8",
            "IGMMA.64x128x32.S8.S8",
        }


@pytest.mark.slow
def test_sizes_of_the_input_do_not_compile_new_kernels(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=compiling(tmp_path_factory), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["linear"] <= 2 + 4  # quantize and decode, and the product in at most four tilings
    assert counts["convolution"] <= 2 + 3 + 4  # range and quantize in at most two forms


def test_what_cannot_be_compiled_is_said(monkeypatch):
    from halfbyte.bench import compiled

    with pytest.raises(HalfbyteError, match="there is no target 'sm_10'; there are 'gfx942', 'sm_120', 'sm_80'"):
        compiled.compile_kernels("sm_10")
    monkeypatch.setenv(gpu.INTERPRET, "1")
    with pytest.raises(HalfbyteError, match="TRITON_INTERPRET=1 interprets kernels; unset it"):
        compiled.compile_kernels("sm_90")


def test_faults_are_named():
    from halfbyte.bench.compiled import Kernel

    fine = {"name": "product_kernel", "target": "sm_90", "tiles": "", "grids": "", "registers": 10, "spilled": 0, "shared": 10}
    fine |= {"limit": 10, "matrix": "IGMMA", "instructions": 1}
    assert Kernel(**fine).fault == ""
    assert "needs 11 bytes of shared memory, sm_90 has 10" in Kernel(**{**fine, "shared": 11}).fault
    assert "without int8 matrix instructions" in Kernel(**{**fine, "matrix": ""}).fault
    assert "spills 8 bytes" in Kernel(**{**fine, "spilled": 8}).fault
    assert Kernel(**{**fine, "name": "decode_kernel", "matrix": ""}).fault == ""
