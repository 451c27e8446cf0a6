"""Discovering neural wirings: graphs of single channels that learn which channels connect to which."""

from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics import Continuous, Discrete, Static
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph, wiring_penalty
from dnw_graph.wirings import (
    DNW,
    Complete,
    FineTune,
    Fixed,
    L1Anneal,
    LotteryTicket,
    NoUpdate,
    RandomGraph,
    Schedule,
    TargetedDropout,
    Wiring,
    create_wiring,
)

__all__ = [
    "DNW",
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
    "Schedule",
    "Static",
    "TargetedDropout",
    "Wiring",
    "create_wiring",
    "wiring_penalty",
]
__version__ = "0.1.0"
