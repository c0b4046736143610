"""Layers and a pair of FLUX blocks on a GPU: packed 4-bit against cuBLAS, cuDNN, int8 and fp8 products, torchao where installed.

python bench/gpu.py                        # a few minutes on a GPU; needs neither diffusers nor the C++ engine
python bench/gpu.py --smoke                # does it run; without a GPU in Triton's interpreter
python bench/gpu.py --json out.json
python bench/gpu.py --compile-only sm_90   # what the compiler makes of the kernels for a card; needs none (--every: minutes)
"""

import argparse
import os
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="tiny shapes, one call each")
parser.add_argument(
    "--compile-only", metavar="TARGET", nargs="+", help="sm_80, sm_89, sm_90, sm_120 or gfx942: compile, run nothing"
)
parser.add_argument("--every", action="store_true", help="with --compile-only: all tilings of all grids")
parser.add_argument("--json", type=Path, help="also write the rows here")
options = parser.parse_args()
if options.smoke and not Path("/dev/nvidiactl").exists():  # before anything imports triton
    os.environ.update(TRITON_INTERPRET="1", HALFBYTE_BACKEND="triton")

import json  # noqa: E402
from dataclasses import asdict  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from halfbyte.bench import gpu as bench  # noqa: E402
from halfbyte.bench.run import table  # noqa: E402
from halfbyte.bench.timing import SMOKE, Effort  # noqa: E402
from halfbyte.checkpoint import write_file  # noqa: E402
from halfbyte.errors import HalfbyteError  # noqa: E402
from halfbyte.runtime import gpu  # noqa: E402

console = Console(width=None if Console().is_terminal else 200)


def compile_only() -> dict[str, Any]:
    from halfbyte.bench import compiled

    found, made = [], Table("target", "kernel", "tiles", "registers", "spilled", "shared", "of", "matrix", "grids", "")
    for name in options.compile_only:
        found += compiled.compile_kernels(name, options.every, lambda title, name=name: console.print(f"{name} {title}"))
    for one in found:
        numbers = map(str, (one.registers, one.spilled, one.shared, one.limit))
        made.add_row(one.target, one.name, one.tiles, *numbers, one.matrix, one.grids, one.fault)
    console.print(made)
    return {"kernels": [{**asdict(one), "fault": one.fault} for one in found]}


def measure() -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = gpu.missing() or ("" if device == "cuda" or options.smoke else "there is no GPU; --smoke runs without one")
    if reason:
        print(f"nothing was measured: {reason}")
        raise SystemExit(0 if options.smoke else 1)
    effort = SMOKE if options.smoke else Effort()
    rows = bench.run(device, options.smoke, effort, lambda title, done, total: console.print(f"{done}/{total} {title}"))
    found, made = bench.bars(rows), Table("case", "contestant", "what", "value", "bar", "")
    for bar in found:
        numbers = f"{bar['value']:.3f}", f"{bar['bar']:.2f}"
        made.add_row(bar["case"], bar["contestant"], bar["what"], *numbers, "reached" if bar["reached"] else "missed")
    console.print(table(rows), made)
    card = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    return {"card": card, "torch": torch.__version__, "rows": rows, "bars": found}


try:
    results = compile_only() if options.compile_only else measure()
except HalfbyteError as error:
    raise SystemExit(str(error)) from None
if options.json:
    write_file(options.json, json.dumps(results, indent=1).encode())
if any(one["fault"] for one in results.get("kernels", ())):
    raise SystemExit(1)
