"""Draws ``docs/images/burst.png``: how stage 1 of MobileNetV1-DNW freezes, and how a larger eps and a warm-up help.

python tools/draw_burst.py /path/to/cifar10/train
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dnw_graph import attach
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.node_functions import EPS, NormReluConv
from dnw_graph.visualize import style

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "burst.png"
STEPS, BATCH, LR, WARMUP = 81, 64, 0.1, 390
VARIANTS = {
    "eps 1e-5": (EPS, 0),
    "eps 1e-3": (1e-3, 0),
    "eps 1e-5, warm-up": (EPS, WARMUP),
    "eps 1e-3, warm-up": (1e-3, WARMUP),
}
LOOKS = (style.NEGATIVE, "-"), (style.NEGATIVE, "--"), (style.POSITIVE, "-"), (style.POSITIVE, "--")


def train(images: ImageFolder, eps: float, warmup: int) -> list[tuple[int, float]]:
    """Return, after every step, the silent outputs of stage 1 and the mean |w| of its real edges."""
    torch.manual_seed(0)
    model = MobileNetV1DNW(0.225, 10, stem_stride=1, node_function=partial(NormReluConv, eps=eps))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    attach(model, optimizer, STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    stage = neural_graphs(model)["stage1"]
    found = []
    for x, labels in islice(DataLoader(images, BATCH, shuffle=True, drop_last=True), STEPS):
        found.append((int(stage.silent_nodes().sum()), float(stage.edge_weight.detach().abs().mean())))
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        schedule.step()
    return found


def main() -> None:
    """Train all variants, print a table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="the training images of CIFAR-10, one directory per class")
    normalise = v2.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
    augment = [v2.ToImage(), v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    images = ImageFolder(parser.parse_args().images, v2.Compose([*augment, normalise]))
    figure = style.figure(9.0, 3.4)
    axes = figure.subplots(1, 2)
    shown = range(0, STEPS, 20)
    print("| silent outputs / mean |w| of real edges after |", *(f"{step} |" for step in shown))
    for (name, (eps, warmup)), (colour, dashes) in zip(VARIANTS.items(), LOOKS, strict=True):
        rows = train(images, eps, warmup)
        print(f"| {name} |", *(f"{rows[step][0]} / {rows[step][1]:,.2f} |" for step in shown), flush=True)
        for ax, values in zip(axes, zip(*rows, strict=True), strict=True):
            ax.plot(values, color=colour, linestyle=dashes, label=name)
    axes[0].set(title="Stage 1: outputs without an input edge (of 64)", xlabel="step", ylim=(0, 64))
    axes[1].set(title="Stage 1: mean |w| of real edges", xlabel="step", yscale="log")
    axes[1].legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
