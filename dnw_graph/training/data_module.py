"""Loads images for Lightning, in an order independent of workers and restarts."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dnw_graph.arguments import checked
from dnw_graph.callbacks.wiring_updates import accumulates
from dnw_graph.data.images import Images
from dnw_graph.data.order import EvaluationOrder, TrainOrder
from dnw_graph.data.samples import KeptSamples, Samples, keep
from dnw_graph.data.sources import ImageData
from dnw_graph.data.transforms import is_flipped, is_small, transforms
from dnw_graph.data.workers import Loader
from dnw_graph.errors import InputError
from dnw_graph.recipes.options import RunOptions

DEFAULT_SIZES = {"digits": 16, "cifar10": 32, "directory": 224}
MAX_DEFAULT_WORKERS = 8


class DataModule(LightningDataModule):
    """Training and test loaders of one run.

    Args:
        images: The images.
        options: Image size, batch size, seed, devices and workers.

    Attributes:
        image_size: Height and width of the images from the loaders.
        steps_per_epoch: Optimiser steps in one pass over the training images.
        preprocess: The preprocessing of an image for evaluation.

    Raises:
        InputError: If there are fewer training images than a batch needs, or fewer test images than devices.
    """

    trainer: Trainer

    @checked
    def __init__(self, images: ImageData, options: RunOptions) -> None:
        super().__init__()
        self.images = images
        self.batch_size, self.accumulate = options.batch_size, options.accumulate
        self.seed = options.seed
        if options.image_size is None and images.name not in DEFAULT_SIZES:
            raise InputError(f"images {images.name!r} have no default size: give --image-size")
        self.image_size = options.image_size or DEFAULT_SIZES[images.name]
        self.steps_per_epoch = len(images.train) // options.batch_size
        if not (self.steps_per_epoch or options.evaluate):
            raise InputError(
                f"the data set has {len(images.train)} training images, fewer than a batch of {options.batch_size}: "
                "give a smaller --batch-size"
            )
        processes = options.devices * options.num_nodes
        if (fewest := min(len(images.test), len(images.validation))) < processes:
            raise InputError(f"{fewest} test images cannot be split over {processes} devices: use fewer --devices")
        default_workers = 0
        if images.name != "digits":
            default_workers = min(MAX_DEFAULT_WORKERS, (os.cpu_count() or 1) // options.devices)
        # Images decoded once are augmented in batches, which RandAugment does not support.
        self.kept = is_small(images.name, self.image_size) and not options.randaugment
        self.workers = default_workers if options.workers is None else options.workers
        self.train_transform, self.preprocess = transforms(images.name, self.image_size, options.randaugment)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the loader of this rank's training batches.

        Raises:
            InputError: If the trainer accumulates gradients, takes a part of each epoch, or has processes that cannot
                share a batch: the position in the images follows from the number of optimiser steps.
        """
        images, trainer = self.images.train, self.trainer
        self._check(trainer)
        ranks = trainer.global_rank, trainer.world_size
        order = TrainOrder(len(images), self.batch_size, self.seed, lambda: trainer.global_step, *ranks)
        return self._loader(images, order, training=True)

    def _check(self, trainer: Trainer) -> None:
        if accumulates(trainer):
            raise InputError(
                "batches of a DataModule are counted by optimiser steps, so accumulate_grad_batches must stay 1: give "
                "accumulate to Classifier instead, which splits each batch"
            )
        steps, limit = self.steps_per_epoch, trainer.limit_train_batches
        overfit, trial = trainer.overfit_batches, trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a function
        hint = "a DataModule gives whole epochs: leave it out, and give fewer images instead"
        if overfit:
            raise InputError(f"overfit_batches is {overfit}, but {hint}")
        if not trial and (limit < steps if isinstance(limit, int) else limit != 1.0):
            raise InputError(f"limit_train_batches is {limit}, less than all {steps} batches, but {hint}")
        if self.batch_size % trainer.world_size:
            raise InputError(
                f"{trainer.world_size} processes cannot share a batch of {self.batch_size} images evenly: give a "
                f"batch_size that is a multiple of {trainer.world_size}"
            )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the loader of this rank's batches of held-out images, or else of test images.

        A batch has as many images as are in memory at a time in training.
        """
        images, ranks = self.images.validation, (self.trainer.global_rank, self.trainer.world_size)
        batch_size = self.batch_size // ranks[1] // self.accumulate
        return self._loader(images, EvaluationOrder(len(images), batch_size, *ranks), training=False)

    def _loader(self, images: Images, order: Sampler[Any], training: bool) -> DataLoader[tuple[Tensor, int]]:
        """Return a loader; small images are decoded once for all epochs if they fit into memory."""
        samples: Samples | KeptSamples
        pixels = keep(images, self.image_size) if self.kept else None
        if pixels is not None:
            flip = is_flipped(self.images.name)
            samples = KeptSamples(pixels, images, self.preprocess, training, flip, self.seed)
        else:
            samples = Samples(images, self.train_transform if training else self.preprocess, self.seed)
        return Loader(
            samples,
            batch_sampler=order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
