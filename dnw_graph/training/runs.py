"""One run from its options to its summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from dnw_graph import stopping
from dnw_graph._compat import leave_signals_alone
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.arguments import checked
from dnw_graph.checkpoint import SECTION, read_checkpoint
from dnw_graph.compaction import compact, export
from dnw_graph.compaction.exports import check_export
from dnw_graph.errors import InputError
from dnw_graph.loading import COMPACT, checkpoint_card, checkpoint_of, load, model_of, read_card
from dnw_graph.model_card import ModelCard, versions
from dnw_graph.training.checkpoint_io import WholeFileIO
from dnw_graph.training.checkpoints import Checkpoints
from dnw_graph.training.checks import check_files, check_hardware, check_same_run, on_gpu
from dnw_graph.training.classifier import Classifier
from dnw_graph.training.console import Console
from dnw_graph.training.data_module import DataModule, lost_workers_told
from dnw_graph.training.folder import run_folder
from dnw_graph.training.images import ImageData, hold_out, load_images
from dnw_graph.training.loggers import Events, StepLog, Table
from dnw_graph.training.options import RunOptions
from dnw_graph.training.ranks import start_ranks
from dnw_graph.training.resuming import check_resumable
from dnw_graph.training.schedules import SCHEDULES, after_warmup
from dnw_graph.training.start_from import start_from
from dnw_graph.training.summary import Summary, summarize, write_files
from dnw_graph.training.training_cost import TrainingCost
from dnw_graph.training.trial import check_step
from dnw_graph.training.wiring_monitor import WiringMonitor
from dnw_graph.training.wiring_recorder import WiringRecorder
from dnw_graph.training.wiring_updates import WiringUpdates
from dnw_graph.whole_file import write_whole

# What the options of a run are written to when it starts; --config takes it.
CONFIG = "config.yaml"
# Steps between two looks at the loss for the progress bar, for which the host waits for the device.
STEPS_SHOWN_ON_GPU = 20
# Steps between two rows of a log, if an epoch has as many.
STEPS_PER_ROW = 50
# File of the recording.
RECORDING = "wiring.recording"


@checked
def run(
    create: Callable[[int, int], nn.Module],
    model_options: dict[str, Any],
    options: RunOptions,
    images: ImageData | None = None,
    models: str | None = None,
) -> Summary:
    """Train, continue or evaluate a model, print the summary and write the files of the run.

    Args:
        create: Returns the model for ``(num_classes, image_size)``.
        model_options: What identifies the model; saved in checkpoints, and compared when one is loaded.
        options: Everything else.
        images: The images, if not those that ``options.data`` names.
        models: What :func:`~dnw_graph.training.register_models` calls the options that make the model, so that
            :func:`dnw_graph.load` can do it from a file.

    Returns:
        The summary. On several devices all processes return it; the first one prints and writes.

    Raises:
        InputError: If anything that the user gave cannot be used; found before training starts wherever possible.
        Stopped: If the run was told to stop while it trained. Raised after it has saved its last step.
    """
    stopping.saved(Path(options.resume) if options.resume else None)
    check_hardware(options)
    if options.evaluate:
        return _evaluate(create, model_options, options, images, Path(options.evaluate))
    checkpoint = read_checkpoint(options.resume) if options.resume else None
    images = hold_out(images or load_images(options.data), options.held_out)
    data = DataModule(images, options)
    torch.manual_seed(options.seed)
    model = create(len(images.classes), data.image_size)
    if options.init_from:
        start_from(model, create, Path(options.init_from), images.classes)
    if options.recompute:
        _recompute(model)
    held = {**model_options, **options.fixed(), "image_size": data.image_size}
    identity = {**held, "classes": images.classes, "train_images": len(images.train)}
    if options.resume and checkpoint:
        check_same_run(options.resume, checkpoint[SECTION]["options"], identity, list(identity))
    check_step(model, data.image_size, options, on_gpu(options))
    card = ModelCard(data.preprocess, images.classes, models, held, versions=versions())
    with run_folder(options) as folder:
        return _train(_classifier(model, data, options), data, options, identity, checkpoint, folder, card)


def _classifier(model: nn.Module, data: DataModule, options: RunOptions) -> Classifier:
    steps_per_epoch = max(1, data.steps_per_epoch)  # where there are no images to train on
    num_steps, warmup_steps = (n * steps_per_epoch for n in (options.epochs, options.warmup_epochs))
    return Classifier(
        model,
        len(data.images.classes),
        after_warmup(SCHEDULES[options.schedule], warmup_steps, num_steps),
        options.lr,
        options.momentum,
        options.weight_decay,
        options.seed,
        options.label_smoothing,
        options.norm_weight_decay,
    )


def _recompute(model: nn.Module) -> None:
    graphs = neural_graphs(model)
    if not graphs:
        raise InputError("--recompute is for models with neural graphs, and this one has none: leave it out")
    for graph in graphs.values():
        graph.dynamics.recompute = True


def _train(
    module: Classifier,
    data: DataModule,
    options: RunOptions,
    identity: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    folder: Path,
    card: ModelCard,
) -> Summary:
    if options.check_images:
        check_files(data.images.classes, data.images.train, data.images.test)
    monitor, training_cost = WiringMonitor(module.model), TrainingCost(module.model)
    table = Table(folder, checkpoint[SECTION].get("metrics_rows") if checkpoint else 0)
    events = Events(folder, int(checkpoint["global_step"]) if checkpoint else 0)
    machine = options.machine()
    if stopping.is_first_process():
        write_whole(folder / CONFIG, yaml.safe_dump({**card.options, **machine}).encode(), "--output")
    checkpoints = Checkpoints(folder, options.save_every, identity, table, card, machine)
    # Checkpoints come last: they hold what the others made of a step.
    num_steps = options.epochs * data.steps_per_epoch
    updates = WiringUpdates(num_steps, data.steps_per_epoch)
    log = StepLog(min(STEPS_PER_ROW, data.steps_per_epoch))
    recorder = WiringRecorder(
        folder / RECORDING, options.record_every, module.model, folder / "pictures" if options.pictures else None
    )
    callbacks = [updates, monitor, recorder, training_cost, log, checkpoints]
    trainer = _trainer(options, callbacks, [table, events])
    if options.resume and checkpoint:
        check_resumable(options.resume, checkpoint, trainer, callbacks, module, data.steps_per_epoch)
    with stopping.watched(), _repeatable(), lost_workers_told():
        start_ranks(trainer, folder)
        trainer.fit(module, data, ckpt_path=options.resume, weights_only=True)
    if "val/top1" not in trainer.callback_metrics:  # resumed where it had ended
        trainer.validate(module, data, verbose=False)
    summary = summarize(
        module.model,
        data.image_size,
        trainer.callback_metrics,
        {**identity, "data": options.data},
        initial=monitor.initial,
        best=(checkpoints.best_top1, checkpoints.best_epoch),
        training_multiply_adds=training_cost.multiply_adds,
        seconds=checkpoints.seconds,
    )
    if trainer.is_global_zero:
        print("\n".join(["", *summary.lines()]))
        written = [CONFIG, *write_files(summary, module.model, folder)]
        written += [path.name for path in (checkpoints.first, checkpoints.last, checkpoints.best)]
        written += ["metrics.csv", "tensorboard/"]
        if recorder.recording is not None:
            written += [RECORDING, *(["pictures/"] if options.pictures else [])]
        print(f"written to {folder}: {', '.join(written)}")
    return summary


@contextmanager
def _repeatable() -> Iterator[None]:
    """Have cuDNN take algorithms that give the same numbers in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _evaluate(
    create: Callable[[int, int], nn.Module],
    model_options: dict[str, Any],
    options: RunOptions,
    images: ImageData | None,
    path: Path,
) -> Summary:
    if options.export is not None:
        check_export(Path(options.export))
    path = checkpoint_of(path)
    checkpoint = None if path.suffix == COMPACT else read_checkpoint(path)
    card = read_card(path) if checkpoint is None else checkpoint_card(path, checkpoint)
    check_same_run(str(path), card.options, model_options, list(model_options))
    model = load(path) if checkpoint is None else model_of(path, checkpoint, create)
    size, classes = card.preprocess.image_size, card.classes
    images = images or load_images(options.data, None if options.held_out else classes)
    images = hold_out(images, options.held_out)
    now = {"image_size": options.image_size or size, "classes": images.classes}
    check_same_run(str(path), {"image_size": size, "classes": classes}, now, list(now))
    options = replace(options, image_size=size)
    data = DataModule(images, options)
    data.preprocess = card.preprocess
    if options.check_images:
        check_files(images.classes, images.test)
    check_step(model, size, options, on_gpu(options))
    # The images decide nothing: they are for counting and for tracing.
    example = torch.zeros(2, 3, size, size)
    small = model
    if options.compact:
        # Sparse products are made for CPUs.
        small = compact(model, products="dense" if on_gpu(options) else "sparse", example=example)
    module = _classifier(small, data, options)
    with run_folder(options) if options.output else nullcontext() as folder:
        trainer = _trainer(options, [])
        with stopping.watched(), lost_workers_told():
            start_ranks(trainer, folder)
            trainer.validate(module, data, verbose=False)
        summary = summarize(model, size, trainer.callback_metrics, {**card.options, "data": options.data})
        if trainer.is_global_zero:
            print("\n".join(["", *summary.lines()]))
            if options.compact:
                print(f"\n{small.report}")
            if options.export is not None:
                print(export(model, options.export, example, options.with_preprocessing))
            if folder:
                print(f"written to {folder}: {', '.join(write_files(summary, small, folder))}")
    return summary


def _trainer(options: RunOptions, callbacks: list[Callback], loggers: list[Logger] | None = None) -> Trainer:
    monitor = next((each for each in callbacks if isinstance(each, WiringMonitor)), None)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,  # type: ignore[arg-type]  # checked by RunOptions
        max_epochs=options.epochs,
        logger=loggers or False,
        callbacks=[*callbacks, Console(STEPS_SHOWN_ON_GPU if on_gpu(options) else 1, monitor)],
        plugins=[WholeFileIO()],
        enable_checkpointing=loggers is not None,
        enable_model_summary=False,
        num_sanity_val_steps=0,  # images have been checked, and a resumed run must not evaluate twice
        use_distributed_sampler=False,  # the order of images is ours
        log_every_n_steps=0,  # see StepLog
    )
    # Its handler for SIGTERM waits for all ranks, which do not all get the signal.
    leave_signals_alone(trainer)
    return trainer
