"""How many weights each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor

from dnw_graph.arguments import require
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.sparse_layers.layers import LayerWeight
from dnw_graph.wirings.proportion import allot

DISTRIBUTIONS = ("uniform", "erdos_renyi", "erdos_renyi_kernel", "global")


def kept(numel: int, density: float) -> int:
    """Return k = n - ⌊(1 - density) · n⌋, at least 1, exact for decimal densities."""
    return max(1, numel - floor((1 - Fraction(str(density))) * numel))


def check_density(what: str, density: float) -> None:
    """Refuse a density outside 0 … 1.

    Raises:
        InputError: If it is not above 0 and at most 1.
    """
    require(0 < density <= 1, what, "the share of weights to keep, above 0 and at most 1", density)


def edges_per_weight(
    weights: Sequence[LayerWeight], density: float, distribution: str | Mapping[str, float]
) -> list[int]:
    r"""Return how many real edges each weight gets.

    - ``"uniform"``: k = n - ⌊(1 - density) · n⌋ of n, for every weight tensor (Section 3.4 of the paper).
    - ``"erdos_renyi"``: the density of a layer is proportional to (inputs + outputs) / (inputs · outputs), counted in
      channels (Mocanu et al. 2018).
    - ``"erdos_renyi_kernel"``: the same with the sides of the kernel in both terms (Evci et al. 2020).
    - a mapping from name patterns to densities: the first matching pattern applies, or ``density`` if none matches.

    Erdős–Rényi densities are at most 1, and the total number of real weights is exactly that of ``"uniform"`` for all
    weights together.

    Args:
        weights: The weights.
        density: Share of weights to keep.
        distribution: The name or mapping.

    Raises:
        InputError: If a density is out of range, a name is unknown, a pattern matches nothing, or the budget is smaller
            than the number of layers.
    """
    check_density("density", density)
    if isinstance(distribution, Mapping):
        return _by_pattern(weights, density, distribution)
    if distribution not in DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, DISTRIBUTIONS)
    sizes = [weight.numel for weight in weights]
    if distribution in ("uniform", "global"):
        return [kept(size, density) for size in sizes]
    sides = [weight.shape if distribution == "erdos_renyi_kernel" else weight.shape[:2] for weight in weights]
    shares = [size * sum(side) / side.numel() for size, side in zip(sizes, sides, strict=True)]
    if (total := kept(sum(sizes), density)) < len(sizes):
        raise InputError(f"the density leaves {total} weights for {len(sizes)} layers: give a larger density")
    return allot(total, shares, [(1, size) for size in sizes])


def _by_pattern(weights: Sequence[LayerWeight], density: float, densities: Mapping[str, float]) -> list[int]:
    names = [name for weight in weights for name in weight.names]
    for pattern, value in densities.items():
        check_density(f"the density of {pattern!r}", value)
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown_name("weight in distribution", pattern, names)

    def density_of(weight: LayerWeight) -> float:
        matching = (d for pattern, d in densities.items() if any(fnmatchcase(name, pattern) for name in weight.names))
        return next(matching, density)

    return [kept(weight.numel, density_of(weight)) for weight in weights]
