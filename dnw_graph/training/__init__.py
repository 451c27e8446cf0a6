"""Training of classifiers with Lightning, shared by the examples. Your own training loop does not need it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnw_graph.callbacks.training_cost import TrainingCost
    from dnw_graph.callbacks.wiring_monitor import WiringMonitor
    from dnw_graph.callbacks.wiring_recorder import WiringRecorder
    from dnw_graph.callbacks.wiring_updates import WiringUpdates
    from dnw_graph.checkpoint import read_checkpoint
    from dnw_graph.data.sources import ImageData, load_images
    from dnw_graph.recipes.models import WiringOptions, register_models
    from dnw_graph.recipes.options import ModelOptions, RunOptions, option
    from dnw_graph.recipes.schedules import SCHEDULES, cosine, step
    from dnw_graph.stopping import Stopped
    from dnw_graph.training.checkpoints import Checkpoints
    from dnw_graph.training.classifier import Classifier
    from dnw_graph.training.command_line import main
    from dnw_graph.training.data_module import DataModule
    from dnw_graph.training.runs import run
    from dnw_graph.training.summary import Summary

# Public names by module, imported on first use: help and files need no Lightning.
_NAMES = {
    "callbacks.training_cost": "TrainingCost",
    "callbacks.wiring_monitor": "WiringMonitor",
    "callbacks.wiring_recorder": "WiringRecorder",
    "callbacks.wiring_updates": "WiringUpdates",
    "checkpoint": "read_checkpoint",
    "data.sources": "ImageData load_images",
    "recipes.models": "WiringOptions register_models",
    "recipes.options": "ModelOptions RunOptions option",
    "recipes.schedules": "SCHEDULES cosine step",
    "stopping": "Stopped",
    "training.checkpoints": "Checkpoints",
    "training.classifier": "Classifier",
    "training.command_line": "main",
    "training.data_module": "DataModule",
    "training.runs": "run",
    "training.summary": "Summary",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "SCHEDULES",
    "Checkpoints",
    "Classifier",
    "DataModule",
    "ImageData",
    "ModelOptions",
    "RunOptions",
    "Stopped",
    "Summary",
    "TrainingCost",
    "WiringMonitor",
    "WiringOptions",
    "WiringRecorder",
    "WiringUpdates",
    "cosine",
    "load_images",
    "main",
    "option",
    "read_checkpoint",
    "register_models",
    "run",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"dnw_graph.{_HOMES[name]}"), name)
    return value
