"""The embedded model: what is shipped, and that the demo says of it what it must."""

import json
import re
from pathlib import Path

import pytest
import torch

from halfbyte import demo
from halfbyte.demo import features
from halfbyte.report import check_results
from halfbyte.report.page import render


@pytest.fixture(scope="module")
def outcome():
    stages = []
    settings = demo.Settings(images=8, steps=4, recipes=("int4-w4a4", "quartz-w4a4", "msfp-w4a4"))
    results, strips = demo.run(settings, lambda *stage: stages.append(stage))
    return settings, results, strips, stages


def test_the_shipped_model_is_small_and_described():
    files = [file for file in demo.MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png"}
    card = (demo.MODEL / "README.md").read_text()
    assert all(word in card for word in ("MIT", "Fashion-MNIST", "seed", "train_demo.py", "bf16"))
    assert (Path(features.__file__).parent / "features.safetensors").stat().st_size < 1e6


def test_the_shipped_model_has_what_quantization_finds_hard():
    unet = demo.load_pipeline().unet
    assert 3e6 <= sum(parameter.numel() for parameter in unet.parameters()) <= 6e6
    assert unet.config.act_fn == "silu"
    assert any("attentions" in name for name, _ in unet.named_modules())
    assert unet.up_blocks[0].resnets[0].conv1.in_channels > unet.down_blocks[-1].resnets[0].conv1.out_channels  # concatenated skips


def test_results_check_and_quartz_beats_int4(outcome):
    _, results, _, _ = outcome
    check_results(json.loads(json.dumps(results)))
    _, int4, quartz, msfp = results["runs"]
    assert quartz["sqnr"] >= int4["sqnr"] + 3
    assert quartz["psnr"]["mean"] >= int4["psnr"]["mean"] + 3
    assert quartz["bytes"] <= 0.30 * quartz["bytes_bf16"]
    assert quartz["layers"][0]["name"] == "conv_in"
    assert all(layer["output_sqnr"] > 5 for layer in quartz["layers"])
    assert msfp["sqnr"] >= int4["sqnr"] + 3
    assert all((layer["choice"] is None) == (layer["weight"] == "int8") for layer in msfp["layers"])


def test_grids_that_were_searched_have_a_table_of_their_own(outcome):
    page = render(outcome[1])
    assert page.count("Grids found by search") == 1
    table = page[page.index("Grids found by search") :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + sum(layer["choice"] is not None for layer in outcome[1]["runs"][3]["layers"])
    assert re.search(r"<td>ue2m2</td>\s*<td>unsigned</td>\s*<td class=.number.>−0\.28 to", table)
    assert re.search(r"<span>ue2m2 \d\.\d+e-\d+</span> <span>ue1m3 ×1\.", table)


def test_pictures_and_progress_cover_every_run(outcome):
    settings, _, strips, stages = outcome
    assert strips.shape == (4 * 8, 1, 32, 32)
    done = [count for _, count, _ in stages]
    assert done == sorted(done)
    assert done[-1] == settings.work == stages[-1][2]
    assert {stage for stage, *_ in stages} == {"sampling float", "sampling int4-w4a4", "sampling quartz-w4a4", "sampling msfp-w4a4"}


def test_the_classifier_knows_what_its_statistics_say():
    sums = features.load_statistics()
    assert sums["features_sum"].shape == (64,)
    assert int(sums["count"]) == 60_000
    mean = sums["features_sum"] / sums["count"]
    found = features.DemoFeatures.load().features(torch.zeros(1, 1, 32, 32))
    assert found.shape == (1, 64)
    assert (mean > 0).any()
