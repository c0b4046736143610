"""A small evaluation for tests that kill it or start several: tiny_eval.py FOLDER [serve].

FOLDER holds model, quantized and photos. With `serve`, each line "NAME" on stdin starts an evaluation in a forked process, which
writes FOLDER/NAME.json; its number is printed. A line "wait" waits for the last one and prints how it ended.
"""

import os
import sys
from pathlib import Path

import torch
from diffusers import DDIMPipeline  # noqa: F401  imported before the forks

import halfbyte  # noqa: F401
from halfbyte.evaluate.sampling import Sampling
from halfbyte.evidence.command import EvalOptions, evaluate_folder


def evaluate(folder: Path, name: str) -> None:
    sampling = Sampling(images=30, steps=2, seed=1, batch=3)
    options = EvalOptions(sampling, str(folder / "network.pt"), trust_code=True, reference=folder / "photos")
    evaluate_folder(folder / "quantized", folder / "model", folder / f"{name}.json", options)


def serve(folder: Path) -> None:
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            print(os.waitpid(number, 0)[1], flush=True)
            continue
        number = os.fork()
        if number == 0:
            evaluate(folder, line.strip())
            os._exit(0)
        print(number, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    serve(place) if sys.argv[2:] == ["serve"] else evaluate(place, sys.argv[2])
