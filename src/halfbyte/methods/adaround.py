"""AdaRound: whether each weight is rounded up or down is optimized, so that the layer's outputs, not its weights, change least.

A weight w lies between two neighbouring values of its grid, low and high. A number h in [0, 1] stands for the choice,

    q = low + h * (high - low)              h = clip(1.2 * sigmoid(alpha) - 0.1, 0, 1)

and alpha is trained by gradient descent, from the h at which q = w. The sigmoid is stretched beyond 0 and 1 and cut off, so that h
reaches both ends (a "rectified sigmoid"). The loss is the squared error of the layer's output, plus, after a warm-up,

    lambda * mean(1 - |2 h - 1| ** beta)    beta falls from 20 to 2

which is flat around h = 1/2 at first and pushes every h to 0 or 1 in the end. Then h >= 1/2 rounds up. Beyond the paper, weights
whose other neighbour would still lower the error are then turned, in every output channel the one that gains most, until there is
none (`turn`): a few thousandths of the work for 4 to 15 % of the error.

Over calibration inputs x with H = sum of x x^T, the error of one output channel is (w - q) H (w - q)^T: exactly, with the inputs
of all timesteps in it. So the loss needs no mini-batches; nothing is random, and a step costs one product with H. Output channels
do not depend on each other. Each has its error measured in units of what rounding to nearest costs it, and each goes on with the
better of the two: AdaRound is never worse than nearest on the inputs it has seen.

Scales (and multipliers) are fixed beforehand. Everything returned is a fixed point of `quantizers.quantize_weight`.

Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", arXiv 2004.10568, section 3.3; the schedule of
beta is that of Li et al., "BRECQ", arXiv 2102.05426.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.formats import get_grid
from halfbyte.methods.gptq import check_inputs
from halfbyte.quantizers import quantize_weight, spread
from halfbyte.recipe import Reconstruction, WeightSpec

STRETCH = 1.2  # of the sigmoid, zeta - gamma in the paper; half of what exceeds 1 lies below 0
FIRST_BETA, LAST_BETA = 20.0, 2.0
NEAR = 0.8  # where h starts for a choice that has been made already and may be revised
MINIMUM_GAIN = 1e-6  # of a row's error, for a weight to be turned: less is noise of the arithmetic


@dataclass
class Rounded:
    """Weights rounded by AdaRound."""

    matrix: Tensor  # float32 (O, K), all values representable
    error: float  # of the output on the calibration inputs, over that of rounding to nearest; at most 1
    kept_nearest: int  # output channels for which nothing better than nearest was found

    def describe(self) -> str:
        """For the layer table."""
        kept = f", {self.kept_nearest} of {len(self.matrix)} channels at nearest" if self.kept_nearest else ""
        return f"AdaRound leaves {self.error:.2f} of nearest's output error{kept}"


@dataclass
class AdaRounding:
    """AdaRound of the layers of a model: settings, what each may take of a budget of time, and what became of each.

    Args:
        work: multiplications a step of each layer takes, by name.
        exact: where not None, filled with the weights before rounding, float32 (O, K), by name.
    """

    settings: Reconstruction
    work: Mapping[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    exact: dict[str, Tensor] | None = None

    def round(self, matrix: Tensor, hessian: Tensor, spec: WeightSpec, scale: Tensor, name: str) -> Tensor:
        """The rounded weights (O, K) of a layer whose groups have a Hessian each, float (groups, K, K)."""
        seconds = self.settings.seconds
        if seconds is not None:
            seconds *= self.work[name] / sum(self.work.values()) / len(hessian)
        parts = [
            adaround(part, own, spec, scaling, self.settings, seconds, name)
            for part, own, scaling in zip(matrix.chunk(len(hessian)), hessian, scale.chunk(len(hessian)), strict=True)
        ]
        self.notes[name] = parts[0].describe() if len(parts) == 1 else f"AdaRound of {len(parts)} groups of channels"
        if self.exact is not None:
            self.exact[name] = matrix.detach().float().clone()
        return torch.cat([part.matrix for part in parts])


class SoftRounding:
    """The weights of one layer between their two neighbours; `alpha`, float32 (O, K), is what an optimizer trains.

    Args:
        matrix: float32 (O, K). scale: float32 (O, 1) or groups.
        start: float32 (O, K), a rounding to start near; None: at the weights themselves.
    """

    def __init__(self, matrix: Tensor, scale: Tensor, spec: WeightSpec, start: Tensor | None = None) -> None:
        with torch.no_grad():
            self.low, self.high = neighbours(matrix, scale, spec)
            share = ((matrix - self.low) / (self.high - self.low)).clamp(0, 1)
            if start is not None:
                share = torch.where(start - self.low > self.high - start, NEAR, 1 - NEAR)
            self.alpha = torch.logit((share - 0.5) / STRETCH + 0.5)
        self.alpha.requires_grad_()

    def share(self) -> Tensor:
        """h: how far each weight is on its way from low to high, 0 to 1."""
        return ((self.alpha.sigmoid() - 0.5) * STRETCH + 0.5).clamp(0, 1)

    def soft(self, share: Tensor) -> Tensor:
        """q: the weights, somewhere between their neighbours."""
        return self.low + share * (self.high - self.low)

    def hard(self) -> Tensor:
        """The weights, each at one of its neighbours."""
        return torch.where(self.alpha.detach() >= 0, self.high, self.low)


def neighbours(matrix: Tensor, scale: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """The representable values on both sides of every weight; the outermost two where it lies beyond them.

    Multipliers are those of rounding to nearest, so a subgroup keeps its step.

    Returns:
        float32 (O, K), float32 (O, K): low < high.
    """
    nearest = quantize_weight(matrix, scale, spec)
    scales, own = spread(scale, matrix.shape[1], spec.group), torch.ones((), device=matrix.device)
    if nearest.multiplier is not None:
        own = spread(nearest.multiplier.float(), matrix.shape[1], spec.subgroup)
    levels = torch.tensor(sorted(set(get_grid(spec.grid).levels)), device=matrix.device)
    above = torch.bucketize((matrix / scales / own).contiguous(), levels, right=True).clamp(1, len(levels) - 1)
    return levels[above - 1] * own * scales, levels[above] * own * scales


def regularizer(share: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2 h - 1| ** beta: 0 where every h is 0 or 1."""
    return (1 - (2 * share - 1).abs().pow(beta)).mean()


def beta_at(done: float, warmup: float) -> float | None:
    """The exponent of the regularizer when a part of the run is done (0 to 1); None during the warm-up."""
    if done < warmup:
        return None
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - done) / (1 - warmup)


def passes(iterations: int, seconds: float | None = None) -> Iterator[float]:
    """The part of a run that is done, 0 to below 1, before each iteration; ends after the iterations, or the seconds."""
    started = time.perf_counter()
    for step in range(iterations):
        done = step / iterations
        if seconds is not None:
            done = max(done, (time.perf_counter() - started) / seconds)
        if done >= 1:
            return
        yield done


def adaround(
    matrix: Tensor,
    hessian: Tensor,
    spec: WeightSpec,
    scale: Tensor,
    settings: Reconstruction | None = None,
    seconds: float | None = None,
    name: str = "this layer",
) -> Rounded:
    """Weights rounded up or down so that the layer's outputs change least.

    Args:
        matrix: float (O, K). A convolution with groups is one matrix a group, each with a Hessian of its own.
        hessian: float (K, K), sum of x x^T over calibration rows.
        scale: float32 (O, 1), or (O, ceil(K / group)) where the spec has group scales.
        seconds: this layer's part of a budget; the result then depends on the machine.
        name: the layer, for messages.
    Raises:
        NonFiniteError: when the matrix, the Hessian or a scale holds a NaN or an infinity.
        CalibrationError: when shapes disagree.
    """
    check_inputs(matrix, hessian, spec, scale, name)
    settings = settings or Reconstruction()
    exact, products = matrix.detach().float(), (hessian / hessian.diagonal().mean().clamp(min=1e-30)).float()
    nearest = quantize_weight(exact, scale, spec).dequantize()
    worst = _row_errors(nearest - exact, products)[:, None]
    weights = torch.where(worst > 0, 1 / worst, 0) / len(exact)
    with torch.enable_grad():
        soft = SoftRounding(exact, scale, spec)
        optimizer = torch.optim.Adam([soft.alpha], settings.learning_rate)
        for done in passes(settings.iterations, seconds):
            share, beta = soft.share(), beta_at(done, settings.warmup)
            rounded = soft.soft(share)
            # the gradient of sum(error H error^T) is 2 error H: one product, and none through autograd
            slope = 2 * weights * ((rounded.detach() - exact) @ products)
            loss = (rounded * slope).sum()
            if beta is not None:
                loss = loss + settings.regularizer * regularizer(share, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hard = soft.hard()
    hard = torch.where(_row_errors(hard - exact, products)[:, None] < worst, hard, nearest)
    hard = turn(exact, hard, torch.where(hard == soft.low, soft.high, soft.low), products)
    found = _row_errors(hard - exact, products)[:, None]
    total = float(found.sum() / worst.sum().clamp(min=1e-30)) if worst.any() else 1.0
    return Rounded(hard, total, int((found >= worst).sum()))


def turn(exact: Tensor, chosen: Tensor, other: Tensor, products: Tensor) -> Tensor:
    """Take the other value for the weight of each row that lowers the row's error most, until no single one does.

    Args:
        exact, chosen, other: float32 (O, K). products: H, float32 (K, K).
    Returns:
        float32 (O, K), each value from `chosen` or `other`.
    """
    chosen, other, products = chosen.clone(), other.clone(), products.double()
    energy, rows = products.diagonal(), torch.arange(len(chosen), device=chosen.device)
    slope = (chosen - exact).double() @ products
    least = MINIMUM_GAIN * ((chosen - exact) * slope).sum(1)
    for _ in range(chosen.shape[1]):
        move = (other - chosen).double()
        change, column = (2 * move * slope + move.square() * energy).min(1)
        turned = change < -least
        if not turned.any():
            break
        rows_now, columns_now = rows[turned], column[turned]
        slope[turned] += move[rows_now, columns_now, None] * products[columns_now]
        was = chosen[rows_now, columns_now]
        chosen[rows_now, columns_now] = other[rows_now, columns_now]
        other[rows_now, columns_now] = was
    return chosen


def _row_errors(error: Tensor, products: Tensor) -> Tensor:
    """e H e^T of every row of e (O, K): float64 (O,)."""
    error = error.double()
    return ((error @ products.double()) * error).sum(1)
