"""Quantize a FLUX-shaped checkpoint of random, heavy-tailed weights tensor by tensor: time, memory, sizes.

    python bench/streaming.py --blocks 19 38       FLUX.1 itself: 12 billion parameters, 24 GB on disk, plus 7 GB of output
    python bench/streaming.py --smoke              a tiny one

The checkpoint is written into --folder and removed afterwards; --keep has the packed one stay. Quantizing runs in a process of its
own, whose peak memory is told.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from halfbyte.bench.checkpoints import peak_bytes, write_float
from halfbyte.streaming.verb import quantize_folder


def write_checkpoint(folder: Path, blocks: tuple[int, int], width: int) -> int:
    """A bf16 checkpoint; returns its bytes."""
    heads = {"num_attention_heads": width // 128, "num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**heads, guidance_embeds=True)
    return write_float(folder, model)


def quantize(folder: Path, output: Path, recipe: str) -> None:
    """What the process of its own does; prints a JSON line."""
    start, processor = time.perf_counter(), time.process_time()
    job = quantize_folder(folder, output, recipe)
    seconds = time.perf_counter() - start
    weights = sum(part.values for plan in job.plans.values() for part in plan.parts if part.layer is not None)
    figures = {"seconds": seconds, "processor": time.process_time() - processor, "weights": weights, "peak": peak_bytes()}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--recipe", default="quartz-w4a8")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder when not given")
    parser.add_argument("--keep", type=Path, default=None, metavar="FOLDER", help="where the packed one goes; must not exist")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        quantize(*options.only, options.recipe)
        return
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        blocks, width = ((1, 1), 256) if options.smoke else (tuple(options.blocks), 3072)
        size = write_checkpoint(work / "float", blocks, width)
        command = [sys.executable, __file__, "--recipe", options.recipe, "--only", str(work / "float"), str(work / "out")]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        made = sum(file.stat().st_size for file in (work / "out").iterdir())
        if options.keep:
            shutil.move(work / "out", options.keep)
        seconds, processor, weights = found["seconds"], found["processor"], found["weights"]
        print(f"{blocks[0]} + {blocks[1]} blocks, {weights / 1e9:.2f} billion weights")
        print(f"{size / 1e9:.2f} GB in, {made / 1e9:.3f} GB out")
        print(f"{seconds:.0f} s ({size / seconds / 1e9:.3f} GB/s); peak memory {found['peak'] / 1e9:.2f} GB")
        print(f"{processor:.0f} s of processor time ({processor / weights * 1e9:.0f} ns a weight)")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
