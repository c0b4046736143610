"""Layers and a pair of FLUX blocks on a GPU: packed 4-bit against cuBLAS, cuDNN, int8 and fp8 products, torchao where installed.

python bench/gpu.py                    # a few minutes on a GPU
python bench/gpu.py --smoke            # does it run; without a GPU in Triton's interpreter
python bench/gpu.py --json out.json
"""

import argparse
import os
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="tiny shapes, one call each")
parser.add_argument("--json", type=Path, help="also write the rows here")
options = parser.parse_args()
if options.smoke and not Path("/dev/nvidiactl").exists():  # before anything imports triton
    os.environ.update(TRITON_INTERPRET="1", HALFBYTE_BACKEND="triton")

import json  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from halfbyte.bench import gpu as bench  # noqa: E402
from halfbyte.bench.run import table  # noqa: E402
from halfbyte.bench.timing import SMOKE, Effort  # noqa: E402
from halfbyte.checkpoint import write_file  # noqa: E402
from halfbyte.runtime import gpu  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
reason = gpu.missing() or ("" if device == "cuda" or options.smoke else "there is no GPU; --smoke runs without one")
if reason:
    print(f"nothing was measured: {reason}")
    raise SystemExit(0 if options.smoke else 1)
console = Console()
rows = bench.run(
    device, options.smoke, SMOKE if options.smoke else Effort(), lambda title, done, total: console.print(f"{done}/{total} {title}")
)
console.print(table(rows))
if options.json:
    write_file(options.json, json.dumps(rows, indent=1).encode())
