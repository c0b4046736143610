"""The demo's classifier as an extractor for evaluations, and the statistics of the images it was trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.checkpoint import sha256
from halfbyte.demo.features import HERE, SIDE, DemoFeatures, load_statistics
from halfbyte.errors import EvaluationError
from halfbyte.evaluate.extractors import Features
from halfbyte.evaluate.figures import Reference
from halfbyte.metrics import FeatureStatistics, frechet_distance

NAME = "DemoFeatures (64 features of a Fashion-MNIST classifier)"


class DemoExtractor:
    """Features, logits and activations of `DemoFeatures`, for images of the demo model."""

    name = NAME

    def __init__(self) -> None:
        self.network, self.digest = DemoFeatures.load(), sha256(HERE / "features.safetensors")

    @torch.inference_mode()
    def extract(self, images: Tensor) -> Features:
        """Images float (N, 1, 32, 32) in [0, 1]."""
        if images.shape[1:] != (1, SIDE, SIDE):
            size = "x".join(map(str, images.shape[1:]))
            raise EvaluationError(f"the demo's features are of grey {SIDE}x{SIDE} images, got {size}; give another extractor")
        network = self.network
        stem = network.stem(images.float())
        edges = network.edges(F.max_pool2d(stem, 2))
        shapes = network.shapes(F.max_pool2d(edges, 2))
        refined = shapes + network.refine(shapes)
        last = network.pooled(refined)
        pooled = last.mean((2, 3))
        return Features(pooled, logits=network.head(pooled), maps=[stem, edges, shapes, refined, last])


def reference() -> Reference:
    """The 60,000 training images of Fashion-MNIST, by their statistics."""
    sums = load_statistics()
    statistics = FeatureStatistics(sums["features_sum"], sums["features_cov_sum"], int(sums["count"]))
    return Reference("the training images of Fashion-MNIST", statistics.count, statistics)


def frechet_to_real(images: Tensor) -> float:
    """Frechet distance of images (N, 1, 32, 32) to the training images, on the demo's own features; not comparable with FID."""
    found = FeatureStatistics.empty(DemoFeatures.num_features)
    found.update(DemoExtractor().extract(images).pooled)
    return frechet_distance(found, reference().statistics)
