"""``dnw-graph``: train, evaluate, predict, export, info and compare, from the command line.

Slow imports (PyTorch, Lightning) happen in the commands that need them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnw_graph import InputError, __version__, stopping

if TYPE_CHECKING:
    from torch import nn

    from dnw_graph.loading import ModelFile
    from dnw_graph.recipes.models import Family

BAD_INPUT = 2
# Batch size of predict.
BATCH = 32
MODEL = "directory of a run, checkpoint, compact file or export"
RULE = "the rule of the model if it is your own: package.module.Class, as in training"
# Usage and meaning by command.
COMMANDS = {
    "train": ("[--model NAME] [options]", "train a model, or resume a run (--resume); --help lists the options"),
    "evaluate": ("MODEL [options]", "measure the accuracy on the test images of --data"),
    "predict": ("MODEL IMAGE …", "print classes and probabilities; CSV for a directory"),
    "export": ("MODEL FILE", "write the model without dead nodes: .safetensors, .pt2 or .onnx"),
    "info": ("FILE", "show what a checkpoint, compact file, export or run directory contains"),
    "compare": (
        "--rules RULE … --seeds N … [options of train]",
        "train rules × seeds on one data set: table, CSV, plot",
    ),
}
HELP = f"""usage: dnw-graph [-h] [--version] {{{",".join(COMMANDS)}}} ...

Graphs of single channels that learn which channels connect to which.

MODEL is the directory of a run, a checkpoint or a compact file; predict also takes exports. Commands:
""" + "".join(f"\n  {name} {usage}\n      {meaning}" for name, (usage, meaning) in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments. Default: those of the process.

    Returns:
        The exit status: 0; 2 after one line on stderr for input that cannot be used; 130 or 143 after a signal.
    """
    if argv is None:
        stopping.start()  # before the imports that take seconds
        argv = sys.argv[1:]
    command, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if command in ("-h", "--help", "--version"):
        print(__version__ if command == "--version" else HELP)
        return 0
    functions = dict(zip(COMMANDS, (train, evaluate, predict, export_model, info, compare), strict=True))
    try:
        if command not in functions:
            from dnw_graph.errors import unknown_name

            raise unknown_name("command", command, functions)
        return functions[command](rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Raises its errors as one line."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"dnw-graph {command}", description=COMMANDS[command][1], allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raise the error."""
        raise InputError(f"{message}: see {self.prog} --help")


def train(argv: Sequence[str]) -> int:
    """Train a model of any family; the options are those of the examples."""
    from dnw_graph.recipes.models import FAMILIES
    from dnw_graph.training.command_line import main as run_command

    family, file = _family(argv)
    names = "; ".join(", ".join(each.names) for each in FAMILIES.values())
    description = f"Train a model of the paper, or your own. --model NAME is one of {names}."
    return run_command(description, family.options, family.defaults, argv, file)


def _family(words: Sequence[str]) -> tuple[Family, ModelFile | None]:
    """Return the model family of a command line, and the file that it starts from."""
    from dnw_graph.errors import unknown_name
    from dnw_graph.recipes.models import FAMILIES, family_with
    from dnw_graph.training.command_line import read_yaml, started_from

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--model", "--config", "--resume", "--evaluate", "--init-from"):
        parser.add_argument(option, nargs="?")  # missing files are reported later
    given, _ = parser.parse_known_args(words)
    file = started_from(vars(given))
    model, name = given.model, None
    if file is not None:
        name = file.card.models
        if name is None:
            raise InputError(f"{file.path} was trained by another program: resume with that program")
        if name not in FAMILIES:
            raise InputError(
                f"{file.path} has models {name!r}: use the program that calls register_models({name!r}, …)"
            )
    elif given.config and model is None:
        options = read_yaml(given.config)
        model, name = options.get("model"), family_with(options)
    if model is not None and file is None:
        # Options of your own may have a field of this name.
        name = next((known for known, each in FAMILIES.items() if model in each.names), name)
        if name is None:
            raise unknown_name("model", str(model), [known for each in FAMILIES.values() for known in each.names])
    family = FAMILIES[name or "mobilenet"]
    if file is not None and given.model is not None and given.model not in family.names:
        raise InputError(f"--model is {given.model!r}, but {file.path} holds {' or '.join(family.names)}: leave it out")
    return family, file


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a model with the options that its file holds."""
    if argv and argv[0] in ("-h", "--help"):
        return train(["--help"])
    if not argv or argv[0].startswith("-"):
        raise InputError("evaluate needs a model: dnw-graph evaluate runs/1 --data /path/to/images")
    return train(["--evaluate", *argv])


def predict(argv: Sequence[str]) -> int:
    """Print the most likely classes of images: of a directory as CSV."""
    parser = _Parser("predict")
    parser.add_argument("model", type=Path, help=MODEL)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or a directory of images at any depth")
    parser.add_argument("--wiring", help=RULE)
    parser.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    parser.add_argument("--output", type=Path, help="write CSV to this file")
    given = parser.parse_args(argv)
    if given.top < 1:
        raise InputError(f"--top is {given.top}: expected 1 or more")
    from dnw_graph.data.images import image_files

    directories = [path for path in given.images if os.path.isdir(path)]
    try:
        found = [image_files(Path(path))[0] if path in directories else [path] for path in given.images]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from error
    if not (paths := [path for each in found for path in each]):
        raise InputError(f"{given.images[0]} contains no images")
    model = _model(given.model, given.wiring, programs=True)
    rows = _predictions(model, paths, given.top, bar=bool(directories))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # Names of files need not be UTF-8.
    try:
        if directories or given.output:
            _write_csv(rows, min(given.top, len(model.classes)), given.output)
        else:
            for path, *of_image in rows:
                pairs = zip(of_image[::2], of_image[1::2], strict=True)
                print(path, *(f"{name} {probability:.1%}" for name, probability in pairs), sep="  ", flush=True)
    except BrokenPipeError:  # the reader of stdout, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = given.output or "to standard output"
        raise InputError(f"cannot write {where} ({error.strerror}): give another --output") from error
    return 0


def _write_csv(rows: Iterable[list[Any]], classes: int, path: Path | None) -> None:
    """Write rows as they come, to stdout if there is no path."""
    header = [f"{what}_{place}" for place in range(1, classes + 1) for what in ("class", "probability")]
    odd = "surrogateescape"  # Names of files need not be UTF-8.
    with open(path, "w", newline="", encoding="utf-8", errors=odd) if path else nullcontext(sys.stdout) as file:
        writer = csv.writer(file)
        writer.writerow(["image", *header])
        for row in rows:
            writer.writerow([f"{x:.4f}" if isinstance(x, float) else x for x in row])
            file.flush()


def _model(path: Path, wiring: str | None, programs: bool = False) -> Any:
    """Return the model of a file, with its preprocessing; exported programs only if they may be run."""
    from dnw_graph.loading import PROGRAMS, ModelFile, file_of
    from dnw_graph.model_card import card_of

    file = ModelFile(file_of(path))
    if programs and file.path.suffix in PROGRAMS:
        from dnw_graph.compaction.programs import load_program

        if wiring is not None:
            raise InputError(f"{file.path} is a program, which needs no rule: leave --wiring out")
        return load_program(file.path, file.card)
    create = None
    if wiring is not None:
        from dnw_graph.recipes.models import options_from_file

        create = options_from_file(str(file.path), file.card.models, file.card.options, wiring).create
    model = file.model(create)
    if card_of(model) is None:
        raise InputError(f"{path} has no preprocessing: write it from a model that dnw_graph.load returned")
    return model


def _predictions(model: nn.Module, paths: list[str], top: int, bar: bool) -> Iterator[list[Any]]:
    """Yield, per image, its path and the most likely classes with their probabilities."""
    import torch
    from tqdm import tqdm

    from dnw_graph.data.images import load_rgb

    names, preprocess = model.classes, model.preprocess
    with torch.inference_mode(), tqdm(total=len(paths), disable=not bar, unit=" images", file=sys.stderr) as progress:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            images = torch.stack([preprocess(load_rgb(path)) for path in part])  # type: ignore[operator]
            found = model(images).softmax(1).topk(min(top, len(names)))  # type: ignore[arg-type]
            for path, *of_image in zip(part, found.values.tolist(), found.indices.tolist(), strict=True):
                named = ((names[index], probability) for probability, index in zip(*of_image, strict=True))  # type: ignore[index]
                yield [path, *(item for pair in named for item in pair)]
            progress.update(len(part))


def export_model(argv: Sequence[str]) -> int:
    """Write a model without dead nodes to one file."""
    parser = _Parser("export")
    parser.add_argument(
        "model", type=Path, help=MODEL.replace(", compact file or export", ", or compact file (not to .onnx)")
    )
    parser.add_argument("file", type=Path, help="ending in .safetensors, .pt2 or .onnx")
    parser.add_argument("--wiring", help=RULE)
    parser.add_argument(
        "--with-preprocessing", action="store_true", help=".pt2 and .onnx: take images of 0 to 255 (uint8)"
    )
    given = parser.parse_args(argv)
    import torch

    from dnw_graph.compaction.exports import check_export, export

    check_export(given.file)
    model = _model(given.model, given.wiring)
    size = model.preprocess.image_size
    print(export(model, given.file, torch.zeros(2, 3, size, size), given.with_preprocessing))
    return 0


def info(argv: Sequence[str]) -> int:
    """Print the card of a file."""
    parser = _Parser("info")
    parser.add_argument("file", type=Path, help=MODEL)
    parser.add_argument("--json", action="store_true", help="print the card as JSON, with all classes and options")
    given = parser.parse_args(argv)
    from dnw_graph.loading import ModelFile, file_of

    file = ModelFile(file_of(given.file))
    card = file.card
    if given.json:
        print(json.dumps(card.to_dict(), indent=2))
        return 0
    images, classes = card.preprocess, card.classes
    shown = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    metrics = {name: f"{value:.2%}" if name.startswith("top") else value for name, value in card.metrics.items()}
    tables = {"metrics": metrics, "options": dict(sorted(card.options.items())), "versions": card.versions}
    rows = {
        "file": f"{file.path} ({os.path.getsize(file.path) / 1e6:,.2f} MB)",
        "models": card.models or "of another program",
        "images": f"shorter side to {images.resize}, centre of {images.image_size} × {images.image_size}",
        "mean, std": f"{', '.join(map(str, images.mean))}; {', '.join(map(str, images.std))}",
        "classes": f"{len(classes)}: {shown}",
        **{name: ", ".join(f"{key} {x}" for key, x in table.items()) or "none" for name, table in tables.items()},
    }
    for name, value in rows.items():
        print(f"{name:12}{value}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Train every rule with every seed, and show the results."""
    parser = _Parser("compare")
    parser.add_argument("--rules", nargs="+", required=True, help="rules, such as dnw rigl random_graph")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="directory (default: runs/compare)")
    given, further = parser.parse_known_args(argv)
    from dnw_graph.training.comparison import compare as run_all

    stopping.goes_on()
    return run_all(given.rules, given.seeds, given.output, further, train, _requested)


def _requested(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of options, as the summary of a run has them."""
    from dnw_graph.training.command_line import read_options

    family, file = _family(words)
    own, options, _ = read_options("", family.options, family.defaults, words, file)
    return {**own.identity(), **options.fixed(), "data": options.data}


if __name__ == "__main__":
    sys.exit(main())
