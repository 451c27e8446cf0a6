"""Checks that a checkpoint has everything that a run needs to resume or start from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.callbacks.averages import Averages
from dnw_graph.callbacks.training_cost import TrainingCost
from dnw_graph.callbacks.wiring_monitor import WiringMonitor
from dnw_graph.callbacks.wiring_recorder import WiringRecorder, read
from dnw_graph.checkpoint import check_weights, damaged
from dnw_graph.errors import InputError
from dnw_graph.loading import ModelFile
from dnw_graph.partial_step import ELEMENTWISE
from dnw_graph.ranking import has_hash, rankings, saved_rule
from dnw_graph.recipes.options import completed, flag
from dnw_graph.sparse_layers import weight_graphs
from dnw_graph.structure import match
from dnw_graph.training.checkpoints import Checkpoints, loop_state
from dnw_graph.training.classifier import Classifier
from dnw_graph.weights_file import is_weights_file
from dnw_graph.wirings import wiring_name

# Essential options of an optimiser; others differ between versions of PyTorch.
GROUP = ("params", "lr", "initial_lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps")


def check_same_run(path: str, then: dict[str, Any], now: dict[str, Any], names: list[str]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: The checkpoint.
        then: Options of the run that wrote it.
        now: Options of this run.
        names: Options to compare.

    Raises:
        InputError: If an option differs; the message names the first one that does.
    """
    then = completed(then)
    for name in names:
        if name not in then:
            raise InputError(f"{path} is a checkpoint of another program: it lacks {flag(name)}")
        if then[name] == now[name]:
            continue
        option, given, trained = origin(name), shown(name, now[name]), shown(name, then[name])
        raise InputError(
            f"{option} is {given}, but {path} was trained with {trained}: give the same value, or start a new run"
        )


def origin(name: str) -> str:
    """Return the flag of the option that a value comes from."""
    return flag("data" if name in ("classes", "train_images") else name)


def shown(name: str, value: Any) -> str:
    """Return a value for a message."""
    if name == "classes" and isinstance(value, list) and value:
        return f"{len(value)} classes, {str(value[0])[:50]!r} ... {str(value[-1])[:50]!r}"
    if name == "train_images" and isinstance(value, int):
        return f"{value:,} training images"
    return repr(value)[:100]


def check_resumable(
    path: str,
    checkpoint: Mapping[str, Any],
    trainer: Trainer,
    callbacks: Sequence[Callback],
    module: Classifier,
    steps_per_epoch: int,
) -> None:
    """Refuse a checkpoint from which a run could not continue exactly.

    Args:
        path: The checkpoint.
        checkpoint: Its content.
        trainer: The trainer of the resumed run.
        callbacks: Its callbacks.
        module: The module in training.
        steps_per_epoch: Steps of one epoch.

    Raises:
        InputError: If weights, position, or the state of the optimiser, the schedule or a callback are missing, differ
            in structure from those of this run, or are inconsistent.
    """
    weights = [checkpoint["state_dict"]]
    if any(isinstance(each, Averages) for each in callbacks):
        weights.append(checkpoint.get("current_model_state", {}))
    for each in weights:
        check_weights(path, each, module.state_dict(), "give a checkpoint of this run")
    _check_rules(path, checkpoint["state_dict"], module)
    try:
        _check_callbacks(checkpoint, callbacks, module)
        _check_loops(checkpoint, trainer, callbacks, steps_per_epoch)
        plugin = trainer.precision_plugin
        if scaler := plugin.state_dict():
            name = type(plugin).__qualname__
            match(checkpoint.get(name), scaler, name)
        _check_optimizer(checkpoint, module, bool(scaler))
    except InputError as error:
        raise damaged(path, f"cannot be resumed from ({error})") from error


def _check_rules(path: str, given: Mapping[str, Any], module: Classifier) -> None:
    for name, graph in rankings(module):
        own, saved = type(graph.wiring), given.get(f"{name}.rule")
        if saved is not None and not has_hash(own, int(saved)):
            raise InputError(
                f"{path}: {graph.name} was trained with {saved_rule(int(saved))}, and cannot resume with "
                f"{wiring_name(own)!r}: give the same rule, by its previous name or as package.module.Class"
            )


def _check_callbacks(checkpoint: Mapping[str, Any], callbacks: Sequence[Callback], module: Classifier) -> None:
    graphs, given = neural_graphs(module.model), checkpoint.get("callbacks")
    like: dict[str, Any] = {each.state_key: each.state_dict() for each in callbacks if each.state_dict()}
    for each in callbacks:
        if isinstance(each, Checkpoints):
            like[each.state_key]["best_top1"] = float | None
        if isinstance(each, WiringMonitor):
            like[each.state_key] = {"initial": dict, "epoch_start": dict}
        # Older checkpoints have no recording, and no counts of parts and sparse layers.
        saved = given.get(each.state_key) if isinstance(given, dict) else None
        if isinstance(each, WiringRecorder) and isinstance(given, dict) and each.state_key in given:
            like[each.state_key] = {"recording": Tensor}
        if isinstance(each, TrainingCost) and isinstance(saved, dict):
            for name in {"parts", "sparse_layers"} - saved.keys():
                del like[each.state_key][name]
    match(given, like, "callbacks")
    for each in callbacks:
        if isinstance(each, WiringMonitor):
            for kind, edges in checkpoint["callbacks"][each.state_key].items():
                where = f"callbacks.{each.state_key}.{kind}"
                if kind == "initial" or edges:  # an epoch that has not begun has none
                    match(edges, dict.fromkeys(graphs, Tensor), where)
                for name, index in edges.items():
                    if not _ascending(index, graphs[name].num_candidates):
                        raise InputError(f"{where}.{name} is not an ascending list of candidates")
        if isinstance(each, WiringRecorder) and each.state_key in like:
            read(checkpoint["callbacks"][each.state_key]["recording"], module.model)
        if isinstance(each, TrainingCost) and checkpoint["callbacks"][each.state_key]["multiply_adds"] < 0:
            raise InputError(f"callbacks.{each.state_key}.multiply_adds is below 0")


def _ascending(index: Tensor, num_candidates: int) -> bool:
    if index.dim() != 1 or index.dtype != torch.int32:
        return False
    index = index.long()
    return bool((index.diff(prepend=index.new_tensor([-1]), append=index.new_tensor([num_candidates])) > 0).all())


def _check_loops(
    checkpoint: Mapping[str, Any], trainer: Trainer, callbacks: Sequence[Callback], steps_per_epoch: int
) -> None:
    steps = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    match(loop, trainer.fit_loop.state_dict(), "loops.fit_loop")
    complete = next(
        checkpoint["callbacks"][each.state_key]["epoch_complete"] for each in callbacks if isinstance(each, Checkpoints)
    )
    expected = loop_state(steps, steps_per_epoch, complete)
    done = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if {**loop, **expected} != loop or done != steps:
        raise InputError(f"loops.fit_loop is not that of step {steps}")


def _check_optimizer(checkpoint: Mapping[str, Any], module: Classifier, scaled: bool) -> None:
    optimizer = module.configure_optimizers()["optimizer"]
    match(checkpoint.get("optimizer_states"), [{"state": dict, "param_groups": list}], "optimizer_states")
    ((given,), state) = checkpoint["optimizer_states"], optimizer.state_dict()
    match(given["param_groups"], [dict] * len(state["param_groups"]), "optimizer_states.0.param_groups")
    pairs = zip(given["param_groups"], state["param_groups"], strict=True)
    groups = [{name: value for name, value in own.items() if name in (*GROUP, *saved)} for saved, own in pairs]
    match(given["param_groups"], groups, "optimizer_states.0.param_groups", exact=False)
    for number, (group, like) in enumerate(zip(given["param_groups"], groups, strict=True)):
        wrong = [name for name in GROUP if name in like and name != "lr" and group[name] != like[name]]
        if wrong:
            raise InputError(f"optimizer_states.0.param_groups.{number} has another {wrong[0]} than the run")
    # A parameter without a gradient so far has no state.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kind = type(optimizer)
    known = {n: _state_like(given["state"][n], each, kind) for n, each in enumerate(parameters) if n in given["state"]}
    match(given["state"], known, "optimizer_states.0.state")
    moved = checkpoint["global_step"] and module.momentum
    if kind is SGD and not scaled and bool(known) != bool(moved):  # a scaler may have skipped every step
        raise InputError(f"optimizer_states.0.state has the momentum of {len(known)} parameters")
    # The rest of a schedule is a function of the step, see Classifier.on_load_checkpoint.
    match(checkpoint.get("lr_schedulers"), [{"last_epoch": int}], "lr_schedulers", exact=False)
    if checkpoint["lr_schedulers"][0]["last_epoch"] != checkpoint["global_step"]:
        raise InputError(f"lr_schedulers.0.last_epoch is not step {checkpoint['global_step']}")


def _state_like(state: Any, parameter: Tensor, kind: type[Optimizer]) -> Any:
    """Return the expected structure of a parameter's state: tensors of its shape, and numbers."""
    if not isinstance(state, dict):
        return dict
    if kind is SGD:
        return {"momentum_buffer": parameter}
    if kind not in ELEMENTWISE:
        return state  # Of any structure.
    return {
        name: parameter if isinstance(value, Tensor) and value.dim() else type(value) for name, value in state.items()
    }


def start_from(
    model: nn.Module, create: Callable[[int, int], nn.Module], file: ModelFile, classes: Sequence[str]
) -> None:
    """Load the weights and the wiring of a trained model into a model; schedules of rules start anew.

    If the trained model has other classes, the parts whose size depends on their number, such as the classifier, are
    not loaded.

    Args:
        model: The model, changed in place.
        create: The function that creates both models; they have the same options.
        file: The trained model: a checkpoint, or a file of :func:`~dnw_graph.weights_file.save_weights`.
        classes: Classes of the run.

    Raises:
        InputError: If the file cannot be read, or holds another model.
    """
    if file.checkpoint is None and not is_weights_file(file.path):
        raise InputError(
            f"--init-from is {str(file.path)!r}: expected a checkpoint, the directory of a run, or a pretrained model"
        )
    weights, card = file.model(create).state_dict(), file.card
    if card.class_directories != list(classes):
        with torch.random.fork_rng(devices=[]):  # the run must draw the same random numbers afterwards
            other = create(len(card.classes) + 1, card.preprocess.image_size).state_dict()
        ranked = [weight.name for graph in weight_graphs(model).values() for weight in graph.weights]
        depth = _shared_depth([*weights, *ranked])
        sized = {name.split(".")[depth] for name, value in weights.items() if other[name].shape != value.shape}
        for graph in weight_graphs(model).values():
            layers = {weight.name.split(".")[depth] for weight in graph.weights}
            if len(layers) > 1 and layers & sized:
                raise InputError(
                    f"--init-from {str(file.path)!r} has other classes, but {graph.name} share one ranking with the "
                    "classifier: leave the classifier dense, or use another --distribution"
                )
        fresh = {name: value for name, value in model.state_dict().items() if name.split(".")[depth] in sized}
        weights = {**weights, **fresh}
    model.load_state_dict(weights)
    for _, ranking in rankings(model):
        ranking.wiring.step = 0  # Schedules are those of the new run.


def _shared_depth(names: Collection[str]) -> int:
    """Return how many modules lie around all parts of a model, such as the one of a wrapper's only attribute."""
    # A sparse weight counts as the parameter it was.
    paths = [name.partition(".parametrizations.")[0].split(".") for name in names]
    paths = [path if ".parametrizations." in name else path[:-1] for path, name in zip(paths, names, strict=True)]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return len(list(levels)) if len(paths) > 1 else 0
