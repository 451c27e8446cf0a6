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

# Modules of the public names, imported on first use: help and files need no Lightning.
_HOMES = {
    "Checkpoints": "training.checkpoints",
    "Classifier": "training.classifier",
    "DataModule": "training.data_module",
    "ImageData": "data.sources",
    "ModelOptions": "recipes.options",
    "RunOptions": "recipes.options",
    "SCHEDULES": "recipes.schedules",
    "Stopped": "stopping",
    "Summary": "training.summary",
    "TrainingCost": "callbacks.training_cost",
    "WiringMonitor": "callbacks.wiring_monitor",
    "WiringOptions": "recipes.models",
    "WiringRecorder": "callbacks.wiring_recorder",
    "WiringUpdates": "callbacks.wiring_updates",
    "cosine": "recipes.schedules",
    "load_images": "data.sources",
    "main": "training.command_line",
    "option": "recipes.options",
    "read_checkpoint": "checkpoint",
    "register_models": "recipes.models",
    "run": "training.runs",
    "step": "recipes.schedules",
}

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
