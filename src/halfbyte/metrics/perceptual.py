"""Distances of pairs of images in the activations of a network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.metrics.sqnr import check_shapes


def perceptual_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """LPIPS without its learned weights (Zhang et al. 2018, equation 1 with all w = 1): for networks that have none.

    Every pixel's channels are scaled to length 1; squared differences are summed over channels, averaged over pixels and summed
    over layers.

    Args:
        maps, others: activations of some layers, float (N, C, H, W) each, of two sets of images.
    Returns:
        float32 (N,); 0 where the activations are equal.
    Raises:
        HalfbyteError: when shapes differ or there is no layer.
    """
    if not maps or len(maps) != len(others):
        raise HalfbyteError(f"activations of {len(maps)} and {len(others)} layers; both sides need the same, at least one")
    total = torch.zeros(len(maps[0]))
    for left, right in zip(maps, others, strict=True):
        check_shapes(left, right)
        difference = _unit(left.float()) - _unit(right.float())
        total = total + difference.square().sum(1).mean((1, 2)).cpu()
    return total


def _unit(activations: Tensor) -> Tensor:
    return activations / (activations.square().sum(1, keepdim=True).sqrt() + 1e-10)


class Lpips:
    """LPIPS as published (Zhang et al. 2018): torchmetrics', with the pretrained network of torchvision.

    Args:
        network: alex, vgg or squeeze.
    Raises:
        MissingExtraError: without torchmetrics, torchvision or the network's weights.
    """

    def __init__(self, network: str = "alex") -> None:
        if network not in ("alex", "vgg", "squeeze"):
            raise HalfbyteError(f"LPIPS knows the networks 'alex', 'vgg' and 'squeeze', got {network!r}")
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric = LearnedPerceptualImagePatchSimilarity(net_type=network)
        except (ImportError, OSError) as error:
            raise MissingExtraError(
                f"LPIPS needs torchmetrics, torchvision and the {network!r} weights, downloaded once into torch's hub cache: "
                f"pip install 'halfbyte[eval]' torchvision ({error})"
            ) from error
        self.network: Any = metric.net  # the metric itself gives means over a batch only
        self.name = f"LPIPS ({network})"

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Images float (N, C, H, W) in [0, 1], C 1 or 3 -> float32 (N,)."""
        check_shapes(images, others)
        grey = images.shape[1] == 1
        left, right = (side.expand(-1, 3, -1, -1) if grey else side for side in (images, others))
        found: Tensor = self.network(left.float(), right.float(), normalize=True)
        return found.flatten().float().cpu()
