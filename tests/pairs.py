"""Parametrisations that cover every value, or every two values, of several settings without all combinations of all."""

from functools import partial
from itertools import combinations, product

import pytest


def all_values(sizes):
    """As many rows of indices below the sizes as the largest size: all columns go round side by side."""
    return [tuple(number % size for size in sizes) for number in range(max(sizes))]


def all_pairs_of_values(sizes):
    """Few rows of indices below the sizes, such that every two indices of different columns meet in a row.

    Greedily: of all rows the one in which most of them meet for the first time, the first one among equals.
    """
    rows = {row: set(combinations(enumerate(row), 2)) for row in product(*map(range, sizes))}
    missing = set().union(*rows.values())
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return sorted(chosen)


def _parametrize(choose, *, rest=None, indirect=(), **settings):
    values = [list(each) for each in settings.values()]
    sizes = list(map(len, values))
    few = choose(sizes)
    rows = product(*map(range, sizes)) if rest else few
    parameters = [pytest.param(*map(list.__getitem__, values, row), marks=() if row in few else rest) for row in rows]
    return pytest.mark.parametrize(tuple(settings), parameters, indirect=list(indirect))


def rest_is_slow(values, quick=1):
    """The values of ``pytest.mark.parametrize``, all but the first ones with the mark ``slow``."""
    values = list(values)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [*values[:quick], *(pytest.param(*row, marks=pytest.mark.slow) for row in rows[quick:])]


# Like ``pytest.mark.parametrize`` over all combinations of the settings ``name=values``, but with few of them. The
# others get the mark ``rest``; without it they are left out. ``indirect`` lists parameters of fixtures.
every_value = partial(_parametrize, all_values)
every_pair = partial(_parametrize, all_pairs_of_values)
