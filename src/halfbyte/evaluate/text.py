"""How well images show what their prompts say: CLIP score and ImageReward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError

CLIP = "openai/clip-vit-base-patch16"


class ClipScore:
    """100 times the cosine of image and prompt in CLIP's space, not below 0 (Hessel et al. 2021); transformers' networks.

    Args:
        model: a folder, or a name on the Hub.
    Raises:
        MissingExtraError: without transformers. HalfbyteError: when there is no such model.
    """

    def __init__(self, model: str = CLIP) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise MissingExtraError("the CLIP score needs transformers: pip install transformers") from error
        try:
            self.model: Any = CLIPModel.from_pretrained(model).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise HalfbyteError(f"{model} is not a CLIP model: {str(error).splitlines()[0]}") from error
        self.name = f"CLIP ({model})"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images uint8 (N, 3, H, W) and their N prompts -> float32 (N,)."""
        inputs = self.processor(text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True)
        out = self.model(**inputs)
        picture, text = (side / side.norm(dim=-1, keepdim=True) for side in (out.image_embeds, out.text_embeds))
        found: Tensor = (100 * (picture * text).sum(-1)).clamp(min=0)
        return found.float()


class ImageReward:
    """ImageReward (Xu et al. 2023), by its own package.

    Raises:
        MissingExtraError: without it.
    """

    def __init__(self, model: str = "ImageReward-v1.0") -> None:
        try:
            import ImageReward as package  # noqa: N813
        except ImportError as error:
            raise MissingExtraError("ImageReward is not installed: pip install image-reward") from error
        self.model: Any = package.load(model)
        self.name = model

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images uint8 (N, 3, H, W) and their N prompts -> float32 (N,)."""
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return torch.tensor([float(self.model.score(prompt, one)) for prompt, one in zip(prompts, pictures, strict=True)])
