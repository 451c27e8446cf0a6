"""The order of images: a pure function of (seed, epoch), independent of workers, ranks and restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum

import torch
from torch.utils.data import Sampler

from dnw_graph.seeding import mix


class Purpose(IntEnum):
    """The purpose of random numbers; separates the streams of one seed."""

    ORDER = 0
    AUGMENTATION = 1
    STEP = 2


class TrainOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample index) for one rank, starting at the current step of training.

    Epoch e visits the samples in the order of a permutation drawn from (seed, e). Consecutive runs of
    ``batch_size`` samples make one step; each rank takes its part of every run. The incomplete last run is dropped.
    The position follows from the number of steps already trained, so a run that resumes within an epoch continues with
    the next batch, and the sampler has no state to save.

    Args:
        num_samples: Training images.
        batch_size: Images per step over all ranks; a multiple of ``world_size``.
        seed: Seed of the run.
        steps_trained: Returns the number of optimiser steps so far; called when iteration starts.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        steps_trained: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_trained = steps_trained
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of steps in a full epoch."""
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the remaining batches of the current epoch."""
        epoch, first = divmod(self.steps_trained(), len(self))
        generator = torch.Generator().manual_seed(mix(self.seed, Purpose.ORDER, epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        share = self.batch_size // self.world_size
        for step in range(first, len(self)):
            start = step * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[start : start + share]]


class EvaluationOrder(Sampler[list[int]]):
    """Batches that visit every sample exactly once over all ranks, the same number of batches on each.

    Data-parallel modules communicate in every forward pass, so all ranks need the same number of batches. No sample is
    repeated; instead, batch sizes differ by at most one.

    Args:
        num_samples: Evaluation images, at least one per rank.
        batch_size: Largest batch per rank (at least 2: a single image may be left over for another rank).
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples = num_samples
        self.num_batches = -(-num_samples // (max(batch_size, 2) * world_size))
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the batches per rank."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches."""
        parts = self.num_batches * self.world_size
        for part in range(self.rank, parts, self.world_size):
            yield list(range(part * self.num_samples // parts, (part + 1) * self.num_samples // parts))
