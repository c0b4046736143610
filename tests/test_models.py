"""The trained models that come with the repository: they load, and draw what they are asked for."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

from halfbyte.demo.extractor import DemoExtractor

MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-dit", "fashion-dit-wide"])
def test_the_transformers_draw_the_class_they_are_told(name):
    pipe = DiTPipeline.from_pretrained(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    labels = [index % 10 for index in range(60)]
    draw = torch.Generator().manual_seed(0)
    images = pipe(labels, guidance_scale=2.0, num_inference_steps=10, output_type="np", generator=draw).images
    found = DemoExtractor().extract(torch.from_numpy(images).movedim(-1, 1)).logits.argmax(1)
    assert (found == torch.tensor(labels)).float().mean() > 0.85
