"""Training of classifiers with Lightning: what the examples share. A training loop of your own needs none of it."""

from dnw_graph.stopping import Stopped
from dnw_graph.training.checkpoint_io import read_checkpoint
from dnw_graph.training.checkpoints import Checkpoints
from dnw_graph.training.classifier import Classifier
from dnw_graph.training.command_line import main
from dnw_graph.training.data_module import DataModule
from dnw_graph.training.images import ImageData, load_images
from dnw_graph.training.options import ModelOptions, RunOptions, option
from dnw_graph.training.run import run
from dnw_graph.training.schedules import SCHEDULES, cosine, step
from dnw_graph.training.summary import Summary
from dnw_graph.training.training_cost import TrainingCost
from dnw_graph.training.wiring_monitor import WiringMonitor
from dnw_graph.training.wiring_options import WiringOptions
from dnw_graph.training.wiring_recorder import WiringRecorder
from dnw_graph.training.wiring_updates import WiringUpdates

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
    "run",
    "step",
]
