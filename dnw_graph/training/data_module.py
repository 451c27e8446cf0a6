"""Loads images for Lightning, in an order that does not depend on workers or restarts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dnw_graph import stopping
from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.training.augmentation import is_flipped, is_small, transforms
from dnw_graph.training.images import EvaluationSamples, ImageData, Images, TrainSamples
from dnw_graph.training.kept_images import KeptSamples, keep
from dnw_graph.training.options import RunOptions
from dnw_graph.training.order import EvaluationOrder, TrainOrder

DEFAULT_SIZES = {"digits": 16, "cifar10": 32, "folder": 224}
MAX_DEFAULT_WORKERS = 8


class _Loader(DataLoader[tuple[Tensor, int]]):
    """Has workers that leave stopping to their parent.

    Ctrl-C, and often SIGTERM, reach the whole process group. If a worker ended of it, the step in progress, which is to
    be finished and saved, would fail too.
    """

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        with stopping.held():
            return super().__iter__()


def _leave_the_group(worker: int) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # drops what came before
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # that of the parent
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    sys.excepthook = _except_losses


def _except_losses(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print no traceback where the parent is gone in the middle of an exchange; PyTorch ends the worker then."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Say in one line that a worker was killed, of which PyTorch tells in a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise InputError(
            "a process that loads images was killed, as happens where memory runs out: give fewer --workers; "
            f"{stopping.how_to_continue()}"
        ) from error


class DataModule(LightningDataModule):
    """Training and test loaders of one run.

    Args:
        images: The images.
        options: Image size, batch size, seed, devices and workers.

    Attributes:
        image_size: Height and width of the images that the loaders give.
        steps_per_epoch: Optimiser steps in one pass over the training images.
        preprocess: What is done to an image for evaluation.

    Raises:
        InputError: If a batch holds more images than there are, or there are fewer test images than devices.
    """

    @checked
    def __init__(self, images: ImageData, options: RunOptions) -> None:
        super().__init__()
        self.images = images
        self.batch_size = options.batch_size
        self.seed = options.seed
        if options.image_size is None and images.name not in DEFAULT_SIZES:
            raise InputError(f"images {images.name!r} have no size of their own: give --image-size")
        self.image_size = options.image_size or DEFAULT_SIZES[images.name]
        self.steps_per_epoch = len(images.train) // options.batch_size
        if not (self.steps_per_epoch or options.evaluate):
            raise InputError(
                f"the data set has {len(images.train)} training images, fewer than a batch of {options.batch_size}: "
                "give a smaller --batch-size"
            )
        processes = options.devices * options.num_nodes
        if len(images.test) < processes:
            raise InputError(
                f"{len(images.test)} test images cannot be split over {processes} devices: use fewer --devices"
            )
        default_workers = 0
        if images.name != "digits":
            default_workers = min(MAX_DEFAULT_WORKERS, (os.cpu_count() or 1) // options.devices)
        self.workers = default_workers if options.workers is None else options.workers
        self.train_transform, self.preprocess = transforms(images.name, self.image_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the loader of this rank's training batches."""
        trainer = self.trainer
        assert trainer is not None
        order = TrainOrder(
            len(self.images.train),
            self.batch_size,
            self.seed,
            lambda: trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
        )
        pixels = self._keep(self.images.train)
        if pixels is None:
            return self._loader(TrainSamples(self.images.train, self.train_transform, self.seed), order)
        flip = is_flipped(self.images.name)
        return self._loader(KeptSamples(pixels, self.images.train, self.preprocess, True, flip, self.seed), order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the loader of this rank's test batches."""
        assert self.trainer is not None
        order = EvaluationOrder(
            len(self.images.test),
            self.batch_size // self.trainer.world_size,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        pixels = self._keep(self.images.test)
        if pixels is None:
            return self._loader(EvaluationSamples(self.images.test, self.preprocess), order)
        return self._loader(KeptSamples(pixels, self.images.test, self.preprocess), order)

    def _keep(self, images: Images) -> Tensor | None:
        """Return small images, decoded once for all epochs; None for others, and for more than fit into memory."""
        return keep(images, self.image_size) if is_small(self.images.name, self.image_size) else None

    def _loader(
        self, samples: TrainSamples | EvaluationSamples | KeptSamples, order: TrainOrder | EvaluationOrder
    ) -> DataLoader[tuple[Tensor, int]]:
        assert self.trainer is not None
        return _Loader(
            samples,
            batch_sampler=order,
            num_workers=self.workers,
            worker_init_fn=_leave_the_group,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
