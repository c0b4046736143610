"""Scores of images and prompts: CLIP against torchmetrics on a tiny CLIP, ImageReward through a stand-in of its package."""

import json
import sys
import types

import pytest
import torch

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.evaluate.text import ClipScore, ImageReward

IMAGES = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
PROMPTS = ("a b", "b", "a a b")


@pytest.fixture
def tiny_clip(tmp_path):
    """A folder with a random CLIP that knows the letters a and b."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    folder, words = tmp_path / "clip", ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    size = {"height": 8, "width": 8}
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    CLIPModel(config).save_pretrained(folder)
    return folder


class Adapted(torch.nn.Module):
    """A CLIP of transformers 5 as torchmetrics expects it: its features as tensors."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *values, **inputs):
        return getattr(found := self.model.get_image_features(*values, **inputs), "pooler_output", found)

    def get_text_features(self, *values, **inputs):
        return getattr(found := self.model.get_text_features(*values, **inputs), "pooler_output", found)


@pytest.mark.filterwarnings("ignore")  # transformers' and torchmetrics' own
def test_the_clip_score_is_torchmetrics(tiny_clip):
    from torchmetrics.functional.multimodal import clip_score

    score = ClipScore(str(tiny_clip))
    found = score(IMAGES, PROMPTS)
    assert found.shape == (3,)
    for index, prompt in enumerate(PROMPTS):
        expected = clip_score(IMAGES[index], prompt, model_name_or_path=lambda: (Adapted(score.model), score.processor))
        assert found[index].item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_clip_that_is_not_there(tmp_path):
    with pytest.raises(HalfbyteError, match="is not a CLIP model"):
        ClipScore(str(tmp_path))


def test_without_the_packages_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MissingExtraError, match="pip install image-reward"):
        ImageReward()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="pip install transformers"):
        ClipScore()


def test_image_reward_scores_every_image_by_its_prompt(monkeypatch):
    package = types.ModuleType("ImageReward")
    package.load = lambda name: types.SimpleNamespace(score=lambda prompt, image: len(prompt) + image.getpixel((0, 0))[0] / 255)
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    found = ImageReward()(IMAGES, PROMPTS)
    expected = [len(prompt) + image[0, 0, 0].item() / 255 for prompt, image in zip(PROMPTS, IMAGES, strict=True)]
    assert found.tolist() == pytest.approx(expected)
