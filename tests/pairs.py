"""Tests over several settings in which every two values meet, without all combinations of all settings."""

from itertools import combinations, product

import pytest


def covering(sizes):
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


def every_pair(*, rest=None, indirect=(), **settings):
    """Like ``pytest.mark.parametrize`` over all combinations, of which a few are run that cover every pair of values.

    Args:
        rest: The mark of the other combinations, ``pytest.mark.slow``; without one they are left out.
        indirect: Settings that are parameters of a fixture.
        **settings: The values of each setting.
    """
    values = [list(each) for each in settings.values()]
    sizes = list(map(len, values))
    few = covering(sizes)
    rows = product(*map(range, sizes)) if rest else few
    parameters = [pytest.param(*map(list.__getitem__, values, row), marks=() if row in few else rest) for row in rows]
    return pytest.mark.parametrize(tuple(settings), parameters, indirect=list(indirect))
