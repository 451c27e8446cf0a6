"""Loads models from, and uploads them to, the Hugging Face hub (needs the extra ``dnw-graph[hub]``).

Only :func:`from_pretrained` and :func:`push_to_hub` use the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from dnw_graph._compat import unwrapped
from dnw_graph.arguments import checked
from dnw_graph.compaction import CompactModel, save_compact
from dnw_graph.errors import InputError
from dnw_graph.loading import load
from dnw_graph.model_card import ModelCard, card_of
from dnw_graph.weights_file import save_weights

try:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
except ImportError as error:
    raise InputError("dnw_graph.hub needs huggingface_hub: install the extra dnw-graph[hub]") from error

# Errors of the HTTP client, of which huggingface_hub's are kinds, of its checks, and of the system.
FAILURES: Any = (*HfHubHTTPError.__bases__, EntryNotFoundError, HFValidationError, OSError)
FILE = "model.safetensors"
ABOUT: dict[str, Any] = {
    "library_name": "dnw_graph",
    "pipeline_tag": "image-classification",
    "tags": ["dnw", "discovering-neural-wirings", "sparse"],
}


class HubModel(huggingface_hub.ModelHubMixin):
    """A model with the methods of huggingface_hub's mixin: ``save_pretrained``, ``push_to_hub``, ``from_pretrained``.

    Args:
        model: A model that :func:`dnw_graph.load` returned, or its compact form.
    """

    @checked
    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)

    def _save_pretrained(self, save_directory: Path) -> None:
        save = save_compact if isinstance(self.model, CompactModel) else save_weights
        save(self.model, save_directory / FILE)
        # The mixin would keep the page of an earlier model.
        self.generate_model_card().save(save_directory / "README.md")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        if os.path.isdir(model_id):
            return cls(load(Path(model_id) / FILE))
        try:
            return cls(load(huggingface_hub.hf_hub_download(model_id, FILE, **options)))
        except FAILURES as error:
            message = f"{model_id!r} is not a directory, and no repository on the hub with {FILE} ({_reason(error)})"
            raise InputError(message) from error

    def generate_model_card(self, *args: Any, **kwargs: Any) -> huggingface_hub.ModelCard:
        """Return the page on the hub: how to use the model, and how it was trained."""
        data = huggingface_hub.ModelCardData(**ABOUT)
        return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n{_text(card_of(self.model))}")


@checked
def from_pretrained(name: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Return a model from the hub, like :func:`dnw_graph.load` from a file. No code in it is executed.

    Args:
        name: A repository, such as ``"user/model"``, or a directory written by :func:`save_pretrained`.
        options: Options of huggingface_hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, …

    Raises:
        InputError: If there is no such model, or its file cannot be read.
    """
    # Not the mixin's method: it looks for a configuration first, which fails without a network.
    return HubModel._from_pretrained(model_id=str(name), **options).model


@checked
def push_to_hub(model: nn.Module, name: str, **options: Any) -> str:
    """Upload a model with its card to a repository on the hub, and return the URL.

    Args:
        model: A model that :func:`dnw_graph.load` returned, perhaps trained further, or its compact form.
        name: The repository, such as ``"user/model"``. It is created if necessary.
        options: Options of huggingface_hub: ``private``, ``token``, ``branch``, ``commit_message``, …

    Raises:
        InputError: If the model cannot be written, or the hub refuses it.
    """
    hub_model = HubModel(model)
    with TemporaryDirectory() as directory:  # The hub would create the repository before the model is refused.
        hub_model.save_pretrained(Path(directory))
    try:
        return str(hub_model.push_to_hub(name, **options))
    except FAILURES as error:
        raise InputError(f"{name!r} cannot be uploaded ({_reason(error)})") from error


@checked
def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write to a directory what :func:`push_to_hub` would upload.

    Args:
        model: A model that :func:`dnw_graph.load` returned, perhaps trained further, or its compact form.
        directory: The directory; it is created if necessary.

    Raises:
        InputError: If the model cannot be written.
    """
    try:
        HubModel(model).save_pretrained(Path(directory))
    except OSError as error:
        raise InputError(f"cannot write {directory} ({error.strerror}): give another directory") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _text(card: ModelCard | None) -> str:
    lines = ["", "# A model with discovered neural wirings", ""]
    lines += ["```python", "from dnw_graph.hub import from_pretrained", "", 'model = from_pretrained("user/model")']
    lines += ["logits = model(model.preprocess(image).unsqueeze(0))", "```", ""]
    if card is None:
        return "\n".join(lines)
    size = card.preprocess.image_size
    lines += [f"Images of {size} × {size} pixels; {len(card.classes)} classes: {', '.join(card.classes[:20])}"]
    lines[-1] += ", …" if len(card.classes) > 20 else "."
    for title, values in (("Metrics", card.metrics), ("Training options", card.options)):
        lines += ["", f"## {title}", "", "| name | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join([*lines, ""])
