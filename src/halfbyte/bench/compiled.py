"""What the compilers make of the GPU engine's kernels, for cards that need not be at hand: registers, spills, shared memory,
matrix instructions.

The engine's own launches run on tensors without memory, and Triton compiles what it would launch, for a target of our choice; so
these are the kernels that a card of that kind gets, flag for flag. Needs Triton's compiler, not its interpreter.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from halfbyte.errors import HalfbyteError, listed
from halfbyte.formats import GRIDS
from halfbyte.recipe import ActivationSpec, WeightSpec
from halfbyte.runtime import gpu, launches
from halfbyte.runtime.tuning import Card, Tiles


@dataclass(frozen=True)
class Target:
    """A kind of card: how Triton calls it, what it has, and what its int8 matrix instructions are called."""

    target: GPUTarget
    card: Card
    matrix: str  # a regular expression


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Card(108, 163 << 10, False), r"IMMA\.16832\.S8\.S8"),  # A100
    "sm_89": Target(GPUTarget("cuda", 89, 32), Card(128, 99 << 10, False), r"IMMA\.16832\.S8\.S8"),  # L40S, RTX 4090
    "sm_90": Target(GPUTarget("cuda", 90, 32), Card(132, 227 << 10, True), r"IGMMA\.\w+\.S8\.S8|IMMA\.16832\.S8\.S8"),  # H100, H200
    "sm_120": Target(GPUTarget("cuda", 120, 32), Card(170, 99 << 10, True), r"IMMA\.16832\.S8\.S8"),  # RTX 5090
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Card(304, 64 << 10, False), r"v_mfma_i32_\w+_i8"),  # MI300
}
# Weights of which all tilings are compiled, with inputs of this kind: one grid that is decoded by words, one that is not.
FULLY = {"lzs4<<4/16": "signed", "e2m1": "unsigned"}
PRODUCTS = ("product_kernel", "few_rows_kernel")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    target: str
    tiles: str  # sizes of blocks, warps, stages
    grids: str  # what of the grids it was compiled for
    registers: int  # a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    limit: int  # of shared memory, of the card
    matrix: str  # the int8 matrix instructions found
    instructions: int

    @property
    def fault(self) -> str:
        """What is wrong with it; empty: nothing."""
        if self.shared > self.limit:
            return f"needs {self.shared} bytes of shared memory, {self.target} has {self.limit}"
        if self.name in PRODUCTS and not self.matrix:
            return "multiplies without int8 matrix instructions"
        return f"spills {self.spilled} bytes a thread" if self.spilled else ""


def specs() -> tuple[list[WeightSpec], list[ActivationSpec]]:
    """One of every packable grid, with and without its shifts; and some with multiples."""
    packable = [grid for grid in GRIDS.values() if not grid.simulated_only]
    shifts = {grid.name: sorted({0, grid.largest_shift}) for grid in packable}
    weights = [WeightSpec(grid.name, max_shift=shift) for grid in packable if grid.signed for shift in shifts[grid.name]]
    inputs = [ActivationSpec(grid.name, max_shift=s, zero_point=not grid.signed) for grid in packable for s in shifts[grid.name]]
    multiples = [("e2m1", 10), ("ue1m3", 16), ("lzs4", 16), ("ue2m2", 9)]
    weights += [WeightSpec(name, max_multiple=most) for name, most in multiples if not name.startswith("u")]
    multiplied = [ActivationSpec(name, max_multiple=most, zero_point=name.startswith("u")) for name, most in multiples]
    return weights, multiplied + inputs


def compile_kernels(name: str, every: bool = False, progress: Callable[[str], None] | None = None) -> list[Kernel]:
    """The kernels of all grids for one of TARGETS, in every tiling that may be chosen.

    Args:
        every: all tilings of all grids, which takes minutes; else all tilings of two grids, and the first one of the others.
    Raises:
        HalfbyteError: when the target is not known, or Triton was imported to interpret.
    """
    if name not in TARGETS:
        raise HalfbyteError(f"there is no target {name!r}; there are {listed(TARGETS)}")
    if gpu.interpreting():
        raise HalfbyteError(f"{gpu.INTERPRET}=1 interprets kernels; unset it to compile them")
    found: dict[int, Kernel] = {}
    for title, call, all_tiles in _calls(every):
        if progress:
            progress(title)
        with _compiling_for(TARGETS[name], all_tiles) as seen:
            call()
        found |= {id(one): _examined(one, name, options) for one, options in seen if id(one) not in found}
    return list(found.values())


def _calls(every: bool) -> Iterator[tuple[str, Callable[[], object], bool]]:
    """What is called: a title, the call, and whether with all tilings."""
    weights, inputs = specs()
    signed, unsigned = both = [launches.InputGrid(*_input(spec)) for spec in (ActivationSpec("int8"), inputs[-1])]
    for index, spec in enumerate(inputs):
        for images in (False, True) if every else (index % 2 == 0,):
            x = _tensor(2, 64, 64, 320) if images else _tensor(512, 1, 1, 3072)
            yield (
                f"quantize {spec.describe()}",
                partial(launches.quantize, x, launches.InputGrid(*_input(spec)), images=images),
                False,
            )
    for weight in weights:
        packed, title = _packed(weight, 3072, 3072), weight.describe()
        all_tiles = every or title in FULLY
        for rows in (16, 32, 64) if all_tiles else (16,):
            for grid in both if every else (unsigned if FULLY.get(title) == "unsigned" else signed,):
                yield f"few rows {title}", partial(launches.linear, _tensor(rows, 3072), packed, grid), all_tiles
        yield f"decode {title}", partial(launches.decode, packed, 3072, True, packed.even_first(3072)), False
    for grid in both:
        some = 4 if every or grid.signed else 1
        for rows, outputs in ((4096, 12288), (2048, 3072), (96, 1280))[:some]:
            yield "linear", partial(launches.linear, _tensor(rows, 3072), _packed(weights[0], outputs, 3072), grid), True
        for side, channels in ((128, 320), (64, 640), (16, 1280), (32, 20))[:some]:
            packed, sizes = _packed(weights[0], max(64, channels), 9 * channels), (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, side, side)
            yield "convolution", partial(launches.conv2d, _tensor(2, side, side, channels), sizes, packed, grid), True


def _input(spec: ActivationSpec) -> tuple[Any, ...]:
    numbers = gpu.input_numbers(spec)
    return (*numbers[:3], bool(numbers[3]), *numbers[4:7], bool(numbers[7]), *numbers[8:])


def _packed(spec: WeightSpec, outputs: int, count: int) -> launches.Weights:
    bits, table, subgroup, multiples = gpu.weight_numbers(spec)
    grid = launches.WeightGrid(bits, table, subgroup, bool(multiples))
    codes = _tensor(outputs, -(-count // 2) if grid.bits == 4 else count, dtype=torch.uint8)
    multipliers = _tensor(outputs, -(-count // grid.subgroup // 2), dtype=torch.uint8) if grid.subgroup else None
    return launches.Weights(codes, multipliers, _tensor(outputs, 1, dtype=torch.float32), _tensor(outputs), grid)


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Pretended:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, _: object) -> int:
        return 0


@contextmanager
def _compiling_for(target: Target, all_tiles: bool) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Launches compile for a target instead; gives the kernels and the options they were launched with."""
    seen: list[tuple[Any, dict[str, Any]]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        seen.append((launch(self, *args, **{**options, "warmup": True}), options))

    def run_all(_key: object, candidates: Sequence[Tiles], _device: object, run: Callable[[Tiles], None]) -> Tiles:
        for tiles in candidates if all_tiles else candidates[:1]:
            run(tiles)
        return candidates[0]

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(launches, "choose", run_all))
        stack.enter_context(patch.object(launches, "card", lambda _: target.card))
        stack.enter_context(patch.object(driver, "_active", _Pretended(target.target)))
        yield seen


def _examined(kernel: Any, target: str, options: dict[str, Any]) -> Kernel:
    read = _read_nvidia if TARGETS[target].target.backend == "cuda" else _read_amd
    registers, spilled, assembly = read(kernel)
    blocks = "x".join(str(options[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK") if key in options)
    grids = [
        f"{key.lower()}={options[key]}"
        for key in ("BITS", "TABLE", "SUBGROUP", "MULTIPLES", "SIGNED", "TOP", "MAX_SHIFT", "MAX_MULTIPLE", "IMAGES")
        if key in options
    ]
    return Kernel(
        kernel.metadata.name,
        target,
        f"{blocks} w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}",
        " ".join(grids),
        registers,
        spilled,
        kernel.metadata.shared,
        TARGETS[target].card.shared,
        " ".join(sorted(set(re.findall(TARGETS[target].matrix, assembly)))),
        len(re.findall(r";\s*(?:/\*|$)", assembly, re.MULTILINE)) or assembly.count("\n"),
    )


def _read_nvidia(kernel: Any) -> tuple[int, int, str]:
    """Registers and bytes of stack of a thread, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise HalfbyteError(f"cuobjdump -res-usage names no registers: {usage[:200]}")
    return int(found[1]), int(found[2]) + int(found[3]), code


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise HalfbyteError(f"this build of Triton has no {name}; there should be a {path}")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _read_amd(kernel: Any) -> tuple[int, int, str]:
    code = kernel.asm["amdgcn"]
    registers, scratch = (re.search(rf"\.{key}:\s+(\d+)", code) for key in ("vgpr_count", "private_segment_fixed_size"))
    if registers is None or scratch is None:
        raise HalfbyteError("the assembly for AMD names no registers")
    return int(registers[1]), int(scratch[1]), code
