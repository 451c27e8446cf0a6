from __future__ import annotations

from itertools import product

import pytest

from dnw_graph.data.order import EvaluationOrder, Purpose, TrainOrder
from dnw_graph.seeding import mix


def epoch_of(steps: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> list[list[tuple[int, int]]]:
    return list(TrainOrder(23, 4, seed, lambda: steps, rank, world_size))


def test_an_epoch_visits_each_sample_at_most_once_and_drops_the_rest():
    batches = epoch_of(0)
    indices = [index for batch in batches for _, index in batch]
    assert len(batches) == 5
    assert len(set(indices)) == 20
    assert set(indices) <= set(range(23))
    assert all(epoch == 0 for batch in batches for epoch, _ in batch)


def test_order_depends_on_seed_and_epoch_alone():
    assert epoch_of(0) == epoch_of(0)
    assert epoch_of(0) != epoch_of(0, seed=1)
    first, second = ([index for batch in epoch_of(steps) for _, index in batch] for steps in (0, 5))
    assert first != second


@pytest.mark.parametrize("steps", range(12))
def test_iteration_goes_on_where_training_stands(steps: int):
    whole = epoch_of(0) + epoch_of(5) + epoch_of(10)
    assert epoch_of(steps) == whole[steps : (steps // 5 + 1) * 5]


def test_ranks_share_each_batch():
    parts = [epoch_of(2, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == epoch_of(2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_visits_each_sample_once_in_equally_many_batches(world_size: int):
    # At least a sample for every rank: DataModule refuses fewer.
    for num_samples, batch_size in product([*range(world_size, 40), 100, 101], [1, 2, 3, 32]):
        ranks = [list(EvaluationOrder(num_samples, batch_size, rank, world_size)) for rank in range(world_size)]
        assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(num_samples))
        assert len({len(rank) for rank in ranks}) == 1
        assert len(ranks[0]) == len(EvaluationOrder(num_samples, batch_size, 0, world_size))
        assert all(1 <= len(batch) <= max(batch_size, 2) for rank in ranks for batch in rank)


def test_mix_keeps_purposes_and_positions_apart():
    seeds = [mix(s, p, a, b) for s in range(3) for p in Purpose for a in range(5) for b in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
