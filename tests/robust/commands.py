"""Command lines of the three examples, YAML files and folders of images, up to the start of training.

A case is bad if it ends in anything but the start of training or one line on stderr and status 2, or if it starts with
a value that its option cannot have.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import random
import re
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzz import LONGEST, Bad, Case
from lightning.pytorch import Trainer
from PIL import Image

import dnw_graph
from dnw_graph.training import ModelOptions, RunOptions

EXAMPLES = ("cifar10_tiny", "imagenet_mobilenet", "imagenet_resnet50")
PATHS = ("folder", "pipe.yaml", "missing", "/dev/null", "/dev/zero", "text.txt", "x" * 300, "text.txt/below")
NUMBERS = ("-1", "0", "1", "2", "1.5", "1e400", ".inf", "nan", "-.inf", "1" * 5000)
WORDS = ("", " ", "true", "null", "no", "é\u2028", "\x1b[31m", "!!python/object:os.system x")
HOSTILE = (*NUMBERS, *WORDS, *PATHS, "[]", "{}", "[1, 2]", "{a: 1}", "a: b: c", "&a [*a]")
YAML = (
    *HOSTILE,
    *("~", "{1: 2}", "- 1\n- 2", "2001-01-01", "0x1f", "1_000", "'0.1'", '"a\\0b"'),
    *("!!binary aGk=", "!!set {a}", "? [a]\n: b"),
)
FROM_ONE = ("epochs", "batch_size", "devices", "num_nodes", "width", "density", "lr")
LAYOUTS = (
    *("good", "one_class", "empty_class", "no_val", "extra_class", "nested", "loop", "is_folder", "files"),
    *("broken", "empty_file", "pipe", "socket", "dangling", "newline", "bytes"),
)
SECONDS = 60


class StartedError(Exception):
    """Training, or an evaluation, was about to start."""


def start(*_: Any, **__: Any) -> None:
    raise StartedError


def example(name: str) -> ModuleType:
    folder = str(Path(dnw_graph.__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def options_of(module: ModuleType) -> dict[str, Any]:
    """Return the options of an example with their default values."""
    kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, ModelOptions)]
    found = [*fields(RunOptions), *(field for kind in kinds for field in fields(kind))]
    return {field.name: {} if field.default is MISSING else field.default for field in found}


def write_images(root: Path, layout: str) -> str:
    """Make a folder of images with something odd in it."""
    image = Image.fromarray(np.full((9, 9, 3), 99, np.uint8))
    for part in ("train", "val"):
        for label in ("a",) if layout == "one_class" else ("a", "b"):
            folder = root / part / label / ("x/y" if layout == "nested" else "")
            folder.mkdir(parents=True)
            for number in range(6):
                image.save(folder / f"{number}.png")
    odd = root / "train" / "a" / "odd.png"
    if layout == "empty_class":
        (root / "train" / "c").mkdir()
    elif layout == "no_val":
        (root / "val").rename(root / "other")
    elif layout == "extra_class":
        (root / "val" / "c").mkdir()
        image.save(root / "val" / "c" / "0.png")
    elif layout == "broken":
        odd.write_bytes((root / "val" / "a" / "0.png").read_bytes()[:40])
    elif layout == "empty_file":
        odd.touch()
    elif layout == "pipe":
        os.mkfifo(odd)
    elif layout == "socket":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound, contextlib.chdir(odd.parent):
            bound.bind(odd.name)
    elif layout == "loop":
        (root / "train" / "a" / "again").symlink_to(root / "train" / "a")
    elif layout == "dangling":
        odd.symlink_to("nothing")
    elif layout == "newline":
        odd.with_name("x\ny.png").write_bytes(b"no image")
    elif layout == "bytes":
        Path(os.fsdecode(os.fsencode(odd.parent) + b"/\xff\xfe.png")).write_bytes(b"no image")
    elif layout == "is_folder":
        odd.mkdir()
    elif layout == "files":
        (root / "train" / "c").touch()
    return str(root)


def possible(name: str, value: Any, default: Any) -> bool:
    """Return whether an option may have a value, whatever the others are."""
    if value is None:
        return default is None
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return (
            number
            and (value > 0 if name in FROM_ONE else value >= 0)
            and (isinstance(default, float) or isinstance(value, int))
        )
    if isinstance(default, str):
        return isinstance(value, str) and value != ""
    return value != "" and not (name == "image_size" and value > 10_000)


def interrupt(number: int, frame: object) -> None:
    for pipe in (path for path in Path().rglob("*.*") if path.is_fifo()):
        with contextlib.suppress(OSError):  # without a reader
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    raise Bad(f"hangs for more than {SECONDS} seconds")


def run(module: ModuleType, argv: list[str]) -> None:
    defaults = options_of(module)
    seen: dict[str, Any] = {}

    def post_init(options: RunOptions) -> None:
        checks(options)
        seen.update({field.name: getattr(options, field.name) for field in fields(options)})

    checks = RunOptions.__post_init__
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    with (
        mock.patch.object(Trainer, "fit", start),
        mock.patch.object(Trainer, "validate", start),
        mock.patch("torchvision.datasets.CIFAR10.__init__", side_effect=OSError("no network")),
        mock.patch.object(RunOptions, "__post_init__", post_init),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            status = module.run_example(argv)
        except StartedError:
            wrong = [name for name, value in seen.items() if not possible(name, value, defaults[name])]
            if seen["batch_size"] == 1 and module.__name__ != "cifar10_tiny" and seen["image_size"] == 16:
                wrong = ["batch_size"]  # maps of one pixel have nothing to norm in single images
            if wrong:
                raise Bad(f"started with --{wrong[0]} {seen[wrong[0]]!r:.60}") from None
            return
        except SystemExit as stopped:
            if stopped.code == 0:
                return
            raise Bad(f"exit with {stopped.code}: {err.getvalue()[:80]!r}") from None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    message = err.getvalue()
    if status != 2 or message.count("\n") != 1 or not message.startswith("error: ") or len(message) > LONGEST + 8:
        raise Bad(f"status {status} and {message.count(chr(10))} lines: {message[:80]!r}")
    message.encode()


def cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Yield command lines: one to three options have odd values, in the line or in a YAML file."""
    before = os.getcwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("folder").mkdir()
        Path("text.txt").write_text("some text: [")
        os.mkfifo("pipe.yaml")
        try:
            for number in range(count):
                module = example(rng.choice(EXAMPLES))
                defaults = options_of(module)
                names = rng.sample([*defaults, "config"], rng.choice([0, 1, 1, 2, 3]))
                argv = ["--image-size", "16", "--output", f"run{number}"]
                if rng.random() < 0.2:
                    layout = rng.choice(LAYOUTS)
                    argv += ["--data", write_images(Path(f"data{number}"), layout), "--batch-size", "4"]
                    names = [] if rng.random() < 0.7 else names
                elif rng.random() < 0.1:
                    argv += rng.choice(
                        [["--batch-size", "1"], ["--image-size", "100000"], ["--devices", "3"], ["extra"], ["--", "-"]]
                    )
                lines = []
                for name in names:
                    if rng.random() < 0.5:
                        value = rng.choice(HOSTILE)
                        switch = isinstance(defaults.get(name), bool)
                        flag = "--" + name.replace("_", "-")
                        argv += [flag] if switch and rng.random() < 0.5 else [f"{flag}={value}"]
                    else:
                        lines.append(f"{name}: {rng.choice(YAML)}")
                if lines:
                    path = Path(f"{number}.yaml")
                    path.write_text("\n".join(lines) + "\n")
                    argv = [*argv[4:], "--config", str(path)] if rng.random() < 0.5 else ["--config", str(path), *argv]
                shown = (
                    re.sub(r"\s+", " ", f"{module.__name__} {' '.join(argv)} {lines}").encode("unicode_escape").decode()
                )
                yield shown[:200], command(module, argv)
        finally:
            os.chdir(before)


def command(module: ModuleType, argv: list[str]) -> Callable[[], object]:
    return lambda: run(module, argv)
