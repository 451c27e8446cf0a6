"""``load``: a trained model from its file, ready to use."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnw_graph.arguments import checked, wrong
from dnw_graph.checkpoint import SECTION, check_weights, model_weights, read_checkpoint
from dnw_graph.errors import InputError
from dnw_graph.model_card import CARD_ENTRY, CARD_FILE, ModelCard

CHECKPOINTS = ("best.ckpt", "last.ckpt")
COMPACT = ".safetensors"
NUM_TRAIN_DIGITS = 1437


@checked
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    create: Callable[[int, int], nn.Module] | None = None,
) -> nn.Module:
    """Return a trained model, ready to use: in evaluation mode, with what turns an image into its input.

    Nothing in a file is executed: it names registered models, rules and functions only.

    Args:
        path: The folder of a run (its ``best.ckpt``, or else its ``last.ckpt``), a checkpoint, or a compact file (of
            :func:`~dnw_graph.compaction.save_compact`, or of ``--export`` to ``.safetensors``).
        device: Where the tensors go.
        create: For a checkpoint of a model that no registered options make: returns it for ``(num_classes,
            image_size)``.

    Returns:
        The model. Its attribute ``preprocess`` (:class:`~dnw_graph.preprocessing.Preprocessing`) makes an input of a
        PIL image or a tensor, ``classes`` names the logits, and ``card`` (:class:`~dnw_graph.model_card.ModelCard`)
        says how it was trained: options, metrics, versions. A compact file that was written from a model without a card
        has none of the three.

    Raises:
        InputError: If there is no such file, it is damaged, or names what is not registered in this process.

    """
    file = checkpoint_of(Path(path))
    if file.suffix == COMPACT:
        from dnw_graph.compaction import load_compact  # not needed for --help, and takes longest

        return load_compact(file, device)
    checkpoint = read_checkpoint(file)
    model = model_of(file, checkpoint, create)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise wrong("device", "a device of this machine, such as 'cpu' or 'cuda'", device) from error


def checkpoint_of(path: Path) -> Path:
    """Return the file that a path stands for: of a run's folder its best checkpoint, or else its last one.

    Raises:
        InputError: If there is none.
    """
    if os.path.isdir(path):
        found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
        if not found:
            raise InputError(f"{path} holds no {' and no '.join(CHECKPOINTS)}: give the folder of a run, or a file")
        return found[0]
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} does not exist: give a run's folder, a .ckpt or a .safetensors file")
    return path


def model_of(
    path: Path, checkpoint: dict[str, Any], create: Callable[[int, int], nn.Module] | None = None
) -> nn.Module:
    """Return the model of a checkpoint, described by its card.

    Args:
        path: The file, for messages.
        checkpoint: Its content.
        create: See :func:`load`.

    Raises:
        InputError: As :func:`load`.
    """
    from dnw_graph.training.models import options_from_file

    card = checkpoint_card(path, checkpoint)
    create = create or options_from_file(str(path), card.models, card.options).create
    with torch.random.fork_rng(devices=[]):  # the weights that are replaced draw nothing
        model = create(len(card.classes), card.preprocess.image_size)
    weights = model_weights(checkpoint)
    check_weights(str(path), weights, model.state_dict(), "give a checkpoint of this model")
    model.load_state_dict(weights)
    card.describe(model)
    return model.eval()


def read_card(path: Path) -> ModelCard:
    """Return the card of a checkpoint, a compact file or an export.

    Raises:
        InputError: If the file cannot be read, or has none.
    """
    if path.suffix == ".ckpt":
        return checkpoint_card(path, read_checkpoint(path))
    try:
        if path.suffix == COMPACT:
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                text = (file.metadata() or {})["card"]
        elif path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(
                    next(name for name in archive.namelist() if name.endswith(f"/{CARD_FILE}"))
                ).decode()
        else:
            import onnx

            entries = onnx.load(path, load_external_data=False).metadata_props
            text = next(entry.value for entry in entries if entry.key == CARD_ENTRY)
        return ModelCard.from_dict(json.loads(text))
    except ImportError as error:
        raise InputError(f"reading {path} needs {error.name}: install the extra dnw-graph[export]") from error
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        raise InputError(
            f"{path} has no card that can be read ({type(error).__name__}): give a checkpoint, or a file that was "
            "written from what dnw_graph.load returns"
        ) from error


def checkpoint_card(path: Path, checkpoint: dict[str, Any]) -> ModelCard:
    """Return the card of a checkpoint; for one that was written before there were cards, what its options tell.

    Raises:
        InputError: If it has none that can be read.
    """
    section = checkpoint[SECTION]
    if "card" in section:
        try:
            return ModelCard.from_dict(section["card"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    from dnw_graph.training.augmentation import transforms
    from dnw_graph.training.models import family_with

    options = dict(section["options"])
    classes, size = options.pop("classes", None), options.get("image_size")
    if not isinstance(classes, list) or not isinstance(size, int):
        raise InputError(f"{path} does not say its classes and image size: give a checkpoint of a run of this package")
    digits = classes == list("0123456789") and options.pop("train_images", 0) <= NUM_TRAIN_DIGITS
    preprocess = transforms("digits" if digits else "folder", size)[1]
    return ModelCard(preprocess, classes, family_with(options), options)
