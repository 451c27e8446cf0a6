"""``load``: a trained model from its file, ready to use."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnw_graph.arguments import checked, wrong
from dnw_graph.checkpoint import SECTION, check_weights, model_weights, read_checkpoint
from dnw_graph.errors import InputError
from dnw_graph.model_card import CARD_ENTRY, CARD_FILE, ModelCard
from dnw_graph.models.pretrained import pretrained_file

CHECKPOINTS = ("best.ckpt", "last.ckpt")
COMPACT = ".safetensors"
PROGRAMS = (".pt2", ".onnx")
NUM_TRAIN_DIGITS = 1437


@checked
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    create: Callable[[int, int], nn.Module] | None = None,
) -> nn.Module:
    """Return a trained model, ready to use: in evaluation mode, with its preprocessing.

    No code in a file is executed: files only name registered models, rules and functions.

    Args:
        path: The directory of a run (its ``best.ckpt``, or else its ``last.ckpt``), a checkpoint, a compact file (of
            :func:`~dnw_graph.compaction.save_compact`, or of ``--export`` to ``.safetensors``), a file of
            :func:`~dnw_graph.weights_file.save_weights`, or a name that :func:`dnw_graph.pretrained` lists.
        device: Device of the tensors. A compact file with sparse products is for CPUs; on a GPU,
            ``compact(…, products="dense")`` of the original model is faster.
        create: For a checkpoint of a model without registered options: a function ``(num_classes, image_size)`` that
            returns the model.

    Returns:
        The model. Its attribute ``preprocess`` (:class:`~dnw_graph.preprocessing.Preprocessing`) converts a PIL image
        or a tensor to an input, ``classes`` names the logits, and ``card`` (:class:`~dnw_graph.model_card.ModelCard`)
        describes its training: options, metrics, versions. A compact file that was written from a model without a card
        has none of the three.

    Raises:
        InputError: If the file does not exist, is damaged, or names something not registered in this process.

    """
    model = ModelFile(file_of(Path(path))).model(create)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise wrong("device", "a device of this machine, such as 'cpu' or 'cuda'", device) from error


def file_of(path: Path) -> Path:
    """Return the file for a path: for a run's directory its best checkpoint, or else its last one.

    A name means the file of a pretrained model, unless a file or directory of that name exists.

    Raises:
        InputError: If there is no such file.
    """
    if os.path.isdir(path):
        found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
        if not found:
            raise InputError(f"{path} holds no {' and no '.join(CHECKPOINTS)}: give the directory of a run, or a file")
        return found[0]
    if os.path.isfile(path):
        return path
    if (file := pretrained_file(str(path))) is None:
        raise InputError(
            f"{str(path)!r} does not exist: give a run's directory, a .ckpt or a .safetensors file, or the name of a "
            "pretrained model (dnw_graph.pretrained())"
        )
    return file


class ModelFile:
    """A checkpoint, compact file or export; a checkpoint is read only once.

    Args:
        path: The file.

    Attributes:
        checkpoint: The content of a checkpoint; None for other files.

    Raises:
        InputError: If a checkpoint cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = None if path.suffix in (COMPACT, *PROGRAMS) else read_checkpoint(path)

    @cached_property
    def card(self) -> ModelCard:
        """The card in the file.

        Raises:
            InputError: If the file cannot be read, or has no card.
        """
        if self.checkpoint is not None:
            return _checkpoint_card(self.path, self.checkpoint)
        try:
            return ModelCard.from_dict(json.loads(_CARDS[self.path.suffix](self.path)))
        except ImportError as error:
            raise InputError(f"reading {self.path} needs {error.name}: install the extra dnw-graph[export]") from error
        except Exception as error:  # a damaged file can fail anywhere in the decoder
            raise InputError(
                f"{self.path} has no card that can be read ({type(error).__name__}): give a checkpoint, or a file "
                "written from a model that dnw_graph.load returned"
            ) from error

    def model(self, create: Callable[[int, int], nn.Module] | None = None) -> nn.Module:
        """Return the model, see :func:`load`."""
        if self.path.suffix in PROGRAMS:
            raise InputError(
                f"{self.path} is an exported program, which load does not run: use dnw-graph predict, or load the "
                "checkpoint or .safetensors file of the same model"
            )
        checkpoint = self.checkpoint
        if checkpoint is None:
            # Not needed for --help, and the slowest import.
            from dnw_graph.compaction import load_compact
            from dnw_graph.weights_file import is_weights_file, read_weights

            if not is_weights_file(self.path):
                return load_compact(self.path)
            return self._made(create, read_weights(self.path))
        return self._made(create, lambda model: model_weights(checkpoint))

    def _made(
        self, create: Callable[[int, int], nn.Module] | None, weights_of: Callable[[nn.Module], dict[str, Any]]
    ) -> nn.Module:
        """Return the model that the card describes, with the weights that the file has for it."""
        from dnw_graph.recipes.models import options_from_file

        card = self.card
        create = create or options_from_file(str(self.path), card.models, card.options).create
        with torch.random.fork_rng(devices=[]):  # weights that are replaced draw no random numbers
            model = create(len(card.classes), card.preprocess.image_size)
        weights = weights_of(model)
        check_weights(str(self.path), weights, model.state_dict(), "give a checkpoint of this model")
        model.load_state_dict(weights)
        card.describe(model)
        return model.eval()


def _compact_card(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str((file.metadata() or {})["card"])


def _program_card(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(f"/{CARD_FILE}"))
        if entry.file_size > path.stat().st_size:
            raise InputError(f"{path} is not a file of this package: its card is larger than the file")
        return archive.read(entry)


def _onnx_card(path: Path) -> str:
    import onnx

    entries = onnx.load(path, load_external_data=False).metadata_props
    return str(next(entry.value for entry in entries if entry.key == CARD_ENTRY))


_CARDS: dict[str, Callable[[Path], str | bytes]] = {COMPACT: _compact_card, ".pt2": _program_card, ".onnx": _onnx_card}


def _checkpoint_card(path: Path, checkpoint: dict[str, Any]) -> ModelCard:
    """Return the card of a checkpoint; for one older than cards, from its options."""
    section = checkpoint[SECTION]
    if "card" in section:
        try:
            return ModelCard.from_dict(section["card"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    from dnw_graph.data.transforms import transforms
    from dnw_graph.recipes.models import family_with

    options = dict(section["options"])
    classes, size = options.pop("classes", None), options.get("image_size")
    if not isinstance(classes, list) or not isinstance(size, int):
        raise InputError(f"{path} lacks its classes and image size: give a checkpoint of a run of this package")
    digits = classes == list("0123456789") and options.pop("train_images", 0) <= NUM_TRAIN_DIGITS
    preprocess = transforms("digits" if digits else "directory", size)[1]
    return ModelCard(preprocess, classes, family_with(options), options)
