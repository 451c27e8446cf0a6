"""Discovering neural wirings: graphs of single channels that learn which channels connect to which."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnw_graph.analysis.cost import cost
    from dnw_graph.candidates import CandidateEdges
    from dnw_graph.compaction import compact
    from dnw_graph.dynamics import Continuous, Discrete, Static
    from dnw_graph.errors import InputError
    from dnw_graph.loading import load
    from dnw_graph.models.pretrained import pretrained
    from dnw_graph.neural_graph import NeuralGraph
    from dnw_graph.ranking import wiring_penalty
    from dnw_graph.sparse_layers import sparsify
    from dnw_graph.updates import attach
    from dnw_graph.wirings import (
        ACDC,
        DNW,
        GMP,
        NM,
        SET,
        STR,
        Complete,
        FineTune,
        Fixed,
        L1Anneal,
        LotteryTicket,
        NoUpdate,
        RandomGraph,
        RigL,
        Schedule,
        SparseMomentum,
        TargetedDropout,
        TopKAST,
        View,
        Wiring,
        create_wiring,
        register_wiring,
    )

# The modules of the public names. Each is imported on first use, so that a program can handle Ctrl-C (see
# dnw_graph.stopping) before the seconds in which PyTorch is imported.
_HOMES = {
    "CandidateEdges": "candidates",
    "Continuous": "dynamics",
    "Discrete": "dynamics",
    "InputError": "errors",
    "NeuralGraph": "neural_graph",
    "Static": "dynamics",
    "attach": "updates",
    "compact": "compaction",
    "cost": "analysis.cost",
    "load": "loading",
    "pretrained": "models.pretrained",
    "sparsify": "sparse_layers",
    "wiring_penalty": "ranking",
}

__all__ = [
    "ACDC",
    "DNW",
    "GMP",
    "NM",
    "SET",
    "STR",
    "CandidateEdges",
    "Complete",
    "Continuous",
    "Discrete",
    "FineTune",
    "Fixed",
    "InputError",
    "L1Anneal",
    "LotteryTicket",
    "NeuralGraph",
    "NoUpdate",
    "RandomGraph",
    "RigL",
    "Schedule",
    "SparseMomentum",
    "Static",
    "TargetedDropout",
    "TopKAST",
    "View",
    "Wiring",
    "attach",
    "compact",
    "cost",
    "create_wiring",
    "load",
    "pretrained",
    "register_wiring",
    "sparsify",
    "wiring_penalty",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in {*_HOMES.values(), "wirings"} - {"analysis.cost", "models.pretrained"}:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'wirings')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
