"""The training and evaluation step of an image classifier."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from dnw_graph.analysis.cost import NORMS
from dnw_graph.arguments import checked, require
from dnw_graph.callbacks.wiring_updates import accumulates
from dnw_graph.data.order import Purpose
from dnw_graph.errors import InputError
from dnw_graph.ranking import wiring_penalty
from dnw_graph.recipes.optimizers import make_optimizer
from dnw_graph.recipes.schedules import Schedule
from dnw_graph.rule_parameters import own_decay
from dnw_graph.seeding import mix


class Classifier(LightningModule):
    """Cross-entropy with the penalty of the wirings, an optimiser and a learning-rate schedule by step.

    Args:
        model: Maps images ``[B, 3, H, W]`` to scores ``[B, num_classes]``.
        num_classes: Number of classes.
        schedule: Creates the scheduler of an optimiser, see :mod:`dnw_graph.recipes.schedules`.
        lr: Learning rate.
        momentum: Momentum, for optimisers that have one.
        weight_decay: Weight decay.
        seed: Seed of the run. Random numbers that the model draws are a function of (seed, step, rank).
        label_smoothing: Share of each label that is spread evenly over all classes, in training only.
        norm_weight_decay: Whether weight decay applies to all parameters, or to all except the weights and biases of
            norms (``BatchNorm…``, ``InstanceNorm…``, ``GroupNorm``, ``LayerNorm`` and ``RMSNorm``).
        optimizer: Name or class path, see :mod:`dnw_graph.recipes.optimizers`.
        optimizer_options: Further arguments of the optimiser.
        mixup: α of Mixup (Zhang et al. 2018); 0 for none.
        cutmix: α of CutMix (Yun et al. 2019); 0 for none. With both, one of them is drawn for every step.
        accumulate: Number of parts into which a batch is split; their gradients are accumulated, so that only one part
            is in memory. Norms see one part at a time. The trainer must not accumulate too.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        schedule: Schedule,
        lr: float,
        momentum: float,
        weight_decay: float,
        seed: int,
        label_smoothing: float = 0.0,
        norm_weight_decay: bool = True,
        *,
        optimizer: str = "sgd",
        optimizer_options: Mapping[str, Any] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        require(num_classes >= 1, "num_classes", "an integer >= 1", num_classes)
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "seed": seed}
        for name, number in numbers.items():
            require(number >= 0, name, "0 or more", number)
        require(min(mixup, cutmix) >= 0, "mixup and cutmix", "0 or more", (mixup, cutmix))
        require(accumulate >= 1, "accumulate", "an integer >= 1", accumulate)
        require(0 <= label_smoothing <= 1, "label_smoothing", "a share, 0 … 1", label_smoothing)
        self.model, self.schedule, self.seed, self.accumulate = model, schedule, seed, accumulate
        self.fitting = False
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.label_smoothing, self.norm_weight_decay = label_smoothing, norm_weight_decay
        self.optimizer, self.optimizer_options = optimizer, dict(optimizer_options or {})
        # They draw from the generators seeded in every step, and so are functions of (seed, step, rank).
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        mixing = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
        self.mix = v2.RandomChoice(mixing) if mixing else None
        # Labels come from the images' classes; checking them in every batch would synchronise.
        options: dict[str, Any] = {"average": "micro", "validate_args": False}
        self.top1 = MulticlassAccuracy(num_classes, top_k=1, **options)
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **options)
        self.loss = MeanMetric()

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the scores ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        return self.model(x)

    def setup(self, stage: str) -> None:
        """Note whether the module is trained or only evaluated."""
        self.fitting = stage == "fit"

    def on_fit_start(self) -> None:
        """Refuse a trainer that accumulates gradients, if the steps do.

        Raises:
            InputError: If it does.
        """
        if self.accumulate > 1 and accumulates(self.trainer):
            raise InputError(
                f"accumulate is {self.accumulate}, and the trainer accumulates gradients too: leave "
                "accumulate_grad_batches at 1, without a GradientAccumulationScheduler"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the generators, so that a resumed run draws the same numbers as an uninterrupted one."""
        torch.manual_seed(mix(self.seed, Purpose.STEP, self.global_step, self.global_rank))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, or of its last part, after the backward passes of the other parts."""
        images, labels = batch if self.mix is None else self.mix(*batch)
        *first, last = zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True)
        done = []
        if self.accumulate > 1:
            self.trainer.optimizers[0].zero_grad()
        for part in first:
            part_loss = self._cross_entropy(*part, len(images))
            self.trainer.strategy.backward(part_loss, None)
            done.append(part_loss.detach())
        loss = self._cross_entropy(*last, len(images))
        self.log("train/loss", sum(done, loss.detach()), prog_bar=True)
        # Nothing here is copied from the host to the device, which would synchronise: not a penalty of zero, and not a
        # number, which Lightning would turn into a tensor there.
        self.log("train/lr", torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))
        penalty = wiring_penalty(self.model)
        if penalty.requires_grad:
            self.log("train/penalty", penalty)
            loss = loss + penalty
        return loss

    def _cross_entropy(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Return the share of one part of a batch in the loss of the batch."""
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        return loss * (len(images) / batch_size)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the gradients of the first parts of a batch; :meth:`training_step` drops those of the last step."""
        if self.accumulate == 1:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Add one batch to the metrics."""
        images, labels = batch
        scores = self(images)
        self.top1.update(scores, labels)
        self.top5.update(scores, labels)
        self.loss.update(F.cross_entropy(scores, labels), weight=len(labels))
        self.log("val/top1", self.top1, prog_bar=True)
        self.log("val/top5", self.top5)
        self.log("val/loss", self.loss)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and the schedule, applied after every step."""
        decays = own_decay(self)
        if not self.norm_weight_decay:
            norms = [m for m in self.modules() if isinstance(m, NORMS)]
            decays |= {p: 0.0 for m in norms for p in m.parameters(recurse=False)}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if p not in decays]}]
        for decay in sorted(set(decays.values())):
            own = [p for p in self.parameters() if decays.get(p) == decay]
            groups.append({"params": own, "weight_decay": decay})
        common = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        optimizer = make_optimizer(self.optimizer, groups, common, self.optimizer_options)
        scheduler = self.schedule(optimizer)
        known = isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        require(known, "schedule", "a function that returns a PyTorch scheduler for an optimiser", self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the schedule to the step of a checkpoint: a function of the step alone, in every version.

        Raises:
            InputError: If training goes on with other groups of parameters.
        """
        if not (self.fitting and {"optimizer_states", "lr_schedulers"} <= checkpoint.keys()):
            return
        fresh = self.configure_optimizers()
        scheduler = fresh["lr_scheduler"]["scheduler"]
        with warnings.catch_warnings(action="ignore"):  # of steps of a schedule without one of the optimiser
            for _ in range(checkpoint["global_step"]):
                scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
        groups, given = fresh["optimizer"].param_groups, checkpoint["optimizer_states"][0]["param_groups"]
        if len(given) != len(groups):
            raise InputError(
                f"the optimiser of the checkpoint has {len(given)} groups of parameters, this one {len(groups)}: give "
                "the same norm_weight_decay and the same rules"
            )
        for group, saved in zip(groups, given, strict=True):
            saved["lr"] = group["lr"]
