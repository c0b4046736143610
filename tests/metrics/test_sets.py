"""Kernel distance, precision, recall and inception score against slow oracles and against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError
from halfbyte.metrics import inception_score, kernel_distance, precision_recall, sets
from halfbyte.metrics.sets import kernel_resamples


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel_by_loops(x: np.ndarray, y: np.ndarray, paired: bool = False) -> float:
    """The unbiased estimate, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray, itself: bool) -> float:
        values = [(p @ q / len(p) + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (itself and i == j)]
        return float(np.mean(values))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, paired)


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("paired", [False, True])
def test_the_kernel_distance_is_the_formula(monkeypatch, block, paired):
    monkeypatch.setattr(sets, "BLOCK", block)
    x, y = draw(11, 5), 0.2 + draw(11 if paired else 8, 5, seed=1)
    expected = kernel_by_loops(x.double().numpy(), y.double().numpy(), paired)
    assert kernel_distance(x, y, paired) == pytest.approx(expected, rel=1e-10)


BUFFER = "ignore:Metric `.*` will save all extracted features"  # torchmetrics' advice, which a test need not take


@pytest.mark.filterwarnings(BUFFER)
def test_the_kernel_distance_is_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = draw(40, 8), 0.3 + draw(40, 8, seed=1)
    network = nn.Identity()
    network.num_features = 8
    metric = KernelInceptionDistance(network, subsets=1, subset_size=40)  # one subset of all images: the order does not matter
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kernel_distance(x, y) == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_the_kernel_distance_is_unbiased():
    values = [kernel_distance(draw(20, 4, seed=seed), draw(20, 4, seed=1000 + seed)) for seed in range(200)]
    mean, error = np.mean(values), np.std(values) / math.sqrt(200)
    assert abs(mean) < 3 * error
    paired = [kernel_distance(x, x + 0.01 * draw(20, 4, seed=1), paired=True) for x in (draw(20, 4, seed=s) for s in range(50))]
    assert abs(np.mean(paired)) < 0.01 * abs(np.mean([kernel_distance(x, x) for x in (draw(20, 4, seed=s) for s in range(50))]))


def test_resamples_are_the_sets_they_stand_for():
    """Drawn twice is not a near neighbour: pairs of one image with itself are left out."""
    x, y = draw(9, 4), 0.5 + draw(7, 4, seed=1)
    chosen_x, chosen_y = torch.tensor([0, 0, 3, 4, 5, 5, 5, 7, 8]), torch.tensor([1, 1, 2, 3, 4, 6, 6])
    counts = [torch.bincount(chosen, minlength=size)[:, None] for chosen, size in ((chosen_x, 9), (chosen_y, 7))]

    def mean(a, i, b, j, itself):
        pairs = [(m, n) for m in i.tolist() for n in j.tolist() if not (itself and m == n)]
        return np.mean([((a[m] @ b[n] / 4 + 1) ** 3).item() for m, n in pairs])

    x, y = x.double(), y.double()
    within = mean(x, chosen_x, x, chosen_x, True) + mean(y, chosen_y, y, chosen_y, True)
    expected = within - 2 * mean(x, chosen_x, y, chosen_y, False)
    assert kernel_resamples(x, y, *counts).item() == pytest.approx(expected, rel=1e-10)


def covered_by_loops(points: np.ndarray, centres: np.ndarray) -> list[bool]:
    radii = [sorted(np.linalg.norm(centres - one, axis=1))[3] for one in centres]
    return [any(np.linalg.norm(point - one) <= radius for one, radius in zip(centres, radii, strict=True)) for point in points]


@pytest.mark.parametrize("block", [4, 1024])
def test_precision_and_recall_are_the_definition(monkeypatch, block):
    monkeypatch.setattr(sets, "BLOCK", block)
    generated, real = 0.8 * draw(25, 3), draw(30, 3, seed=1)
    inside, covered = precision_recall(generated, real)
    assert inside.tolist() == covered_by_loops(generated.double().numpy(), real.double().numpy())
    assert covered.tolist() == covered_by_loops(real.double().numpy(), generated.double().numpy())
    assert 0 < covered.double().mean() < inside.double().mean() <= 1


def test_far_sets_have_no_precision_and_equal_ones_all():
    x = draw(10, 3)
    assert not any(flags.any() for flags in precision_recall(x, x + 100))
    assert all(flags.all() for flags in precision_recall(x, x))


@pytest.mark.filterwarnings(BUFFER, r"ignore:std\(\)")  # of its single part
def test_the_inception_score_is_torchmetrics_and_the_formula():
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * draw(60, 10)
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-5)
    p = torch.softmax(logits.double(), 1).numpy()
    assert inception_score(logits) == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-10)


def test_the_inception_score_at_its_ends(monkeypatch):
    assert inception_score(torch.zeros(5, 4)) == pytest.approx(1)
    assert inception_score(1e4 * torch.eye(4)) == pytest.approx(4)
    assert math.isnan(inception_score(torch.full((3, 2), math.nan)))
    monkeypatch.setattr(sets, "SPLIT", 2)
    assert inception_score(1e4 * torch.eye(2).repeat_interleave(2, 0)) == pytest.approx(1)  # two parts, each of one class


def test_what_does_not_fit_is_refused():
    cases = {
        r"features are \(5, 3\) and \(5, 4\); both sets need \(N, d\)": lambda: kernel_distance(draw(5, 3), draw(5, 4)),
        "sets of 1 and 5 images; at least 2": lambda: kernel_distance(draw(1, 3), draw(5, 3)),
        "sets of 3 and 5 images; at least 4": lambda: precision_recall(draw(3, 3), draw(5, 3)),
        "4 and 5 images cannot come from the same noise": lambda: kernel_distance(draw(4, 3), draw(5, 3), paired=True),
        r"logits are \(0, 4\)": lambda: inception_score(draw(0, 4)),
    }
    for sentence, call in cases.items():
        with pytest.raises(HalfbyteError, match=sentence):
            call()
