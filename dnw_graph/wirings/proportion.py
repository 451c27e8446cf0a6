"""Integers in proportion to shares."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor


def allot(total: int, shares: Sequence[float], bounds: Sequence[tuple[int, int]]) -> list[int]:
    """Return integers in proportion to shares, each within its bounds, with a given total.

    A part that would leave its bounds stays at the bound; the others divide the rest in proportion to their shares.
    Fractions go to the largest remainders, ties to the earlier one. If all shares are 0, all are equal.

    Args:
        total: The sum, between the sums of the lower and of the upper bounds.
        shares: Shares, 0 or more.
        bounds: Smallest and largest number of each.
    """
    fixed: dict[int, int] = {}
    while True:
        parts = {i: Fraction(share) for i, share in enumerate(shares) if i not in fixed}
        if not any(parts.values()):
            parts = dict.fromkeys(parts, Fraction(1))
        rest = total - sum(fixed.values())
        exact = {i: rest * part / sum(parts.values()) for i, part in parts.items()}
        below = {i: bounds[i][0] for i in exact if exact[i] < bounds[i][0]}
        above = {i: bounds[i][1] for i in exact if exact[i] > bounds[i][1]}
        # Fixing these makes the parts of the others smaller or larger.
        excess = sum(exact[i] - bound for i, bound in (below | above).items())
        leaving = below | above if not excess else above if excess > 0 else below
        if not leaving:
            break
        fixed |= leaving
    numbers = fixed | {i: floor(part) for i, part in exact.items()}
    remainders = sorted(exact, key=lambda i: numbers[i] - exact[i])
    for i in remainders[: total - sum(numbers.values())]:
        numbers[i] += 1
    return [numbers[i] for i in range(len(shares))]
