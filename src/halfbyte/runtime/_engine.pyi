from collections.abc import Sequence

from torch import Tensor

LONGEST_K: int

def grid_code(name: str) -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def parallel_runtime() -> str: ...
def integer_limit(seconds: float) -> float: ...
def packed_bytes(sizes: Sequence[int], form: Sequence[int]) -> int: ...
def pack(
    sizes: Sequence[int],
    form: Sequence[int],
    codes: Tensor,
    multipliers: Tensor | None,
    packed: Tensor,
    threads: int,
) -> None: ...
def unpack(packed: Tensor, codes: Tensor, multipliers: Tensor | None) -> None: ...
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
    norm: Sequence[int] | None = None,
    epsilon: float = 0.0,
) -> None: ...
def attend(
    images: int,
    heads: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    values: tuple[int, ...],
    factor: float,
    bias: tuple[int, ...],
    output: tuple[int, ...],
    threads: int,
) -> None: ...
def expect_writes(data: int, size: int) -> None: ...
def gelu(x: int, dtype: int, count: int, y: int, threads: int) -> None: ...
def geglu(x: int, dtype: int, rows: int, width: int, y: int, threads: int) -> None: ...
def group_norm(
    dtype: int, extent: tuple[int, int, int, int], epsilon: float, silu: bool, places: Sequence[int], threads: int
) -> None: ...
def search_scales(weights: Sequence[int], form: Sequence[int], factors: Tensor, scales: Tensor, threads: int) -> None: ...
def round_weights(
    weights: Sequence[int],
    form: Sequence[int],
    scales: Tensor,
    codes: Tensor,
    multipliers: Tensor | None,
    threads: int,
) -> tuple[float, float]: ...
