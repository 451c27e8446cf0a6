"""Sparse momentum (Dettmers and Zettlemoyer 2019): sparse training that moves weights within and between layers."""

from dnw_graph.sparse_momentum.layers import momentum_layers
from dnw_graph.sparse_momentum.rounds import SparseMomentumRounds
from dnw_graph.sparse_momentum.rule import SparseMomentum

__all__ = ["SparseMomentum", "SparseMomentumRounds", "momentum_layers"]
