"""The demo's feature extractor: a small Fashion-MNIST classifier whose 64 pooled activations feed a Frechet distance.

    features = DemoFeatures.load().features(images)    # images: float (n, 1, 32, 32) in [0, 1] -> float32 (n, 64)

Distances in these features compare pictures of the demo model with each other and with Fashion-MNIST. They are no FID: that name
belongs to Inception features, and the numbers cannot be put side by side. A distance from few images is biased upwards: compare
only distances over the same number of images.

Two files lie beside this module, both written by `examples/train_demo_features.py`:

    features.safetensors      the weights, float16
    statistics.safetensors    the features of the 60,000 training images, summed the way torchmetrics' FrechetInceptionDistance
                              keeps them, so that any of its sums can be set beside them:
        features_sum      float64 (64,)       sum of the features over all images
        features_cov_sum  float64 (64, 64)    sum of the outer products of each image's features with themselves
        count             int64 ()            number of images
                              metadata: dataset, and the extractor's file (extractor, extractor_sha256)

From these, mean = features_sum / count and covariance = (features_cov_sum - count * outer(mean, mean)) / (count - 1).
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SIDE = 32  # images are 28x28, padded with black on all sides


class ConvNorm(nn.Sequential):
    """3x3 convolution, batch norm, ReLU: (n, inputs, h, w) -> (n, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class DemoFeatures(nn.Module):
    """Five convolutions and a linear head, 204,000 parameters. `load` gives the trained one, in float32 and ready to use."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16)  # 32x32
        self.edges = ConvNorm(16, 64)  # 16x16
        self.shapes = ConvNorm(64, 96)  # 8x8, as the rest
        self.refine = ConvNorm(96, 96)
        self.pooled = ConvNorm(96, self.num_features)
        self.head = nn.Linear(self.num_features, len(CLASSES))

    @classmethod
    def load(cls) -> "DemoFeatures":
        """The trained extractor on the CPU, in evaluation mode, without gradients."""
        from safetensors.torch import load_file

        model = cls()
        model.load_state_dict(load_file(HERE / "features.safetensors"))  # float16 is copied into float32
        return model.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Mean of the last convolution's activations over the image.

        Args:
            images: float (n, 1, 32, 32) in [0, 1], where 0 is black.
        Returns:
            float32 (n, 64), never negative.
        """
        if images.shape[1:] != (1, SIDE, SIDE) or not images.is_floating_point():
            given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise ValueError(f"The images are {given}; they must be float (n, 1, {SIDE}, {SIDE}) with values in [0, 1].")
        x = F.max_pool2d(self.stem(images.to(self.head.weight.dtype)), 2)
        x = F.max_pool2d(self.edges(x), 2)
        x = self.shapes(x)
        x = x + self.refine(x)
        activations: Tensor = self.pooled(x)  # (n, 64, 8, 8)
        return activations.float().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of `CLASSES`, (n, 10), for images as in `features`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_statistics() -> dict[str, Tensor]:
    """The features of the real training images: `features_sum`, `features_cov_sum` and `count`, as in the module's docstring."""
    from safetensors.torch import load_file

    return load_file(HERE / "statistics.safetensors")
