"""Pictures of a run, for its directory and for TensorBoard and W&B."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from dnw_graph.visualize.evolution import gif, plot_evolution
from dnw_graph.visualize.graphs import plot
from dnw_graph.visualize.page import page
from dnw_graph.visualize.recording import Recording
from dnw_graph.visualize.training_curves import plot_training
from dnw_graph.whole_file import file_names, make_writable, write_whole

# Only this many graphs, the first ones, get their own pictures: a model with many sparse layers would have hundreds.
MOST_GRAPHS = 8


def draw_pictures(recording: Recording, metrics: Path | None = None) -> dict[str, bytes]:
    """Return the pictures of a run by file name.

    For each of the first 8 graphs: the wiring at the end (``<graph>-wiring.png``), how it changed
    (``<graph>-evolution.png``) and an animation (``<graph>.gif``). For all graphs: ``page.html``, and ``training.png``
    with the curves of the run.

    Args:
        recording: The recording.
        metrics: The table of the run, for its curves.
    """
    pictures: dict[str, bytes] = {"page.html": page(recording).encode()}
    if metrics is not None and metrics.exists():
        pictures["training.png"] = _png(plot_training(metrics))
    graphs = list(recording.graphs.values())[:MOST_GRAPHS]
    for graph, name in zip(graphs, file_names(graph.name for graph in graphs), strict=True):
        pictures[f"{name}-wiring.png"] = _png(plot(graph.to_data()).figure)
        pictures[f"{name}-evolution.png"] = _png(plot_evolution(graph))
        pictures[f"{name}.gif"] = gif(graph)
    return pictures


def write_pictures(pictures: dict[str, bytes], directory: Path) -> None:
    """Write pictures to a directory, which is created if necessary.

    Raises:
        InputError: If a file cannot be written.
    """
    make_writable(directory, "--output")
    for name, content in pictures.items():
        write_whole(directory / name, content, "--output")


def log_pictures(pictures: dict[str, bytes], loggers: Iterable[Logger], step: int) -> None:
    """Log pictures and animations to TensorBoard, and with the page to W&B.

    Other loggers are ignored.

    Args:
        pictures: The pictures by file name.
        loggers: The loggers of a trainer.
        step: The step of the pictures.
    """
    for logger in loggers:
        for name, content in pictures.items():
            title = f"wiring/{name.rpartition('.')[0]}"
            if isinstance(logger, TensorBoardLogger) and not name.endswith(".html"):
                _to_tensorboard(logger.experiment, title, content, step)
            if isinstance(logger, WandbLogger):
                _to_wandb(logger, title, name, content, step)
        logger.save()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _to_tensorboard(writer: Any, title: str, content: bytes, step: int) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    if getattr(image, "n_frames", 1) == 1:
        writer.add_image(title, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        return
    # TensorBoard shows encoded images as is; add_video would need moviepy and encode again.
    from tensorboard.compat.proto.summary_pb2 import Summary

    encoded = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=content)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=title, image=encoded)]), step)


def _to_wandb(logger: WandbLogger, title: str, name: str, content: bytes, step: int) -> None:
    from PIL import Image

    if name.endswith(".png"):
        logger.log_image(title, [Image.open(io.BytesIO(content))], step)
        return
    import wandb

    made = wandb.Html(content.decode()) if name.endswith(".html") else wandb.Video(io.BytesIO(content), format="gif")
    logger.log_metrics({title: made}, step)
