"""Train the feature extractor that halfbyte ships for its demo, and sum up the features of the real images.

    python examples/train_demo_features.py --train fashion-mnist-train.parquet --test fashion-mnist-test.parquet \\
        --output runs/features

Data are parquet files in the Hub's image layout with a column `label`. Fifteen epochs take about eleven minutes of one CPU core and
reach 93 % on the test images. The folder then holds the two files that lie beside `halfbyte/demo/features.py`; the docstring there
says what is in them.
"""

import argparse
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor
from train_demo import load_images, load_labels

from halfbyte.demo.features import CLASSES, SIDE, DemoFeatures

SHIFT = 2  # pixels; also the width of the black border, so that rolling an image is the same as shifting it


def load_data(path: Path, device: str) -> tuple[Tensor, Tensor]:
    """Images as uint8 (n, 1, 32, 32) and labels as int64 (n,)."""
    labels = load_labels(path)
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SystemExit(f"{path} has labels {labels.min()} to {labels.max()}; they must be 0 to {len(CLASSES) - 1}.")
    return load_images(path).to(device), labels.to(device)


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float() / 255


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image mirrored or not and shifted by up to 2 pixels each way: one gather for the whole batch."""
    count, device = len(images), images.device
    shifts = torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), generator=draw).to(device)
    mirrored = torch.rand(count, 1, generator=draw).to(device) < 0.5
    places = torch.arange(SIDE, device=device)
    rows, columns = (places - shifts[0]) % SIDE, (places - shifts[1]) % SIDE
    columns = torch.where(mirrored, SIDE - 1 - columns, columns)
    sample = torch.arange(count, device=device)
    return images[sample[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(model: DemoFeatures, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """SGD with Nesterov momentum, one rise and fall of the learning rate, bf16 autocast."""
    size, draw = options.batch_size, torch.Generator().manual_seed(options.seed)
    per_epoch = len(images) // size
    total = options.epochs * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=total, pct_start=0.2)
    forward = model if options.no_compile else torch.compile(model)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    model.train()
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=total)
        for epoch in range(options.epochs):
            summed = torch.zeros((), device=images.device)
            for index in torch.randperm(len(images), generator=draw)[: per_epoch * size].to(images.device).view(-1, size):
                batch = to_float(augment(images[index], draw)).contiguous(memory_format=torch.channels_last)
                with torch.autocast(images.device.type, torch.bfloat16):
                    logits = forward(batch)
                loss = F.cross_entropy(logits.float(), labels[index])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                summed += loss.detach()
                bar.advance(task)
            bar.update(task, description=f"epoch {epoch + 1}  loss {summed.item() / per_epoch:.4f}")


@torch.inference_mode()
def all_features(model: DemoFeatures, images: Tensor) -> Tensor:
    """Features of every image, float32 (n, 64)."""
    return torch.cat([model.features(to_float(part)) for part in images.split(500)])


def write(model: DemoFeatures, train_images: Tensor, test_accuracy: float, folder: Path) -> None:
    """The weights, and the training images' statistics together with the hash of the weights they belong to."""
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    weights = {name: value.cpu().contiguous() for name, value in weights.items()}
    path = folder / "features.safetensors"
    dataset = f"Fashion-MNIST, {len(train_images):,} training images"
    path.write_bytes(save(weights, {"dataset": dataset, "test_accuracy": f"{test_accuracy:.4f}"}))
    features = all_features(model, train_images).double()
    statistics = {
        "features_sum": features.sum(0).cpu(),
        "features_cov_sum": (features.T @ features).cpu(),
        "count": torch.tensor(len(features)),
    }
    names = {
        "dataset": dataset,
        "extractor": path.name,
        "extractor_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "statistics.safetensors").write_bytes(save(statistics, names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="parquet file of training images")
    parser.add_argument("--test", type=Path, required=True, help="parquet file of test images")
    parser.add_argument("--output", type=Path, required=True, help="folder for features.safetensors and statistics.safetensors")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default 15)")
    parser.add_argument("--batch-size", type=int, default=128, help="default 128")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="peak (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2; 1 is faster beside another busy process)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the model (no C++ compiler at hand)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    images, labels = load_data(options.train, device)
    test_images, test_labels = load_data(options.test, device)
    model = DemoFeatures().to(device, memory_format=torch.channels_last)
    train(model, images, labels, options)

    for value in (*model.parameters(), *model.buffers()):  # what follows is measured with the weights that are written
        if value.is_floating_point():
            value.data = value.data.half().float()
    model.eval().requires_grad_(False)
    guesses = model.head(all_features(model, test_images)).argmax(1)
    accuracy = (guesses == test_labels).float().mean().item()
    write(model, images, accuracy, options.output)
    print(f"test accuracy {100 * accuracy:.2f} %; wrote {options.output}/features.safetensors and statistics.safetensors")


if __name__ == "__main__":
    main()
