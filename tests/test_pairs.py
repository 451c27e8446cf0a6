from itertools import combinations, product

import pytest
from pairs import covering, every_pair


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2), (4, 1, 3, 2), (2, 4, 3, 2, 3, 2)])
def test_every_two_values_meet(sizes):
    rows = covering(sizes)
    assert len(set(rows)) == len(rows)
    for (i, first), (j, second) in combinations(enumerate(sizes), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(range(first), range(second)))


def test_the_rows_are_few():
    assert len(covering((2, 2, 2))) == 4
    assert len(covering((14, 4, 3))) == 14 * 4
    assert len(covering((2, 4, 3, 2, 3, 2))) <= 14


def test_the_rest_is_marked_or_left_out():
    settings = {"a": "xy", "b": [1, 2], "c": {"u": 0, "v": 0}}
    names, few = every_pair(**settings).args
    assert names == ("a", "b", "c")
    assert [row.values for row in few] == [("x", 1, "u"), ("x", 2, "v"), ("y", 1, "v"), ("y", 2, "u")]
    _, everything = every_pair(rest=pytest.mark.slow, **settings).args
    assert {row.values for row in everything} == set(product("xy", [1, 2], "uv"))
    assert [row.values for row in everything if not row.marks] == [row.values for row in few]
    assert {mark.name for row in everything for mark in row.marks} == {"slow"}
