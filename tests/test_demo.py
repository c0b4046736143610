"""The embedded model: what is shipped, and that what its classifier sees."""

from pathlib import Path

import pytest
import torch

from halfbyte import demo
from halfbyte.demo import features
from halfbyte.demo.extractor import DemoExtractor, reference
from halfbyte.errors import EvaluationError


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


def test_the_classifier_knows_what_its_statistics_say():
    sums = features.load_statistics()
    assert sums["features_sum"].shape == (64,)
    assert int(sums["count"]) == 60_000
    mean = sums["features_sum"] / sums["count"]
    found = features.DemoFeatures.load().features(torch.zeros(1, 1, 32, 32))
    assert found.shape == (1, 64)
    assert (mean > 0).any()


def test_the_extractor_sees_what_the_classifier_sees():
    images, network, found = torch.rand(3, 1, 32, 32), features.DemoFeatures.load(), DemoExtractor()
    seen = found.extract(images)
    torch.testing.assert_close(seen.pooled, network.features(images))
    torch.testing.assert_close(seen.logits, network(images))
    assert [tuple(one.shape[1:]) for one in seen.maps] == [(16, 32, 32), (64, 16, 16), (96, 8, 8), (96, 8, 8), (64, 8, 8)]
    assert len(found.digest) == 64
    assert reference().count == 60_000
    with pytest.raises(EvaluationError, match="grey 32x32 images, got 3x32x32"):
        found.extract(torch.rand(1, 3, 32, 32))
