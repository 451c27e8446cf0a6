"""Targeted weight dropout, unconstrained and regular."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph._compat import not_compiled
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import Block, CandidateEdges
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.seeding import mix
from dnw_graph.wirings.saved import refuse_counts
from dnw_graph.wirings.schedule import Schedule, Scheduled, as_schedule

VARIANTS = ("unconstrained", "regular")


class TargetedDropout(Scheduled):
    r"""Drops weak edges at random in training, and prunes them in evaluation (Gomez et al. 2019).

    TD in Section 3.3 and Appendix B of the paper. With n candidates and :math:`\gamma = 1 - k / n`, the *targets* are
    the γ n candidates of smallest |w|; in training each of them is dropped with probability ρ, in evaluation all are.
    What stays keeps its weight as it is, without a factor 1 / (1 - ρ); what is dropped gets no gradient in that step.

    - ``"unconstrained"``: the targets are the weakest of the whole graph; k edges stay.
    - ``"regular"``: the targets are the ⌊γ · fan-in⌋ weakest into each node, so that every node keeps some. The number
      of edges is the sum of what stays, somewhat more than k.

    The masks are a function of (seed, graph, step), the same on every rank. Every step of training waits for the
    device, to learn how many edges stay.

    Args:
        rho: ρ: a number in 0 … 1, ``"gamma"`` for ρ = γ, or a :class:`Schedule`.
        variant: ``"unconstrained"`` or ``"regular"``.
        seed: Seed of the masks. Default: that of PyTorch's generator when the graph is made.
        num_steps: See :class:`Scheduled`.

    Shapes:
        - ``stream``: scalar, made of the seed and the graph's name

    Raises:
        InputError: If ρ is no probability, the seed none, or the variant unknown; regular only: if the targets of two
            blocks of candidates overlap without being the same.
    """

    updates_hallucinated = False
    stream: Tensor

    @checked
    def __init__(
        self,
        rho: float | str | Schedule | Mapping[str, int | float | str] = 0.95,
        variant: str = "unconstrained",
        *,
        seed: int | None = None,
        num_steps: int | None = None,
    ) -> None:
        super().__init__(num_steps)
        if isinstance(rho, str) and rho != "gamma":
            raise InputError(f"rho must be a number in 0 … 1, 'gamma' or a schedule; got {rho!r}")
        self.rho = None if isinstance(rho, str) else as_schedule("rho", rho)
        if self.rho is not None and not (0 <= self.rho.start <= 1 and 0 <= self.rho.end <= 1):
            raise InputError(f"rho is a probability, 0 … 1; got {rho!r}")
        require(seed is None or seed >= 0, "seed", "an integer from 0 up", seed)
        if variant not in VARIANTS:
            raise unknown_name("variant of targeted dropout", variant, VARIANTS)
        self.variant = variant
        self.seed = seed
        # A buffer: DistributedDataParallel gives every rank that of the first.
        self.register_buffer("stream", torch.tensor(0))

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Fix the stream of masks of this graph."""
        super().setup(candidates, num_edges, name)
        seed = torch.initial_seed() if self.seed is None else self.seed
        self.stream.fill_(mix(seed, zlib.crc32(name.encode())) >> 1)
        self.groups = _by_target(candidates.blocks)
        if self.variant == "regular":
            _refuse_overlap(list(self.groups))

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return what stays after pruning: all but the targets."""
        if self.variant == "unconstrained":
            return self.largest(weight, num_edges, name)
        self.largest(weight, 1, name)  # refuses weights that are not finite
        return self._strongest_per_node(weight.detach().abs(), num_edges)

    @not_compiled  # would be compiled anew for every step
    def choose_to_train(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return what stays in this step: the strongest, and those targets that are not dropped."""
        self.begin_step(*([] if self.rho is None else [self.rho]))
        rho = 1 - num_edges / weight.numel() if self.rho is None else self.now(self.rho)
        generator = torch.Generator(weight.device).manual_seed(mix(int(self.stream), self.step))
        stays = torch.rand(weight.numel(), generator=generator, device=weight.device) >= rho
        stays[self.choose(weight, num_edges, name)] = True
        return torch.nonzero(stays).flatten()

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse a stream or counters that are no whole numbers."""
        super().check_saved(saved, num_candidates, num_edges, name)
        refuse_counts(saved, ("stream",), f"{name}: wiring")

    def _strongest_per_node(self, magnitude: Float[Tensor, " candidates"], num_edges: int) -> Int[Tensor, " edges"]:
        """Return, for every node, its edges but the ⌊γ · fan-in⌋ weakest, ties to the lower index."""
        candidates = magnitude.numel()
        stays = torch.zeros_like(magnitude, dtype=torch.bool)
        for blocks in self.groups.values():
            into = torch.cat([magnitude[block.flat].view(block.shape) for block in blocks], dim=1)
            fan_in = into.size(1)
            keep = fan_in - (candidates - num_edges) * fan_in // candidates
            weakest = into.topk(keep, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
            above, ties = into > weakest, into == weakest
            kept = above | (ties & (ties.cumsum(dim=1) <= keep - above.sum(dim=1, keepdim=True)))
            for block, part in zip(blocks, kept.split([block.shape[1] for block in blocks], dim=1), strict=True):
                stays[block.flat] = part.flatten()
        return torch.nonzero(stays).flatten()

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"rho={'gamma' if self.rho is None else self.rho}, variant={self.variant!r}"


def _by_target(blocks: tuple[Block, ...]) -> dict[range, list[Block]]:
    groups: dict[range, list[Block]] = {}
    for block in blocks:
        groups.setdefault(block.targets, []).append(block)
    return groups


def _refuse_overlap(targets: list[range]) -> None:
    ordered = sorted(targets, key=lambda nodes: nodes.start)
    for first, second in pairwise(ordered):
        if first.stop > second.start:
            raise InputError(
                f"regular targeted dropout ranks the candidates into each node: blocks with the targets {first} and "
                f"{second} must have the same targets or none in common"
            )
