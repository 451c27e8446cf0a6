"""Adds a trained model to the package, from the directory of a run: its file, and its row in the table.

    python tools/make_pretrained.py runs/1 --name mobilenet_v1_dnw.cifar10 --data-name CIFAR-10 \
        --images /path/to/cifar10/test --commit 154a0ef

It uses the last checkpoint, finished or not; the accuracy is that of the written file on all images.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import dnw_graph
from dnw_graph.analysis.cost import cost
from dnw_graph.model_card import ModelCard, card_of
from dnw_graph.models.pretrained import TABLE, Pretrained
from dnw_graph.recipes.models import FAMILIES
from dnw_graph.recipes.options import flag
from dnw_graph.weights_file import save_weights

LARGEST = 1_500_000


def main() -> None:
    """Write the file, measure it, and put its row into the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--name", required=True, help="name of the model, with a dot before the data")
    parser.add_argument("--data-name", required=True, help="name of the data in the table")
    parser.add_argument("--images", required=True, help="all test images, one directory per class")
    parser.add_argument("--commit", required=True, help="commit from which the run was started")
    parser.add_argument("--classes", nargs="+", help="names of the classes, if their directories have others")
    given = parser.parse_args()
    model = dnw_graph.load(given.run / "last.ckpt")
    card = card_of(model)
    assert card is not None
    if given.classes:
        card = replace(card, classes=given.classes, directories=card.class_directories)
        card.describe(model)
    path = TABLE.parent / f"{given.name}.safetensors"
    save_weights(model, path)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    size = card.preprocess.image_size
    costs = cost(model, (3, size, size))
    row = Pretrained(
        name=given.name,
        data=given.data_name,
        top1=round(accuracy(dnw_graph.load(path), given.images), 6),
        parameters=costs.parameters,
        multiply_adds=costs.multiply_adds,
        file_size=path.stat().st_size,
        trained=f"{card.metrics['epoch']:g} of {card.options['epochs']} epochs",
        command=command(card),
        commit=given.commit,
    )
    rows = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    names = [each["name"] for each in rows]
    place = names.index(row.name) if row.name in names else len(rows)
    rows[place : place + 1] = [asdict(row)]
    TABLE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(row)


def accuracy(model: nn.Module, images: str) -> float:
    """Return the top-1 accuracy on a directory of images."""
    data = ImageFolder(images, model.preprocess)
    card = card_of(model)
    assert card is not None
    assert data.classes == card.class_directories
    with torch.no_grad():
        right = [(model(x).argmax(1) == labels).sum() for x, labels in DataLoader(data, 100)]
    return float(torch.stack(right).sum()) / len(data)


def command(card: ModelCard) -> str:
    """Return the command line with all options that are not defaults."""
    family = FAMILIES[str(card.models)]
    defaults = {
        **{f.name: getattr(each, f.name) for each in (family.defaults, family.options()) for f in fields(each)},
        "image_size": None,
    }
    chosen = {
        name: value for name, value in card.options.items() if name == "model" or defaults.get(name, value) != value
    }
    words = [_word(name, value) for name, value in chosen.items()]
    return " ".join(["dnw-graph train", *words, "--data /path/to/images"])


def _word(name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))}"


if __name__ == "__main__":
    main()
