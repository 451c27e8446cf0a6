"""Randomly wired graphs: the paper's primary baseline, RG."""

from __future__ import annotations

import torch

from dnw_graph.arguments import checked
from dnw_graph.selection import select_top_k
from dnw_graph.wirings.stored_edges import ConstantEdges
from dnw_graph.wirings.view import View


class RandomGraph(ConstantEdges):
    """The k edges of largest |initial weight|, ties drawn at random, fixed; only they get a gradient.

    Section 3 of the paper, after Xie et al. 2019 (arXiv 1904.01569). The edges are a persistent buffer: they are not a
    function of the trained weights.

    The edges are random because the initial weights are. Of trained weights, as of a pretrained model or of a trained
    graph after ``rewire`` or ``load_weights``, the rule keeps the strongest, which is one-shot magnitude pruning:
    random edges need ``separate_scores=True`` there.

    Args:
        separate_scores: Draw the edges by separate random scores instead of the initial weights, so that the choice is
            random whatever the weights, and those of the chosen edges keep their distribution.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending

    Raises:
        InputError: If ``separate_scores`` is not a boolean.
    """

    @checked
    def __init__(self, separate_scores: bool = False) -> None:
        super().__init__()
        self.separate_scores = separate_scores

    def setup(self, view: View) -> None:
        """Draw the edges of a graph."""
        scores = view.random_scores() if self.separate_scores else view.weight
        # Ties are drawn: the first weights of a layer that starts from zeros belong to few targets.
        generator = None if scores.is_meta else view.generator()
        order = torch.randperm(len(scores), generator=generator, device=scores.device)
        self.store(order[select_top_k(scores[order], view.k, view.name)].sort().values)
