"""One run from its options to its summary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dnw_graph import stopping
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.arguments import checked
from dnw_graph.callbacks.averages import Averages
from dnw_graph.callbacks.training_cost import TrainingCost
from dnw_graph.callbacks.wiring_monitor import WiringMonitor
from dnw_graph.callbacks.wiring_recorder import WiringRecorder
from dnw_graph.callbacks.wiring_updates import WiringUpdates
from dnw_graph.checkpoint import SECTION, model_weights, read_checkpoint
from dnw_graph.compaction import compact, export
from dnw_graph.compaction.exports import check_export
from dnw_graph.data.image_files import check_files
from dnw_graph.data.sources import ImageData, hold_out, load_images
from dnw_graph.data.workers import lost_workers_told
from dnw_graph.errors import InputError
from dnw_graph.loading import ModelFile, file_of
from dnw_graph.model_card import ModelCard, versions
from dnw_graph.recipes.models import FAMILIES
from dnw_graph.recipes.options import RunOptions
from dnw_graph.recipes.schedules import SCHEDULES, after_warmup
from dnw_graph.training.checkpoints import Checkpoints
from dnw_graph.training.classifier import Classifier
from dnw_graph.training.data_module import DataModule
from dnw_graph.training.hardware import check_hardware, check_step, on_gpu
from dnw_graph.training.loggers import Events, StepLog, Table, begin, hosted_loggers
from dnw_graph.training.resuming import check_resumable, check_same_run, start_from
from dnw_graph.training.run_directory import run_directory
from dnw_graph.training.summary import Summary, summarize, write_files
from dnw_graph.training.trainer import make_trainer, repeatable, start_ranks
from dnw_graph.usual import first_floats
from dnw_graph.whole_file import write_whole

# The options of a run, written when it starts; --config can read it.
CONFIG = "config.yaml"
# Steps between rows of a log, if an epoch has that many.
STEPS_PER_ROW = 50
DOUBLE = "64-true"
# File of the recording.
RECORDING = "wiring.recording"


@checked
def run(
    create: Callable[[int, int], nn.Module],
    model_options: dict[str, Any],
    options: RunOptions,
    images: ImageData | None = None,
    models: str | None = None,
    file: ModelFile | None = None,
) -> Summary:
    """Train, continue or evaluate a model, print the summary and write the files of the run.

    Args:
        create: Returns the model for ``(num_classes, image_size)``.
        model_options: The options that identify the model; saved in checkpoints, and compared when one is loaded.
        options: All other options.
        images: The images. Default: those that ``options.data`` names.
        models: Name under which :func:`~dnw_graph.training.register_models` registered the model's options, so that
            :func:`dnw_graph.load` can create the model from a file.
        file: The file to resume, start from or evaluate, if already read.

    Returns:
        The summary. On several devices all processes return it; the first one prints and writes.

    Raises:
        InputError: If any input cannot be used; raised before training starts wherever possible.
        Stopped: If the run was told to stop during training; raised after its last step is saved.
    """
    stopping.saved(Path(options.resume) if options.resume else None)
    check_hardware(options)
    if options.evaluate:
        file = file or ModelFile(file_of(Path(options.evaluate)))
        return _evaluate(create, model_options, options, images, file)
    checkpoint = None
    if options.resume:
        checkpoint = (file and file.checkpoint) or read_checkpoint(options.resume)
    images = hold_out(images or load_images(options.data), options.held_out)
    options = replace(options, held_out=len(images.held_out or ()))
    data = DataModule(images, options)
    torch.manual_seed(options.seed)
    model = create(len(images.classes), data.image_size)
    if options.init_from:
        start_from(model, create, file or ModelFile(file_of(Path(options.init_from))), images.classes)
    if options.recompute:
        _recompute(model)
    held = {**model_options, **options.fixed(), "image_size": data.image_size}
    identity = {**held, "classes": images.classes, "train_images": len(images.train)}
    if options.resume and checkpoint:
        check_same_run(options.resume, checkpoint[SECTION]["options"], identity, list(identity))
    check_step(model, data.image_size, options, on_gpu(options))
    if options.precision == DOUBLE:  # The trainer would convert it after it has loaded a checkpoint.
        model.double()
    if options.compile:
        model.compile()
    card = ModelCard(data.preprocess, images.classes, models, held, versions=versions())
    with run_directory(options) as directory:
        return _train(_classifier(model, data, options), data, options, identity, checkpoint, directory, card)


def _classifier(model: nn.Module, data: DataModule, options: RunOptions) -> Classifier:
    steps_per_epoch = max(1, data.steps_per_epoch)  # 0 without training images
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
        optimizer=options.optimizer,
        optimizer_options=options.optimizer_options,
        mixup=options.mixup,
        cutmix=options.cutmix,
        accumulate=options.accumulate,
    )


def _recompute(model: nn.Module) -> None:
    graphs = neural_graphs(model)
    if not graphs:
        raise InputError("--recompute is for models with neural graphs; this one has none: leave it out")
    for graph in graphs.values():
        graph.dynamics.recompute = True


def _train(
    module: Classifier,
    data: DataModule,
    options: RunOptions,
    identity: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    directory: Path,
    card: ModelCard,
) -> Summary:
    if options.check_images:
        found = data.images
        check_files(found.classes, train=found.train, held_out=found.held_out, test=found.test)
    steps_per_row = min(STEPS_PER_ROW, data.steps_per_epoch)
    monitor, training_cost = WiringMonitor(module.model, max(1, steps_per_row)), TrainingCost(module.model)
    table = Table(directory, checkpoint[SECTION].get("metrics_rows") if checkpoint else 0)
    events = Events(directory, int(checkpoint["global_step"]) if checkpoint else 0)
    machine = options.machine()
    if stopping.is_first_process():
        named = {"model": FAMILIES[card.models].names[0]} if card.models in FAMILIES else {}
        write_whole(directory / CONFIG, yaml.safe_dump({**named, **card.options, **machine}).encode(), "--output")
    hosted = hosted_loggers(options.wandb, options.mlflow, directory, checkpoint[SECTION] if checkpoint else {})
    checkpoints = Checkpoints(directory, options.save_every, identity, table, card, machine, hosted)
    updates = WiringUpdates(options.epochs * data.steps_per_epoch, data.steps_per_epoch)
    log = StepLog(steps_per_row)
    pictures = directory / "pictures" if options.pictures else None
    recorder = WiringRecorder(directory / RECORDING, options.record_every, module.model, pictures, table.path)
    averages = [Averages(options.ema)] if options.ema else []
    # Checkpoints come last: they include what the others did in a step.
    callbacks = [updates, *averages, monitor, recorder, training_cost, log, checkpoints]
    trainer = make_trainer(options, callbacks, [table, events, *hosted.values()], checkpoint)
    if options.resume and checkpoint:
        check_resumable(options.resume, checkpoint, trainer, callbacks, module, data.steps_per_epoch)
        known = checkpoint["callbacks"][checkpoints.state_key]["best_top1"] is not None
        _take_best(Path(options.resume).parent, checkpoints.best, known and data.images.held_out is not None)
    begin(hosted)
    with stopping.watched(), repeatable(), lost_workers_told():
        start_ranks(trainer, directory)
        trainer.fit(module, data, ckpt_path=options.resume, weights_only=True)
        metrics = trainer.callback_metrics
        if data.images.held_out is not None:
            # Other ranks may not know the directory; the trainer gives them the first one's weights.
            if trainer.is_global_zero and checkpoints.best.exists():
                module.model.load_state_dict(model_weights(read_checkpoint(checkpoints.best)))
            data.images = replace(data.images, held_out=None)
            metrics = _validated(module, data, options)
        elif checkpoint and "val/top1" not in metrics:  # resumed at its end
            module.model.load_state_dict(model_weights(checkpoint))
            metrics = _validated(module, data, options)
    summary = summarize(
        module.model,
        data.image_size,
        metrics,
        {**identity, "data": options.data},
        initial=monitor.initial,
        best=(checkpoints.best_top1, checkpoints.best_epoch),
        training_multiply_adds=training_cost.multiply_adds,
        seconds=checkpoints.seconds,
    )
    if trainer.is_global_zero:
        print("\n".join(["", *summary.lines()]))
        written = [CONFIG, *write_files(summary, module.model, directory)]
        written += [path.name for path in (checkpoints.first, checkpoints.last, checkpoints.best)]
        written += ["metrics.csv", "tensorboard/"]
        if recorder.recording is not None:
            written += [RECORDING, *(["pictures/"] if options.pictures else [])]
        print(f"written to {directory}: {', '.join(written)}")
    return summary


def _take_best(directory: Path, best: Path, needed: bool) -> None:
    """Copy the best checkpoint of the directory that is resumed from, if the run goes on in another one."""
    before = directory / best.name
    if needed and stopping.is_first_process() and not (before.exists() or best.exists()):
        raise InputError(f"{before} is missing: it is the best epoch so far; put it beside the checkpoint to resume")
    if stopping.is_first_process() and before.exists() and not best.exists():
        write_whole(best, before.read_bytes(), "--output")


def _validated(module: Classifier, data: DataModule, options: RunOptions) -> dict[str, Any]:
    """Return the metrics of the model on the validation images, which no logger gets."""
    trainer = make_trainer(options)
    trainer.validate(module, data, verbose=False)
    return trainer.callback_metrics


def _evaluate(
    create: Callable[[int, int], nn.Module],
    model_options: dict[str, Any],
    options: RunOptions,
    images: ImageData | None,
    file: ModelFile,
) -> Summary:
    if options.export is not None:
        check_export(Path(options.export))
    path, card = str(file.path), file.card
    check_same_run(path, card.options, model_options, list(model_options))
    model = file.model(create)
    size, classes = card.preprocess.image_size, card.class_directories
    images = hold_out(images or load_images(options.data, None if options.held_out else classes), options.held_out or 0)
    now = {"image_size": options.image_size or size, "classes": images.classes}
    check_same_run(path, {"image_size": size, "classes": classes}, now, list(now))
    options = replace(options, image_size=size)
    data = DataModule(images, options)
    data.preprocess = card.preprocess
    if options.check_images:
        check_files(images.classes, test=images.validation)
    check_step(model, size, options, on_gpu(options))
    if options.precision == DOUBLE:
        model.double()
    # Any images will do: they are for counting and tracing.
    example = torch.zeros(2, 3, size, size, dtype=first_floats(model).dtype)
    small = model
    if options.compact:
        # Sparse products need a CPU.
        small = compact(model, products="dense" if on_gpu(options) else "sparse", example=example)
    module = _classifier(small, data, options)
    with run_directory(options) if options.output else nullcontext() as directory:
        trainer = make_trainer(options)
        with stopping.watched(), lost_workers_told():
            start_ranks(trainer, directory)
            trainer.validate(module, data, verbose=False)
        summary = summarize(model, size, trainer.callback_metrics, {**card.options, "data": options.data})
        if trainer.is_global_zero:
            print("\n".join(["", *summary.lines()]))
            if options.compact:
                print(f"\n{small.report}")
            if options.export is not None:
                # Images are in float32, also for a model that was trained in float64.
                single = copy.deepcopy(model).float() if options.precision == DOUBLE else model
                print(export(single, options.export, example.float(), options.with_preprocessing))
            if directory:
                print(f"written to {directory}: {', '.join(write_files(summary, small, directory))}")
    return summary
