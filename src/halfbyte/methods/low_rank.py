"""SVDQuant's low-rank branch: the largest singular values of the weights go through in 16 bits, 4 bits hold what is left.

Source: Li et al., "SVDQuant: absorbing outliers by low-rank components for 4-bit diffusion models", arXiv 2411.05007, section 4.2.
A baseline: its branch runs in 16 bits beside the 4-bit product, so it is simulated here and not packed.
"""

import torch
from torch import Tensor


def low_rank_branch(matrix: Tensor, rank: int, exact: bool = False) -> Tensor:
    """The best approximation of a matrix by two factors of the given rank, each rounded to bfloat16, multiplied out.

    Args:
        matrix: float32 (O, K).
        exact: a whole singular value decomposition instead of a randomized one (Halko et al. 2011), which takes seconds where the
            other takes hours.
    Returns:
        float32 (O, K).
    """
    rank = min(rank, *matrix.shape)
    if exact:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, min(rank + 8, *matrix.shape), niter=4)
        left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    root = values.sqrt()
    up, down = (left * root).bfloat16().float(), (right * root).bfloat16().float()
    branch: Tensor = up @ down.T
    return branch
