"""Float checkpoints of any architecture, made of random heavy-tailed weights a tensor at a time; and what a process took."""

import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import checkpoint
from halfbyte.api import is_transformers
from halfbyte.streaming.shards import Shards
from halfbyte.streaming.source import bytes_of
from halfbyte.streaming.verb import weights_pattern

POOL = 1 << 22


def write_float(folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> int:
    """Write a folder in diffusers or transformers layout; never more than a tensor of it is in memory.

    Args:
        model: on the meta device; its config and the shapes of its tensors count.
    Returns:
        Bytes of the weight files.
    """
    named = {id(tensor): (key, tensor) for key, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    shapes = {key: torch.empty(tensor.shape, dtype=dtype, device="meta") for key, tensor in reversed(named.values())}
    shards = Shards(folder, shapes, weights_pattern(model), checkpoint.MAX_SHARD)
    shards.create()
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator)
    pool *= torch.randn(POOL, generator=generator).exp_()  # log-normal scales: heavy tails
    pool /= pool.std()
    for key, tensor in shapes.items():
        shards.write(key, 0, bytes_of(_values(key, tensor, pool, generator).to(dtype)))
    if is_transformers(model):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    shards.write_index({})
    return sum(shards.sizes.values())


def _values(key: str, tensor: Tensor, pool: Tensor, generator: torch.Generator) -> Tensor:
    """Norms of one, biases of zero, matrices at the usual size for their fan-in; random enough for time and sizes, and quick."""
    if tensor.ndim < 2:
        return torch.full(tensor.shape, 0.0 if key.endswith("bias") else 1.0)
    start = int(torch.randint(len(pool), (1,), generator=generator))
    repeated = pool.roll(start).repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()]
    return repeated.view(tensor.shape).mul_(float(tensor[0].numel() ** -0.5))


def peak_bytes() -> int:
    """The most memory that this program has held so far.

    Linux counts the peak of the parent at the time of the fork into `ru_maxrss`; `VmHWM` begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
