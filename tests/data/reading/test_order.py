import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vab.data.reading.order import (
    evaluation_batches,
    evaluation_steps,
    permutation,
    steps_per_epoch,
    train_batches,
    weighted_draws,
)

counts = st.integers(1, 200)
sizes = st.integers(1, 9)
ranks = st.integers(1, 5)


def test_the_order_is_fixed_for_ever():
    # A resumed run must find the order that it was begun with, whatever numpy is installed by then.
    assert permutation(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(7, 3, 8).tolist() == [7, 1, 6, 0, 4, 2, 3, 5]


@given(st.integers(0, 2**40), st.integers(0, 1000), counts)
def test_an_epoch_has_every_record_once(seed, epoch, num_records):
    order = permutation(seed, epoch, num_records)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_records))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [permutation(seed, epoch, 1000) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    places = np.argsort(np.stack(orders), axis=1)
    # Spearman's correlation of any two orders; for independent ones its standard deviation is 1 / sqrt(999).
    correlation = np.corrcoef(places) - np.eye(4)
    assert np.abs(correlation).max() < 0.15


@given(counts, sizes, ranks, st.integers(0, 5))
def test_ranks_share_each_step_and_miss_only_what_makes_no_step(num_records, batch_size, world_size, epoch):
    steps = steps_per_epoch(num_records, batch_size, world_size)
    shares = [
        [share.numbers for share in train_batches(permutation(3, epoch, num_records), batch_size, world_size, rank)]
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {steps}
    assert all(len(numbers) == batch_size for share in shares for numbers in share)
    # Step by step, rank by rank, the shares are the permutation.
    in_order = [number for step in zip(*shares, strict=True) for numbers in step for number in numbers]
    assert in_order == permutation(3, epoch, num_records)[: steps * batch_size * world_size].tolist()
    assert 0 <= num_records - len(in_order) < batch_size * world_size


@given(counts, sizes, ranks, sizes, ranks, st.data())
def test_going_on_with_other_ranks_neither_loses_nor_repeats(num_records, batch, world, new_batch, new_world, data):
    done = data.draw(st.integers(0, steps_per_epoch(num_records, batch, world)))
    consumed = done * batch * world
    rest = [
        [share.numbers for share in train_batches(permutation(0, 1, num_records), new_batch, new_world, rank, consumed)]
        for rank in range(new_world)
    ]
    got = [number for step in zip(*rest, strict=True) for numbers in step for number in numbers]
    order = permutation(0, 1, num_records)
    assert got == order[consumed : consumed + len(got)].tolist()
    assert num_records - consumed - len(got) < new_batch * new_world


@given(counts, sizes, ranks)
def test_evaluation_has_every_record_once_and_ranks_in_step(num_records, batch_size, world_size):
    shares = [list(evaluation_batches(num_records, batch_size, world_size, rank)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {evaluation_steps(num_records, batch_size, world_size)}
    valid = []
    for step in zip(*shares, strict=True):
        assert len({len(share.numbers) for share in step}) == 1
        assert 1 <= len(step[0].numbers) <= batch_size
        assert all(share.numbers.min() >= 0 and share.numbers.max() < num_records for share in step)
        # One place to spare on a rank at most: the work is spread evenly.
        assert all(share.valid.sum() >= len(share.valid) - 1 for share in step)
        valid += [number for share in step for number in share.numbers[share.valid]]
    assert valid == list(range(num_records))


@pytest.mark.parametrize(("consumed", "left"), [(0, 5), (4, 4), (19, 0), (20, 0), (22, 0), (3, 4)])
def test_steps_left_in_an_epoch(consumed, left):
    assert steps_per_epoch(22, 2, 2, consumed) == left


def test_weighted_draws_are_the_same_again_and_bring_classes_up_equally_often():
    classes = np.repeat([0, 1, 2], [900, 90, 10])
    weights = 1.0 / np.bincount(classes)[classes]
    draws = weighted_draws(5, 2, weights)
    assert (draws == weighted_draws(5, 2, weights)).all()
    assert (draws != weighted_draws(5, 3, weights)).any()
    assert draws.shape == (1000,)
    counts = np.bincount(classes[np.concatenate([weighted_draws(5, epoch, weights) for epoch in range(20)])])
    # Chi-squared with 2 degrees of freedom: beyond 18.4 once in 10,000 seeds.
    assert ((counts - 20_000 / 3) ** 2 / (20_000 / 3)).sum() < 18.4


def test_a_record_without_weight_is_never_drawn():
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    draws = np.concatenate([weighted_draws(0, epoch, weights) for epoch in range(2000)])
    assert set(draws) == {1, 3}
    assert abs((draws == 3).mean() - 0.75) < 0.02
