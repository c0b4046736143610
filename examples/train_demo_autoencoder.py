"""Train a small autoencoder for latent diffusion: 32x32 grey images to 4 channels of 8x8 and back.

    python examples/train_demo_autoencoder.py --data fashion-mnist-train.parquet --output runs/autoencoder

Data is a parquet file in the Hub's image layout. The folder then holds a diffusers AutoencoderKL whose `scaling_factor` gives its
latents unit variance, and `reconstructions.png`: real images above what comes back. `train_demo.py --autoencoder` goes on from it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from train_demo import SIDE, check_gradients, compile_blocks, load_images

KL_WEIGHT = 1e-3  # of the divergence from a normal distribution, a latent value: keeps the latents near zero, hardly blurs
CHECKED_STEP = 20  # where every parameter must have a gradient


def build_autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train(model: AutoencoderKL, images: Tensor, options: argparse.Namespace) -> None:
    """AdamW on the absolute error and a little of the divergence, one rise and fall of the learning rate, bf16 autocast."""
    draw, size = torch.Generator().manual_seed(options.seed), options.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1)
    if not options.no_compile:
        compile_blocks(model)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=options.steps)
        for step in range(options.steps):
            batch = to_float(images[torch.randint(len(images), (size,), generator=draw)])
            with torch.autocast(images.device.type, torch.bfloat16):
                found = model.encode(batch).latent_dist
                back = model.decode(found.mean + found.std * torch.randn(found.mean.shape, generator=draw).to(batch.device)).sample
            error = F.l1_loss(back.float(), batch)
            loss = error + KL_WEIGHT * found.kl().float().mean() / found.mean[0].numel()
            loss.backward()
            if step == CHECKED_STEP:
                check_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.update(task, advance=1, description=f"step {step + 1}" + (f"  error {error.item():.4f}" if step % 50 == 0 else ""))


@torch.inference_mode()
def finish(model: AutoencoderKL, images: Tensor, folder: Path) -> float:
    """Measure the latents, write the model and a picture; returns the peak signal-to-noise ratio in dB of 500 images."""
    shown = to_float(images[:: max(1, len(images) // 500)][:500])
    latents = model.encode(shown).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    back = model.float().decode(latents).sample.clamp(-1, 1)
    pairs = torch.stack([shown[:16, 0], back[:16, 0]]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    Image.fromarray(((pairs + 1) * 127.5).round().byte().cpu().numpy()).save(folder / "reconstructions.png")
    return float(10 * torch.log10(4 / F.mse_loss(back, shown)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of grey images")
    parser.add_argument("--output", type=Path, required=True, help="folder for the autoencoder")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default 3000)")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="do not compile the model (no C++ compiler at hand)")
    options = parser.parse_args()
    images = load_images(options.data)
    if images.shape[1] != 1:
        raise SystemExit(f"{options.data} holds colour images; this small autoencoder is for grey ones.")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_autoencoder(1).to(device, memory_format=torch.channels_last)
    train(model, images.to(device), options)
    print(f"reconstruction {finish(model.eval(), images.to(device), options.output):.1f} dB; wrote {options.output}")


if __name__ == "__main__":
    main()
