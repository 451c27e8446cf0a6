"""``dnw-graph``: train, evaluate, predict, export, info and compare, from the command line.

What takes seconds to import (PyTorch, Lightning) is imported by the commands that need it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnw_graph import InputError, __version__, stopping

if TYPE_CHECKING:
    from torch import nn

    from dnw_graph.training.models import Family

BAD_INPUT = 2
# Images that go through a model at once.
BATCH = 32
TRAIN, COMPARE = "train [--model NAME] [options]", "compare --rules RULE … --seeds N … [options of train]"
COMMANDS = {
    TRAIN: "train a model, or go on with one (--resume); --help lists the options",
    "evaluate MODEL [options]": "accuracy on the test images of --data",
    "predict MODEL IMAGE …": "classes and probabilities; CSV for a folder",
    "export MODEL FILE": "write the model without dead nodes: .safetensors, .pt2 or .onnx",
    "info FILE": "what is in a checkpoint, a compact file, an export or the folder of a run",
    COMPARE: "rules × seeds on one data set: table, CSV, plot",
}
DESCRIPTION = """Graphs of single channels that learn which channels connect to which.

MODEL is the folder of a run, a checkpoint or a compact file. Commands:
""" + "".join(f"\n  {usage}\n      {meaning}" for usage, meaning in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments, if not those of the process.

    Returns:
        The exit status: 0; 2 after one line on stderr for input that cannot be used; 130 or 143 after a signal.
    """
    if argv is None:
        stopping.start()  # before the imports that take seconds
        argv = sys.argv[1:]
    known = [usage.split()[0] for usage in COMMANDS]
    command, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(f"usage: dnw-graph [-h] [--version] {{{','.join(known)}}} ...\n\n{DESCRIPTION}")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    try:
        if command not in known:
            from dnw_graph.errors import unknown_name

            raise unknown_name("command", command, known)
        return {
            "train": train,
            "evaluate": evaluate,
            "predict": predict,
            "export": export_model,
            "info": info,
            "compare": compare,
        }[command](rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Raises what it complains of, in one line."""

    def error(self, message: str) -> Any:
        """Raise the complaint."""
        raise InputError(f"{message}: {self.prog} --help says how")


def _parser(command: str) -> _Parser:
    _, meaning = next(pair for pair in COMMANDS.items() if pair[0].split()[0] == command)
    return _Parser(prog=f"dnw-graph {command}", description=meaning, allow_abbrev=False)


def train(argv: Sequence[str]) -> int:
    """Train a model of any family; the options are those of the examples."""
    from dnw_graph.training.command_line import main as run_command

    family, words = _family(argv)
    names = "; ".join(", ".join(each.names) for each in _families().values())
    description = f"Train a model of the paper, or your own. --model NAME is one of {names}."
    return run_command(description, family.options, family.defaults, words)


def _families() -> dict[str, Family]:
    from dnw_graph.training.models import FAMILIES

    return FAMILIES


def _family(argv: Sequence[str]) -> tuple[Family, list[str]]:
    """Return the models that a command line is about, and the words that their own options are among."""
    from dnw_graph.errors import unknown_name
    from dnw_graph.loading import COMPACT, checkpoint_card, checkpoint_of
    from dnw_graph.training.command_line import read_yaml
    from dnw_graph.training.models import family_with

    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in ("--model", "--config", "--resume", "--evaluate", "--init-from"):
        parser.add_argument(option)
    given, _ = parser.parse_known_args(argv)
    families = _families()
    model = given.model
    name: str | None = None
    if (path := given.resume or given.evaluate or given.init_from) and not str(path).endswith(COMPACT):
        from dnw_graph.checkpoint import read_checkpoint

        file = checkpoint_of(Path(path))
        name = checkpoint_card(file, read_checkpoint(file)).models
        if name is None:
            raise InputError(f"{path} was trained by a program of its own: go on with that program")
    elif given.config and model is None:
        options = read_yaml(given.config)
        model, name = options.get("model"), family_with(options)
    if model is not None and name is None:
        name = next((name for name, each in families.items() if model in each.names), None)
        if name is None:
            raise unknown_name("model", model, [known for each in families.values() for known in each.names])
    family = families[name or "mobilenet"]
    words = list(argv)
    if "model" not in family.options.__dataclass_fields__ and given.model is not None:
        place = next(i for i, word in enumerate(words) if word == "--model" or word.startswith("--model="))
        del words[place : place + (1 if "=" in words[place] else 2)]
    return family, words


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a model with the options that its file holds."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            return train(["--help"])
        raise InputError("evaluate needs a model: dnw-graph evaluate runs/1 --data /path/to/images")
    return train(["--evaluate", *argv])


def predict(argv: Sequence[str]) -> int:
    """Print the most likely classes of images: of a folder as CSV."""
    parser = _parser("predict")
    parser.add_argument("model", help="folder of a run, checkpoint or compact file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or a folder of them, at any depth")
    parser.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    parser.add_argument("--output", type=Path, help="write CSV to this file")
    given = parser.parse_args(argv)
    if given.top < 1:
        raise InputError(f"--top is {given.top}: expected 1 or more")
    from dnw_graph.training.images import image_files

    folders = [path for path in given.images if os.path.isdir(path)]
    paths = [name for path in given.images for name in (image_files(Path(path))[0] if path in folders else [path])]
    if not paths:
        raise InputError(f"{given.images[0]} holds no image")
    model = _model(given.model)
    rows = _predictions(model, paths, min(given.top, len(model.classes)), bool(folders))  # type: ignore[arg-type]
    if not (folders or given.output):
        for path, *found in rows:
            pairs = zip(found[::2], found[1::2], strict=True)
            print(path, *(f"{name} {probability:.1%}" for name, probability in pairs), sep="  ")
        return 0
    header = ["image", *(f"{what}_{place}" for place in range(1, given.top + 1) for what in ("class", "probability"))]
    try:
        with open(given.output, "w", newline="", encoding="utf-8") if given.output else nullcontext(sys.stdout) as file:
            writer = csv.writer(file)
            writer.writerow(header[: len(rows[0])])
            writer.writerows([path, *(f"{x:.4f}" if isinstance(x, float) else x for x in row)] for path, *row in rows)
    except OSError as error:
        raise InputError(f"cannot write {given.output} ({error.strerror}): give another --output") from error
    return 0


def _model(path: str) -> nn.Module:
    from dnw_graph import load
    from dnw_graph.model_card import card_of

    model = load(path)
    if card_of(model) is None:
        raise InputError(f"{path} does not say how images come to its model: write it from what dnw_graph.load returns")
    return model


def _predictions(model: nn.Module, paths: list[str], top: int, bar: bool) -> list[list[Any]]:
    """Return, per image, its path and the most likely classes with their probabilities."""
    import torch
    from tqdm import tqdm

    from dnw_graph.training.images import load_rgb

    rows: list[list[Any]] = []
    with torch.inference_mode(), tqdm(total=len(paths), disable=not bar, unit=" images", file=sys.stderr) as progress:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            images = torch.stack([model.preprocess(load_rgb(path)) for path in part])  # type: ignore[operator]
            values, places = model(images).softmax(1).topk(top)
            for path, probabilities, classes in zip(part, values.tolist(), places.tolist(), strict=True):
                named = zip((model.classes[k] for k in classes), probabilities, strict=True)  # type: ignore[index]
                rows.append([path, *(item for pair in named for item in pair)])
            progress.update(len(part))
    return rows


def export_model(argv: Sequence[str]) -> int:
    """Write a model without its dead nodes to one file."""
    parser = _parser("export")
    parser.add_argument("model", help="folder of a run, checkpoint or compact file")
    parser.add_argument("file", type=Path, help="ending in .safetensors, .pt2 or .onnx")
    parser.add_argument(
        "--with-preprocessing", action="store_true", help=".pt2 and .onnx: take images of 0 to 255 (uint8)"
    )
    given = parser.parse_args(argv)
    import torch

    from dnw_graph.compaction.exports import check_export, export

    check_export(given.file)
    model = _model(given.model)
    size = model.preprocess.image_size  # type: ignore[union-attr]
    print(export(model, given.file, torch.zeros(2, 3, size, size), given.with_preprocessing))  # type: ignore[arg-type]
    return 0


def info(argv: Sequence[str]) -> int:
    """Print what a file says about its model."""
    parser = _parser("info")
    parser.add_argument("file", type=Path, help="folder of a run, .ckpt, .safetensors, .pt2 or .onnx file")
    parser.add_argument("--json", action="store_true", help="print the card as JSON, with all classes and options")
    given = parser.parse_args(argv)
    from dnw_graph.loading import checkpoint_of, read_card

    file = checkpoint_of(given.file)
    card = read_card(file)
    if given.json:
        print(json.dumps(card.to_dict(), indent=2))
        return 0
    images, classes = card.preprocess, card.classes
    shown = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    numbers = {name: f"{value:.2%}" if name.startswith("top") else value for name, value in card.metrics.items()}
    rows = {
        "file": f"{file} ({os.path.getsize(file) / 1e6:,.2f} MB)",
        "models": card.models or "of a program of its own",
        "images": f"shorter side to {images.resize}, centre of {images.image_size} × {images.image_size}",
        "mean, std": f"{', '.join(map(str, images.mean))}; {', '.join(map(str, images.std))}",
        "classes": f"{len(classes)}: {shown}",
        "metrics": ", ".join(f"{name} {value}" for name, value in numbers.items()) or "none",
        "options": ", ".join(f"{name} {value}" for name, value in sorted(card.options.items())) or "none",
        "versions": ", ".join(f"{name} {value}" for name, value in card.versions.items()) or "none",
    }
    for name, value in rows.items():
        print(f"{name:12}{value}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Train every rule with every seed, and show what came out."""
    from dnw_graph.training.comparison import compare as run_all

    parser = _parser("compare")
    parser.add_argument("--rules", nargs="+", required=True, help="rules, such as dnw rigl random_graph")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    given, further = parser.parse_known_args(argv)
    stopping.goes_on()
    return run_all(given.rules, given.seeds, given.output, further, train)


if __name__ == "__main__":
    sys.exit(main())
