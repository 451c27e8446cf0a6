"""Trains the tiny static classifier with the candidate gradient in float32 and in bfloat16, from the same seeds.

Images are those of an ``ImageFolder`` with ``train`` and ``test`` inside, such as CIFAR-10: the first of every class,
mirrored at random in training. SGD with momentum 0.9, weight decay 1e-4, and a cosine from 0.1 to 0 per step; seeds
decide on weights, order and mirroring. A swap is a real edge of one step that is not real in the next. Run with
``python benchmarks/rounded_gradient.py data/cifar10 --threads 1``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import arguments, report
from torch import Tensor
from torchvision.datasets import ImageFolder

from dnw_graph.models import TinyClassifier
from dnw_graph.propagation import AutoPropagation

BATCH, MEAN, STD = 128, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def main() -> None:
    """Print a row for each way and seed, and one for the mean of each way."""
    parser = arguments(__doc__ or "", takes=("threads",))
    parser.add_argument("data", type=Path, help="the folder with train and test")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each way")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--images", type=int, nargs=2, default=(5000, 2000), help="images to train on and to test on")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = [load(options.data / part, count) for part, count in zip(("train", "test"), options.images, strict=True)]
    rows: list[dict[str, Any]] = []
    for way, gradient in (("float32", "exact"), ("bfloat16", "bfloat16")):
        found = []
        for seed in range(options.seeds):
            found.append(train(gradient, seed, options.epochs, *parts))
            print(
                f"{way}, seed {seed}: top-1 {found[-1][0]:.2f}, loss {found[-1][1]:.3f}, swaps {found[-1][2]:,}",
                flush=True,
            )
        top1, loss, swaps = (torch.tensor(each, dtype=torch.float64) for each in zip(*found, strict=True))
        rows.append(
            {
                "candidate gradient": way,
                "top-1, %": f"{top1.mean():.2f} ± {top1.std():.2f}",
                "by seed": ", ".join(f"{each:.2f}" for each in top1.tolist()),
                "training loss": f"{loss.mean():.3f} ± {loss.std():.3f}",
                "swaps": f"{swaps.mean():,.0f} ± {swaps.std():,.0f}",
            }
        )
    images = f"{options.images[0]:,} images, {options.epochs} epochs, {options.seeds} seeds"
    report(f"Tiny static classifier, {images}", rows, options)


def load(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return images, normalised, and labels: the first of every class."""
    images = ImageFolder(folder)
    labels = torch.tensor(images.targets)
    chosen = torch.cat([(labels == each).nonzero()[: count // len(images.classes), 0] for each in labels.unique()])
    pixels = torch.from_numpy(np.stack([np.asarray(images[index][0]) for index in chosen.tolist()]))
    shift, scale = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2) / 255 - shift) / scale, labels[chosen]


def train(
    gradient: str, seed: int, epochs: int, training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[float, float, int]:
    """Return top-1 on the test images in percent, the mean loss of the last epoch, and the number of swaps."""
    torch.manual_seed(seed)
    model = TinyClassifier("static", propagation=AutoPropagation(candidate_gradient=gradient))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = training
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    real, swaps, losses = model.graph.real_index, 0, []
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            mirrored = (torch.rand(BATCH) < 0.5).view(-1, 1, 1, 1)
            loss = F.cross_entropy(model(torch.where(mirrored, images[batch].flip(3), images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            now = model.graph.real_index
            swaps += int((~torch.isin(real, now)).sum())
            real = now
            if epoch == epochs - 1:
                losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(*(each.split(500) for each in test), strict=True)
        )
    return 100 * right / len(test[1]), sum(losses) / len(losses), swaps


if __name__ == "__main__":
    main()
