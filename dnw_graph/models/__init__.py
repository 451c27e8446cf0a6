"""The models of the paper, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.models.mobilenet import STAGES, GraphClassifier, MobileNetV1, MobileNetV1DNW, edges_at_width
from dnw_graph.models.pretrained import Pretrained, PretrainedModels, require_pretrained
from dnw_graph.models.tiny import TINY_DYNAMICS, TINY_NODE_FUNCTIONS, TinyClassifier
from dnw_graph.registry import build

__all__ = [
    "MODELS",
    "STAGES",
    "TINY_DYNAMICS",
    "TINY_NODE_FUNCTIONS",
    "GraphClassifier",
    "MobileNetV1",
    "MobileNetV1DNW",
    "Pretrained",
    "PretrainedModels",
    "TinyClassifier",
    "create_model",
    "edges_at_width",
    "mobilenet_v1",
    "mobilenet_v1_dnw",
    "model_names",
    "tiny_classifier",
]

mobilenet_v1 = MobileNetV1
mobilenet_v1_dnw = MobileNetV1DNW
tiny_classifier = TinyClassifier

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v1_dnw": mobilenet_v1_dnw,
    "tiny_classifier": tiny_classifier,
}


def model_names() -> list[str]:
    """Return the names of all models, for :func:`create_model`."""
    return sorted(MODELS)


@checked
def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Return a model by name.

    Args:
        name: One of :func:`model_names`. For a trained model, a name that :func:`dnw_graph.pretrained` lists, or the
            part before its dot, which stands for the first such model.
        pretrained: Return a trained model, as :func:`dnw_graph.load` does: in evaluation mode, with ``classes`` and
            ``preprocess``. The weights are in the package; nothing is downloaded. If you train it further,
            hallucinated edges start at 0.
        options: Arguments of the model. A trained model keeps the ones it was trained with.

    Raises:
        InputError: If the name or an option is unknown.
    """
    if pretrained:
        file = require_pretrained(name)
        if options:
            raise InputError(
                f"a pretrained {name} keeps the options it was trained with: leave out {', '.join(options)}; for other "
                "classes, replace its classifier or start a run with --init-from"
            )
        from dnw_graph.loading import load  # which makes models

        return load(file)
    return build("model", name, MODELS, options)
