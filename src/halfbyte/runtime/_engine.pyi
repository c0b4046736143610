from collections.abc import Sequence

from torch import Tensor

LONGEST_K: int

def grid_code(name: str) -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def parallel_runtime() -> str: ...
def integer_limit(seconds: float) -> float: ...
def packed_bytes(sizes: Sequence[int], grid: str, max_shift: int, subgroup: int) -> int: ...
def pack(
    sizes: Sequence[int],
    grid: str,
    max_shift: int,
    subgroup: int,
    codes: Tensor,
    shifts: Tensor | None,
    packed: Tensor,
    threads: int,
) -> None: ...
def unpack(packed: Tensor, codes: Tensor, shifts: Tensor | None) -> None: ...
def forward(
    x: Sequence[int],
    format: Sequence[int],
    fixed: Sequence[float] | None,
    packed: int,
    bytes: int,
    weight_scale: int,
    bias: tuple[int, int],
    y: Sequence[int],
    threads: int,
) -> None: ...
def search_scales(
    weights: Sequence[int], grid: str, max_shift: int, subgroup: int, factors: Tensor, scales: Tensor, threads: int
) -> None: ...
def round_weights(
    weights: Sequence[int],
    grid: str,
    max_shift: int,
    subgroup: int,
    scales: Tensor,
    codes: Tensor,
    shifts: Tensor | None,
    threads: int,
) -> tuple[float, float]: ...
