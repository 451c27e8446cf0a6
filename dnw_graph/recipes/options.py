"""The options of every training run."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from dnw_graph.arguments import check_fields, require
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.node_functions import EPS
from dnw_graph.recipes.schedules import SCHEDULES

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true")
# Options with a choice of names.
NAMES = {"schedule": SCHEDULES, "precision": PRECISIONS, "accelerator": ("auto", "cpu", "gpu")}
# Options of one command: its action and its files.
ACTIONS = {"output", "resume", "init_from", "evaluate", "compact", "export", "with_preprocessing"}


def option(default: Any, description: str, *, fixed: bool = False) -> Any:
    """Declare a dataclass field that is also a command-line option.

    Args:
        default: Its default value.
        description: Its text in ``--help``.
        fixed: Whether a resumed run must have the same value as the run that it continues.
    """
    metadata = {"help": description, "fixed": fixed}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the command-line flag of a field: ``batch_size`` gives ``--batch-size``."""
    return "--" + name.replace("_", "-")


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a file, completed with those that did not exist when it was written."""
    node_function = "norm_relu_conv" if options.get("dynamics") == "continuous" else None
    recipe = {"optimizer": "sgd", "optimizer_options": {}, "ema": 0.0, "randaugment": 0, "mixup": 0.0, "cutmix": 0.0}
    recipe |= {"clip_grad_norm": 0.0, "accumulate": 1}
    return {"node_norm_eps": EPS, "node_function": node_function, **recipe, **options}


@dataclass(frozen=True)
class ModelOptions(ABC):
    """The options of one example: fields made by :func:`option`, and the model that they describe."""

    def __post_init__(self) -> None:
        """Check the types of the fields; a subclass with further checks calls this first."""
        check_fields(self, flag)

    @abstractmethod
    def create(self, num_classes: int, image_size: int) -> nn.Module:
        """Return the model, which maps images ``[B, 3, H, W]`` to scores ``[B, num_classes]``."""

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with the run that it continues."""
        return asdict(self)


@dataclass(frozen=True)
class RunOptions:
    """Data, schedule, machine and files of one run.

    Every field is a command-line option; its description for ``--help`` is in its metadata.

    Raises:
        InputError: If a value is out of range or an unknown name.
    """

    data: str = option(
        "digits",
        "'digits' (scikit-learn's 8x8 digits, the last 360 of 1,797 are the test images), 'cifar10' (downloaded "
        "by torchvision into ./data), or a directory with train/<class>/ and val/<class>/ or test/<class>/",
    )
    image_size: int | None = option(
        None,
        "height and width in pixels. From 64 up images get the ImageNet augmentation, below 64 the CIFAR one. "
        "Default: 16 for digits, 32 for cifar10, 224 for a directory",
        fixed=True,
    )
    check_images: bool = option(
        True,
        "before training, open every image file of a directory to find broken ones, so that none stops the run later. "
        "ImageNet's 1.33 million files take 2 to 4 minutes on a local disk",
    )
    held_out: int | None = option(
        0,
        "hold out this many training images, the same for every seed: after every epoch they choose best.ckpt, which "
        "is evaluated on the test images at the end. 0: every epoch is evaluated on the test images, and the last one "
        "counts. Default of the command: a tenth, at most 5,000",
        fixed=True,
    )
    epochs: int = option(15, "passes over the training images", fixed=True)
    batch_size: int = option(64, "images per step, over all devices", fixed=True)
    lr: float = option(0.05, "learning rate of the first step, or at the end of the warm-up", fixed=True)
    schedule: str = option(
        "cosine",
        "learning-rate schedule: 'cosine', down to 0, or 'step', x0.1 after half and after three quarters of the steps "
        "after the warm-up",
        fixed=True,
    )
    warmup_epochs: int = option(
        0, "epochs in which the learning rate rises linearly to --lr; part of --epochs", fixed=True
    )
    optimizer: str = option("sgd", "'sgd', 'adamw', or a class path such as torch.optim.NAdam", fixed=True)
    optimizer_options: dict[str, Any] = option(  # noqa: RUF009  # a field with a factory
        {}, "further arguments of the optimiser, such as --optimizer-options.nesterov true", fixed=True
    )
    momentum: float = option(0.9, "momentum of SGD", fixed=True)
    weight_decay: float = option(5e-5, "weight decay of the optimiser, on all parameters", fixed=True)
    norm_weight_decay: bool = option(
        True,
        "apply weight decay to the weights and biases of norms too; --no-norm-weight-decay excludes them",
        fixed=True,
    )
    label_smoothing: float = option(
        0.0, "label smoothing: share of each label that is spread evenly over all classes in training", fixed=True
    )
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, such as 0.999; the average is evaluated and saved; "
        "0 for none",
        fixed=True,
    )
    randaugment: int = option(
        0, "magnitude of two random operations per training image (RandAugment), such as 9; 0 for none", fixed=True
    )
    mixup: float = option(0.0, "alpha of Mixup, such as 0.2; 0 for none", fixed=True)
    cutmix: float = option(
        0.0, "alpha of CutMix, such as 1; 0 for none. With --mixup, one of both per step", fixed=True
    )
    clip_grad_norm: float = option(0.0, "clip the norm of the gradient of all parameters; 0 for none", fixed=True)
    accumulate: int = option(
        1, "split each device's batch into this many parts and accumulate their gradients, for less memory", fixed=True
    )
    compile: bool = option(False, "compile the model with torch.compile")
    precision: str = option("32-true", f"number format: one of {', '.join(PRECISIONS)}", fixed=True)
    seed: int = option(0, "seed of initial weights, order of images and augmentation", fixed=True)
    recompute: bool = option(
        False,
        "models with neural graphs: recompute node functions in the backward pass (activation checkpointing): less "
        "memory, more time, the same results",
    )
    accelerator: str = option("auto", "'cpu', 'gpu' (CUDA) or 'auto' (a CUDA GPU if there is one)")
    devices: int = option(1, "devices per machine: GPUs, or processes on a CPU")
    num_nodes: int = option(1, "machines; start the same command on each, as for any Lightning run")
    workers: int | None = option(
        None, "data-loading processes per device. Default: 0 for digits, else one per CPU core, at most 8"
    )
    output: str | None = option(
        None,
        "directory for checkpoints, logs and the summary. Default: a new numbered directory under ./runs, or the "
        "checkpoint's directory with --resume",
    )
    save_every: int = option(
        0, "also write last.ckpt every this many steps; 0: only at the end of every epoch, and when interrupted"
    )
    record_every: int = option(
        0, "also record the wiring every this many steps; 0: only after every epoch. See wiring.recording"
    )
    pictures: bool = option(
        False, "at the end, write curves, an animation of each graph and a page to pictures/ and to the logs"
    )
    wandb: str | None = option(None, "also log to this Weights & Biases project (needs the extra dnw-graph[wandb])")
    mlflow: str | None = option(
        None, "also log to this MLflow tracking URI, such as sqlite:///mlflow.db (needs the extra dnw-graph[mlflow])"
    )
    resume: str | None = option(
        None,
        "checkpoint to continue from, with the options that it holds. On the same devices the numbers are those of an "
        "unbroken run",
    )
    init_from: str | None = option(
        None,
        "trained model to start from: a checkpoint, the directory of a run, or the name of a pretrained model. Its "
        "classifier is left out if its classes are others",
    )
    evaluate: str | None = option(
        None, "model to evaluate, with its stored options; nothing is trained, and no train/ is needed"
    )
    compact: bool = option(
        False, "with --evaluate: evaluate the model without dead nodes, with sparse products over the real edges"
    )
    export: str | None = option(
        None,
        "with --evaluate: write the model without dead nodes to this file: .safetensors (wiring and weights), .pt2 "
        "(torch.export) or .onnx",
    )
    with_preprocessing: bool = option(
        False,
        "with --export to .pt2 or .onnx: the file takes RGB images of 0 to 255 (uint8) and normalises them",
    )

    def __post_init__(self) -> None:
        check_fields(self, flag)
        ranges: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
            ("epochs batch_size devices num_nodes accumulate", "1 or more", lambda x: x >= 1),
            (
                "weight_decay save_every record_every held_out warmup_epochs workers mixup cutmix clip_grad_norm",
                "0 or more",
                lambda x: x >= 0,
            ),
            ("seed", "in [0, 2^63)", lambda x: 0 <= x < 2**63),
            (
                "data output resume init_from evaluate export wandb mlflow",
                "a path",
                lambda x: x != "" and "\0" not in x,
            ),
            ("lr", "a number above 0", lambda x: x > 0),
            ("randaugment", "a magnitude from 0 to 30", lambda x: 0 <= x <= 30),
            ("momentum label_smoothing ema", "in [0, 1)", lambda x: 0 <= x < 1),
            ("image_size", "8 or more", lambda x: x >= 8),
        )
        for names, expected, holds in ranges:
            for name in names.split():
                value = getattr(self, name)
                require(value is None or holds(value), flag(name), expected, value)
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"--warmup-epochs is {self.warmup_epochs}, --epochs {self.epochs}: give more --epochs or fewer "
                "--warmup-epochs"
            )
        for name, known in NAMES.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        processes = self.devices * self.num_nodes
        parts = processes * self.accumulate
        if self.batch_size % parts:
            numbers = {"devices": processes, "parts": self.accumulate}
            who = " with ".join(f"{number} {name}" for name, number in numbers.items() if number > 1)
            raise InputError(
                f"{who} cannot share a batch of {self.batch_size} images evenly: "
                f"give a --batch-size that is a multiple of {parts}"
            )
        if len([path for path in (self.resume, self.init_from, self.evaluate) if path]) > 1:
            raise InputError("--resume, --init-from and --evaluate cannot go together: give one of them")
        if (self.compact or self.with_preprocessing or self.export is not None) and not self.evaluate:
            raise InputError("--compact and --export go with --evaluate: give the checkpoint of a trained model")
        if self.with_preprocessing and not str(self.export).endswith((".pt2", ".onnx")):
            raise InputError("--with-preprocessing goes with --export to .pt2 or .onnx: name such a file")

    def fixed(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the run that it continues."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["fixed"]}

    def machine(self) -> dict[str, Any]:
        """Return the options that a resumed run inherits and may change: data, processor, workers."""
        names = {f.name for f in fields(self) if not f.metadata["fixed"]} - ACTIONS
        machine = {name: getattr(self, name) for name in names}
        if os.path.isdir(self.data):
            machine["data"] = os.path.abspath(self.data)
        return machine
