"""Training of classifiers with Lightning: what the examples share. A training loop of your own needs none of it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnw_graph.checkpoint import read_checkpoint
    from dnw_graph.stopping import Stopped
    from dnw_graph.training.checkpoints import Checkpoints
    from dnw_graph.training.classifier import Classifier
    from dnw_graph.training.command_line import main
    from dnw_graph.training.data_module import DataModule
    from dnw_graph.training.images import ImageData, load_images
    from dnw_graph.training.models import register_models
    from dnw_graph.training.options import ModelOptions, RunOptions, option
    from dnw_graph.training.runs import run
    from dnw_graph.training.schedules import SCHEDULES, cosine, step
    from dnw_graph.training.summary import Summary
    from dnw_graph.training.training_cost import TrainingCost
    from dnw_graph.training.wiring_monitor import WiringMonitor
    from dnw_graph.training.wiring_options import WiringOptions
    from dnw_graph.training.wiring_recorder import WiringRecorder
    from dnw_graph.training.wiring_updates import WiringUpdates

# Where the public names are. They are imported when they are first used: help and files need no Lightning.
_HOMES = {
    "SCHEDULES": "training.schedules",
    "Checkpoints": "training.checkpoints",
    "Classifier": "training.classifier",
    "DataModule": "training.data_module",
    "ImageData": "training.images",
    "ModelOptions": "training.options",
    "RunOptions": "training.options",
    "Stopped": "stopping",
    "Summary": "training.summary",
    "TrainingCost": "training.training_cost",
    "WiringMonitor": "training.wiring_monitor",
    "WiringOptions": "training.wiring_options",
    "WiringRecorder": "training.wiring_recorder",
    "WiringUpdates": "training.wiring_updates",
    "cosine": "training.schedules",
    "load_images": "training.images",
    "main": "training.command_line",
    "option": "training.options",
    "read_checkpoint": "checkpoint",
    "register_models": "training.models",
    "run": "training.runs",
    "step": "training.schedules",
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
