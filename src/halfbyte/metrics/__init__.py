"""How near the 4-bit model stays to its float original: of pairs of images from the same noise, and of whole sets.

    sqnr(noise_float, noise_4bit)                    dB over all values
    psnr(images, images_4bit)                        dB, one value an image; both from the same noise
    ssim(images, images_4bit)                        1 where equal, one value an image
    perceptual_distance(maps, maps_4bit)             0 where equal, one value an image
    a = FeatureStatistics.empty(width)
    a.update(extractor.extract(images).pooled)       any number of times
    frechet_distance(a, b)                           0 where mean and covariance agree
    kernel_distance(x, y)                            0 on average where two sets come from one distribution; may be negative
    precision_recall(generated, real)                shares of images inside the other set's neighbourhoods
    inception_score(logits)                          1 to the number of classes

In what features two sets are compared is a parameter (`extractors.py`); figures in different features never compare.
`intervals.py` puts confidence intervals on all of them.
"""

from halfbyte.metrics.frechet import FeatureStatistics, frechet_distance
from halfbyte.metrics.images import psnr, ssim
from halfbyte.metrics.intervals import Estimate, spread
from halfbyte.metrics.perceptual import Lpips, perceptual_distance
from halfbyte.metrics.sets import inception_score, kernel_distance, precision_recall
from halfbyte.metrics.sqnr import SignalToNoise, sqnr

__all__ = [
    "Estimate",
    "FeatureStatistics",
    "Lpips",
    "SignalToNoise",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "perceptual_distance",
    "precision_recall",
    "psnr",
    "spread",
    "sqnr",
    "ssim",
]
