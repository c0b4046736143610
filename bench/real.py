"""Models of real shape with random, heavy-tailed weights: what quantizing, loading and a step take, beside the bars they have.

    python bench/real.py t5        T5-XXL: 9.5 GB written, quantized, loaded
    python bench/real.py sd15      Stable Diffusion 1.5: UNet, CLIP and autoencoder; quantized, saved, loaded, sampled twice
    python bench/real.py flux      FLUX.1: 24 GB written, quantized, loaded; a step at 512x512 and at 1024x1024
    python bench/real.py --smoke   all three, tiny
    python bench/real.py flux --folder DIR --json out.json     what was written into DIR is kept, and not made again

Each measurement runs in a process of its own, whose peak memory is told. Take figures on an idle machine.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import halfbyte as hb
from halfbyte.bench.checkpoints import peak_bytes, write_float
from halfbyte.checkpoint import write_file
from halfbyte.demo import environment
from halfbyte.streaming.verb import quantize_folder

RECIPE = "quartz-w4a8"
BARS = {  # (case, figure) -> at most; seconds or bytes
    ("t5", "peak of loading"): 2.9e9,
    ("sd15", "quantize"): 60.0,
    ("sd15", "load"): 5.0,
    ("flux", "peak of a step at 1024"): 9e9,
}
PRODUCT = re.compile(r"halfbyte::(linear|conv2d)$|aten::(add|b|badd)?mm$|scaled_dot_product|convolution$")
Figures = dict[str, float | bool]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


def build_t5(smoke: bool) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256}
    large = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **(sizes if smoke else large)))


def build_flux(smoke: bool) -> Any:
    from diffusers import FluxTransformer2DModel

    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    return FluxTransformer2DModel(guidance_embeds=True, **(small if smoke else {}))


def write_sd15(folder: Path, smoke: bool) -> None:
    """A whole pipeline folder; its tokenizer knows three words."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with tempfile.TemporaryDirectory() as words:
        vocabulary, merges = Path(words) / "vocab.json", Path(words) / "merges.txt"
        vocabulary.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
        merges.write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
    width, channels = (64, (32, 64)) if smoke else (768, (128, 256, 512, 512))
    depth, heads = (2, 4) if smoke else (12, 12)
    text = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads)
    levels = len(channels)
    coder = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    unet = {"block_out_channels": (32, 32, 64, 64)} if smoke else {}
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(sample_size=8 if smoke else 64, cross_attention_dim=width, attention_head_dim=8, **unet),
            "text_encoder": CLIPTextModel(text),
            "vae": AutoencoderKL(**coder),
        }
    for name, part in parts.items():
        write_float(folder / name, part)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    index = {name: ["transformers" if name == "text_encoder" else "diffusers", type(part).__name__] for name, part in parts.items()}
    index |= {"tokenizer": ["transformers", type(tokenizer).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    entries = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **index}
    (folder / "model_index.json").write_text(json.dumps(entries))  # last: it says that the folder is whole


def write_component(build: Callable[[bool], Any]) -> Callable[[Path, bool], None]:
    def write(folder: Path, smoke: bool) -> None:
        with torch.device("meta"):
            model = build(smoke)
        write_float(folder, model)

    return write


def quantize(work: Path, _: bool) -> Figures:
    shutil.rmtree(work / ".packed.partial", ignore_errors=True)  # of a run that was stopped: going on would tell half of the time
    seconds, job = timed(lambda: quantize_folder(work / "float", work / "packed", RECIPE))
    return {
        "quantize": seconds,
        "peak of quantizing": peak_bytes(),
        "packed bytes": sum(p.output_bytes for p in job.plans.values()),
    }


@torch.inference_mode()
def load_t5(work: Path, _: bool) -> Figures:
    seconds, model = timed(lambda: hb.load(work / "packed", dtype=torch.bfloat16))
    found: Figures = {"load": seconds, "peak of loading": peak_bytes()}
    tokens = torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    model(tokens)  # the first call puts the codes in the engine's order
    found["encode 512 tokens"], states = timed(lambda: model(tokens).last_hidden_state)
    return found | {"peak of encoding": peak_bytes(), "finite": bool(states.isfinite().all())}


def quantize_sd15(work: Path, _: bool) -> Figures:
    from halfbyte.api import load_float

    seconds, pipe = timed(lambda: load_float(work / "float"))
    found: Figures = {"load the float pipeline": seconds}
    found["quantize"], _result = timed(lambda: hb.quantize(pipe, RECIPE))
    found["save"], _path = timed(lambda: hb.save(pipe, work / "packed"))
    return found | {"peak of quantizing": peak_bytes()}


def sample_sd15(work: Path, smoke: bool) -> Figures:
    seconds, pipe = timed(lambda: hb.load(work / "packed", dtype=torch.bfloat16))
    found: Figures = {"load": seconds, "peak of loading": peak_bytes()}
    pipe.set_progress_bar_config(disable=True)

    def sample() -> Any:
        generator, size = torch.Generator().manual_seed(0), 64 if smoke else 512
        return pipe("a a", num_inference_steps=1, generator=generator, output_type="np", height=size, width=size).images

    first, image = timed(sample)
    second, again = timed(sample)
    found |= {"first image of one step": first, "image of one step": second, "peak of sampling": peak_bytes()}
    return found | {"twice the same bits": bool((image == again).all()), "finite": bool(torch.from_numpy(image).isfinite().all())}


@torch.inference_mode()
def step_flux(work: Path, smoke: bool) -> Figures:
    seconds, model = timed(lambda: hb.load(work / "packed", dtype=torch.bfloat16))
    found: Figures = {"load": seconds, "peak of loading": peak_bytes()}
    arguments = flux_arguments(16 if smoke else 1024, 8 if smoke else 512)
    found["first step at 512"], _output = timed(lambda: model(**arguments))  # with the codes put in the engine's order
    for size, tokens in ((512, 1024), (1024, 4096)):
        arguments = flux_arguments(tokens // 64 if smoke else tokens, 8 if smoke else 512)
        found[f"a step at {size}"], output = timed(lambda arguments=arguments: model(**arguments).sample)
        found[f"peak of a step at {size}"] = peak_bytes()
        found[f"share outside products at {size}"] = share_outside(lambda arguments=arguments: model(**arguments))
        found[f"finite at {size}"] = bool(output.isfinite().all())
    return found


def flux_arguments(tokens: int, words: int) -> dict[str, Any]:
    """Of one call, an image."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (1, tokens, 64), "encoder_hidden_states": (1, words, 4096), "pooled_projections": (1, 768)}
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    places = {"img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(words, 3)}
    return {**made, **places, "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}


def share_outside(run: Callable[[], Any]) -> float:
    """The part of a call that is spent neither in linear layers nor in attention's products; the profiler slows all a little."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        seconds, _ = timed(run)
    inside = sum(event.self_cpu_time_total for event in recorded.key_averages() if PRODUCT.search(event.key))
    return 1 - inside / 1e6 / seconds


CASES: dict[str, tuple[Callable[[Path, bool], None], dict[str, Callable[[Path, bool], Figures]]]] = {
    "t5": (write_component(build_t5), {"quantize": quantize, "load": load_t5}),
    "sd15": (write_sd15, {"quantize": quantize_sd15, "sample": sample_sd15}),
    "flux": (write_component(build_flux), {"quantize": quantize, "step": step_flux}),
}


def measure(case: str, work: Path, smoke: bool) -> list[dict[str, Any]]:
    """Rows of a case: a figure each. Weights that are there already are taken as they are, and quantizing is skipped then."""
    _, measurements = CASES[case]
    packed = (work / "packed").exists()
    if not packed and not (work / "float").exists():
        subprocess.run([sys.executable, __file__, case, "--only", "write", "--folder", str(work), *["--smoke"] * smoke], check=True)
    rows = []
    for name in measurements:
        if name == "quantize" and packed:
            continue
        command = [sys.executable, __file__, case, "--only", name, "--folder", str(work), *["--smoke"] * smoke]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case}: {name} ended with exit status {done.returncode}; what it said is above")
        found = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))  # libraries may print too
        for figure, value in json.loads(found).items():
            bar = None if smoke else BARS.get((case, figure))
            met = value if isinstance(value, bool) else None if bar is None else value <= bar
            rows.append({"case": case, "figure": figure, "value": value, "bar": bar, "met": met})
            print(f"{case:5} {figure:34} {shown(figure, value):>12}  {'' if bar is None else 'bar ' + shown(figure, bar)}")
    return rows


def shown(figure: str, value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if "peak" in figure or "bytes" in figure:
        return f"{value / 1e9:.2f} GB"
    return f"{value:.1%}" if "share" in figure else f"{value:.2f} s"


def only(case: str, name: str, work: Path, smoke: bool) -> None:
    """What the process of its own does: writes the float weights, or prints figures as a JSON line."""
    write, measurements = CASES[case]
    if name == "write":
        write(work / "writing", smoke)
        (work / "writing").rename(work / "float")
        return
    imports, _ = timed(import_libraries)
    print(json.dumps({f"imports before {name}": imports} | measurements[name](work, smoke)))


def import_libraries() -> None:
    """What the first load would import otherwise: seconds that no model takes."""
    import diffusers
    import transformers

    _ = diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline, diffusers.FluxTransformer2DModel
    _ = transformers.T5EncoderModel, transformers.CLIPTextModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, help="keep weights here, and take those that are there; else a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, all cases: does it run")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = options.cases or (list(CASES) if options.smoke else [])
    unknown = [case for case in chosen if case not in CASES]
    if unknown or not chosen:
        parser.error(f"name what to measure, of {', '.join(CASES)}; got {', '.join(unknown) or 'nothing'}")
    if options.only:
        only(chosen[0], options.only, options.folder, options.smoke)
        return
    rows = []
    for case in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.folder or Path(temporary)) / (case + "-smoke" * options.smoke)
            work.mkdir(parents=True, exist_ok=True)
            rows += measure(case, work, options.smoke)
    if options.json:
        write_file(options.json, json.dumps({"environment": environment(), "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
