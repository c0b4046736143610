"""Train the denoisers that halfbyte is tried on: the small DDPM UNet it ships, on a CPU in two hours or on a GPU in minutes.

    python examples/train_demo.py --data fashion-mnist-train.parquet --output runs/demo --minutes 110
    python examples/train_demo.py --data cifar10-train.parquet --output runs/cifar10-ddpm --learning-rate 2e-4 --steps 400000
    python examples/train_demo.py --data fashion-mnist-train.parquet --output runs/dit --autoencoder runs/autoencoder

Data is a parquet file in the Hub's image layout (a column `image` or `img` holding {bytes, path}). Grey images give the
embedded demo model (4 levels, width 32); colour images give the DDPM CIFAR-10 UNet of Ho et al. 2020 (width 128, multipliers
1 2 2 2, attention at 16x16, dropout 0.1). With an autoencoder (`train_demo_autoencoder.py`) it is a small DiT (Peebles and Xie
2022) on its latents, told the class (a column `label`) nine times in ten, for guidance. Batches are a pure function of (seed,
step, process), so a run that was stopped, by Ctrl-C, SIGTERM or a power cut, continues with the same command where its last
checkpoint was.
"""

import argparse
import io
import json
import math
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

SIDE = 32
CHECKED_STEP = 20  # by then no parameter may be without a gradient; a DiT's blocks start as the identity and have none at first
NO_CLASS = 1000  # the label that DiTPipeline gives where there is none, hence the size of the table of labels


def load_images(path: Path) -> Tensor:
    """Every image of a parquet file as uint8 (N, C, 32, 32); smaller ones are padded with black on all sides."""
    table = pq.read_table(path)
    column = next((name for name in ("image", "img") if name in table.column_names), None)
    if column is None:
        raise SystemExit(f"{path} has columns {table.column_names}; one of them must be 'image' or 'img'.")
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table[column].to_pylist()]
    pixels = torch.from_numpy(np.stack(images))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if (pixels == pixels[:, :1]).all():  # grey images are often stored as RGB
        pixels = pixels[:, :1]
    height, width = SIDE - pixels.shape[2], SIDE - pixels.shape[3]
    if height < 0 or width < 0:
        raise SystemExit(f"{path} holds images of {tuple(pixels.shape[2:])}; at most {SIDE}x{SIDE} is supported.")
    return F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2)).contiguous()


def load_labels(path: Path) -> Tensor:
    """The column `label` of a parquet file, int64 (N,)."""
    table = pq.read_table(path)
    if "label" not in table.column_names:
        raise SystemExit(f"{path} has columns {table.column_names}; one of them must be 'label'.")
    return torch.from_numpy(table["label"].to_numpy().copy())


@torch.inference_mode()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents of unit variance of uint8 images, float32 (N, 4, 8, 8): the means of their distributions."""
    parts = [autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(500)]
    return torch.cat(parts) * autoencoder.config.scaling_factor


def build_transformer(latents: Tensor, width: int, blocks: int, patch: int) -> DiTTransformer2DModel:
    """A DiT with a token for every patch of latent pixels; 3 million parameters at width 160, 5 blocks, patches of one pixel."""
    model = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        num_layers=blocks,
        sample_size=latents.shape[2],
        patch_size=patch,
        num_embeds_ada_norm=NO_CLASS,
    )
    for block in model.transformer_blocks:  # adaLN-Zero: every block starts as the identity
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # each block would drop the class for itself; batches do for all at once
    return model


def repeat_labels(model: DiTTransformer2DModel, classes: int) -> None:
    """Give label k the embedding of class k mod `classes`, so that every label but the last is a class."""
    for block in model.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight.data
        table[:NO_CLASS] = table[:classes].repeat(-(-NO_CLASS // classes), 1)[:NO_CLASS]


def build_unet(channels: int, width: int) -> UNet2DModel:
    """The demo's UNet for one channel, the DDPM CIFAR-10 UNet for three."""
    if channels == 1:
        multipliers, attention_level, layers, dropout, head = (1, 2, 4, 4), 2, 1, 0.0, 32
    else:
        multipliers, attention_level, layers, dropout, head = (1, 2, 2, 2), 1, 2, 0.1, None
    levels = range(len(multipliers))
    down = tuple("AttnDownBlock2D" if level == attention_level else "DownBlock2D" for level in levels)
    up = tuple("AttnUpBlock2D" if level == attention_level else "UpBlock2D" for level in reversed(levels))
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers,
        block_out_channels=tuple(width * factor for factor in multipliers),
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=min(32, width // 2),
        attention_head_dim=head,
        dropout=dropout,
    )


def compile_blocks(net: torch.nn.Module) -> None:
    """Compile each block for itself.

    Never the whole UNet: torch 2.13 on a CPU then gives every parameter below the first level a gradient of exactly zero, and says
    nothing (`docs/log.md`).
    """
    torch._dynamo.config.recompile_limit = 64  # the blocks share one forward; each has shapes of its own
    for module in net.modules():
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
            module.compile(dynamic=False)


def check_gradients(net: torch.nn.Module) -> None:
    """End the run when a part of the network does not learn."""
    idle = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    if idle:
        raise SystemExit(f"{len(idle)} parameters get no gradient, {idle[0]} first; a compiler may have lost it: try --no-compile.")


@dataclass
class Clock:
    """Where the run stands. Progress is the nearer of its two ends: steps done or minutes spent."""

    total_steps: int
    total_minutes: float
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        return max(self.step / self.total_steps, self.seconds / 60 / self.total_minutes)

    def learning_rate(self, peak: float, warmup: int = 250) -> float:
        """Linear warm-up, then half a cosine down to 1 % of the peak."""
        decay = 0.505 + 0.495 * math.cos(math.pi * min(self.progress, 1.0))
        return peak * min(1.0, (self.step + 1) / warmup) * decay

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


class Trainer:
    """Model, optimizer, EMA and clock of one run; everything that a checkpoint must hold."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.accelerator = Accelerator(mixed_precision="no" if options.float32 else "bf16")
        set_seed(options.seed)
        self.clean = load_images(options.data).to(self.accelerator.device)
        self.autoencoder = self.labels = None
        channels = self.clean.shape[1]
        self.flip = channels == 3
        if options.autoencoder:
            self.autoencoder = AutoencoderKL.from_pretrained(options.autoencoder).to(self.accelerator.device)
            self.clean = encode(self.autoencoder, self.clean)
            self.labels = load_labels(options.data).to(self.accelerator.device)
            net = build_transformer(self.clean, options.width or 160, options.blocks, options.patch)
        else:
            net = build_unet(channels, options.width or (32 if channels == 1 else 128))
        if options.init:
            folder = options.init / ("unet" if self.autoencoder is None else "transformer")
            net.load_state_dict(type(net).from_pretrained(str(folder)).state_dict())
        net = net.to(self.accelerator.device, memory_format=torch.channels_last)
        decay = options.ema or (0.9999 if self.flip else 0.9995)
        self.ema = EMAModel(net.parameters(), decay=decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.ema.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        if not options.no_compile:
            compile_blocks(self.accelerator.unwrap_model(self.net))
        clip = self.autoencoder is None  # latents may lie outside -1..1
        self.scheduler = DDIMScheduler(prediction_type=options.prediction, beta_schedule="linear", clip_sample=clip)
        self.alphas = self.scheduler.alphas_cumprod.to(self.accelerator.device)
        self.clock = Clock(options.steps, options.minutes)
        self.accelerator.register_for_checkpointing(self.ema, self.clock)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Clean images, noise, timesteps and conditioning of this step, drawn from (seed, step, process) alone."""
        device, size = self.clean.device, self.options.batch_size // self.accelerator.num_processes
        draw = torch.Generator(device).manual_seed(
            (self.options.seed * 1_000_003 + self.clock.step) * 1024 + self.accelerator.process_index
        )
        index = torch.randint(len(self.clean), (size,), generator=draw, device=device)
        clean = self.clean[index] if self.autoencoder else self.clean[index].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(size, generator=draw, device=device) < 0.5
            clean = torch.where(mirrored[:, None, None, None], clean.flip(-1), clean)
        noise = torch.randn(clean.shape, generator=draw, device=device)
        timesteps = torch.randint(1000, (size,), generator=draw, device=device)
        condition = {}
        if self.labels is not None:
            unknown = torch.rand(size, generator=draw, device=device) < 0.1
            condition["class_labels"] = self.labels[index].masked_fill(unknown, NO_CLASS)
        return clean.contiguous(memory_format=torch.channels_last), noise, timesteps, condition

    def step(self) -> Tensor:
        """One optimizer step on the noise (Ho et al. 2020, eq. 14) or the velocity (Salimans and Ho 2022, section 4).

        Weights below 1 for nearly clean images, min(1, gamma / SNR), are those of min-SNR (Hang et al. 2023) for the noise.
        """
        rate = self.clock.learning_rate(self.options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clean, noise, timesteps, condition = self.batch()
        signal_part = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = signal_part.sqrt() * clean + (1 - signal_part).sqrt() * noise
        with self.accelerator.autocast():
            predicted = self.net(noisy, timestep=timesteps, **condition, return_dict=False)[0]
        velocity = self.options.prediction == "v_prediction"
        target = signal_part.sqrt() * noise - (1 - signal_part).sqrt() * clean if velocity else noise
        ratio = signal_part / (1 - signal_part)
        loss = ((predicted.float() - target).square() * (self.options.min_snr / ratio).clamp(max=1)).mean()
        self.accelerator.backward(loss)
        if self.clock.step == CHECKED_STEP:
            check_gradients(self.net)
        self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.accelerator.unwrap_model(self.net).parameters())
        return loss.detach()

    def save_checkpoint(self) -> None:
        """Into a fresh folder, then swapped in, so that a stop during the write loses nothing."""
        final = self.options.output / "checkpoint"
        fresh, old = final.with_name("checkpoint.new"), final.with_name("checkpoint.old")
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove_tree(old)
            if final.exists():
                final.rename(old)
            fresh.rename(final)
            remove_tree(old)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> None:
        for name in ("checkpoint", "checkpoint.old"):
            folder = self.options.output / name
            if folder.exists():
                self.accelerator.load_state(str(folder))
                self.ema.to(self.accelerator.device)  # accelerate reads what is registered onto the CPU
                self.accelerator.print(f"continuing from step {self.clock.step}, {self.clock.seconds / 60:.0f} min in")
                return

    def save_pipeline(self) -> None:
        """The EMA weights as a bf16 pipeline, and a grid of samples to look at."""
        net = self.accelerator.unwrap_model(self.net)
        self.ema.store(net.parameters())
        self.ema.copy_to(net.parameters())
        copy = type(net).from_config(net.config)
        copy.load_state_dict(net.state_dict())
        self.ema.restore(net.parameters())
        if self.labels is not None:
            repeat_labels(copy, int(self.labels.max()) + 1)
        pipe = self.pipeline(copy.to(torch.bfloat16))
        pipe.save_pretrained(self.options.output / "model", max_shard_size="16MB")
        for file in (self.options.output / "model").rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, which nobody else could read in a shared installation
        pipe = self.pipeline(copy.float().to(self.clean.device))
        pipe.set_progress_bar_config(disable=True)
        options = {"generator": torch.Generator("cpu").manual_seed(0), "num_inference_steps": 50, "output_type": "np"}
        if self.labels is None:
            pixels = pipe(64, **options).images
        else:
            pixels = pipe(list(range(64)), guidance_scale=2.0, **options).images
        tiles = pixels.reshape(8, 8, SIDE, SIDE, -1).transpose(0, 2, 1, 3, 4).reshape(8 * SIDE, 8 * SIDE, -1)
        Image.fromarray((tiles.squeeze(-1) * 255 if tiles.shape[-1] == 1 else tiles * 255).round().astype("uint8")).resize(
            (16 * SIDE, 16 * SIDE), Image.Resampling.NEAREST
        ).save(self.options.output / "samples.png")
        (self.options.output / "model" / "README.md").write_text(self.card(sum(p.numel() for p in copy.parameters())))
        shutil.copy(self.options.output / "samples.png", self.options.output / "model" / "samples.png")

    def card(self, parameters: int) -> str:
        """What somebody who finds the model wants to know of it, in Markdown."""
        options, clock = self.options, self.clock
        return (
            f"# {self.options.output.resolve().name}\n\n"
            f"A denoiser of {parameters / 1e6:.1f} million parameters (averaged, bf16), trained by `examples/train_demo.py` "
            f"on `{options.data.name}` ({len(self.clean)} images): {clock.step} steps of {options.batch_size} images, "
            f"{clock.seconds / 3600:.1f} hours, {options.prediction}, peak learning rate {options.learning_rate:g}, "
            f"seed {options.seed}.\n\n![Samples, 50 steps of DDIM](samples.png)\n"
        )

    def pipeline(self, net: torch.nn.Module) -> DiffusionPipeline:
        if self.autoencoder is None:
            return DDIMPipeline(net, self.scheduler)
        return DiTPipeline(net, self.autoencoder.to(next(net.parameters()).dtype), self.scheduler)


def remove_tree(folder: Path) -> None:
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()


def train(trainer: Trainer) -> None:
    """Run to the end of the clock; checkpoints every few minutes and when asked to stop."""
    options, clock, main = trainer.options, trainer.clock, trainer.accelerator.is_main_process
    stop = {"asked": False}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.update(asked=True))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    last_save, smoothed = clock.seconds, None
    with Progress(*columns, disable=not main) as bar, open(options.output / "log.jsonl", "a") as log:
        task = bar.add_task("training", total=1000)
        while clock.progress < 1 and not stop["asked"]:
            started = time.perf_counter()
            loss = trainer.step()
            if clock.step % 50 == 0:
                value = trainer.accelerator.reduce(loss, "mean").item()
                smoothed = value if smoothed is None else 0.7 * smoothed + 0.3 * value
                row = {"loss": round(value, 5), "lr": clock.learning_rate(options.learning_rate), **asdict(clock)}
                if main:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                bar.update(task, description=f"step {clock.step}  loss {smoothed:.4f}", completed=int(1000 * clock.progress))
            clock.step += 1
            clock.seconds += time.perf_counter() - started
            if clock.seconds - last_save > 60 * options.save_every:
                trainer.save_checkpoint()
                last_save = clock.seconds
    trainer.save_checkpoint()
    if main:
        trainer.save_pipeline()
    trainer.accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, log, samples and the model")
    parser.add_argument("--steps", type=int, default=8000, help="end after this many optimizer steps (default 8000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this much training time, if sooner")
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes (default 128)")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="peak (default 8e-4)")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="v_prediction", help="what the model predicts")
    parser.add_argument("--min-snr", type=float, default=math.inf, help="gamma of min-SNR weights, such as 5 (default: none)")
    parser.add_argument("--ema", type=float, help="longest memory of the averaged weights (default 0.9995 grey, 0.9999 colour)")
    parser.add_argument(
        "--width", type=int, help="channels of the first level (default 32 grey, 128 colour) or of a transformer (160)"
    )
    parser.add_argument("--blocks", type=int, default=5, help="of a transformer (default 5)")
    parser.add_argument("--patch", type=int, default=1, help="latent pixels along the side of a transformer's token (default 1)")
    parser.add_argument("--autoencoder", type=Path, help="folder of an autoencoder: train a transformer on its latents")
    parser.add_argument("--init", type=Path, help="folder of a pipeline of the same shape whose weights to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints (default 5)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the model (no C++ compiler at hand)")
    parser.add_argument("--float32", action="store_true", help="no bf16 autocast")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    trainer.load_checkpoint()
    train(trainer)


if __name__ == "__main__":
    main()
