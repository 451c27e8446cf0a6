"""The paper's ablation: top-k without the update rule."""

from __future__ import annotations

from dnw_graph.wirings.dnw import DNW


class NoUpdate(DNW):
    """The k candidates of largest |w| are real; hallucinated ones get no gradient.

    "No Update Rule" in Section 3.3 of the paper (arXiv 1906.00586): a hallucinated edge becomes real only when a real
    one has fallen below it. Its gradient is zero, so that momentum and weight decay still move its weight.
    """

    gradient = "real"
