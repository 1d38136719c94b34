"""Several data sets in one order: shares exact in every epoch, nobody twice before all others, any ranks alike."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vab.data.reading.order import (
    apportion,
    earlier_draws,
    mixed_order,
    passes,
    permutation,
    steps_per_epoch,
    train_batches,
)

weights = st.lists(st.floats(0.01, 100) | st.integers(1, 9), min_size=1, max_size=4)
totals = st.integers(0, 300)
mixtures = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=4).filter(
    lambda sets: sum(count for _, count in sets)
)


@given(weights, totals)
def test_shares_are_whole_and_exact_to_a_record(weights, total):
    counts = apportion(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * Fraction(weight) / sum(map(Fraction, weights))) < 1


def test_shares_follow_the_largest_remainder():
    assert apportion([3, 1], 10) == (8, 2)
    assert apportion([1, 1, 1], 10) == (4, 3, 3)
    assert apportion([1, 2, 4], 10) == (1, 3, 6)
    assert apportion([1e308, 1e308], 4) == (2, 2)


@given(st.integers(0, 2**40), st.integers(0, 50), mixtures)
def test_every_epoch_has_the_shares(seed, epoch, mixture):
    sizes, counts = zip(*mixture, strict=True)
    order = mixed_order(seed, epoch, sizes, counts)
    assert order.dtype == np.int64
    ends = np.cumsum(sizes)
    assert ((order >= 0) & (order < ends[-1])).all()
    owners = np.searchsorted(ends, order, side="right")
    assert np.bincount(owners, minlength=len(sizes)).tolist() == list(counts)


@given(st.integers(0, 1000), mixtures, st.integers(0, 3), st.integers(1, 12))
def test_no_record_comes_again_before_all_others_of_its_data_set(seed, mixture, first, epochs):
    sizes, counts = zip(*mixture, strict=True)
    orders = [mixed_order(seed, epoch, sizes, counts) for epoch in range(first, first + epochs)]
    together = np.concatenate(orders)
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        its = together[(together >= start) & (together < start + size)] - start
        before = first * count  # how far it had come
        rest = its[-before % size :] if before else its
        assert len(set(its[: -before % size].tolist())) == len(its[: -before % size])
        for begin in range(0, len(rest), size):
            one_pass = rest[begin : begin + size].tolist()
            assert len(set(one_pass)) == len(one_pass)
        start += size


@given(st.integers(0, 2**40), st.integers(0, 20), st.integers(1, 200))
def test_a_mixture_of_one_is_the_permutation(seed, epoch, size):
    assert np.array_equal(mixed_order(seed, epoch, [size], [size]), permutation(seed, epoch, size))


def test_the_order_is_fixed_for_ever():
    assert mixed_order(0, 0, [4, 3], [3, 5]).tolist() == [0, 5, 1, 6, 4, 5, 4, 2]
    assert mixed_order(7, 2, [4, 3], [3, 5]).tolist() == [0, 5, 4, 1, 0, 6, 4, 5]


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 100))
def test_a_stretch_of_the_endless_way_is_a_slice_of_it(size, start, count):
    whole = np.concatenate([permutation(5, number, size, 4) for number in range((start + count) // size + 1)])
    assert np.array_equal(passes(5, size, start, count, 4), whole[start : start + count])


def test_data_sets_of_one_size_and_epochs_have_orders_of_their_own():
    sizes, counts = [500, 500, 500], [500, 500, 500]
    order = mixed_order(0, 0, sizes, counts)
    ways = [order[(order >= 500 * i) & (order < 500 * (i + 1))] - 500 * i for i in range(3)]
    ways += [order_1[order_1 < 500] for order_1 in [mixed_order(0, 1, sizes, counts), mixed_order(1, 0, sizes, counts)]]
    places = np.argsort(np.stack(ways), axis=1)
    # Standard deviation of each correlation: 1 / sqrt(499).
    assert np.abs(np.corrcoef(places) - np.eye(5)).max() < 0.2


@given(
    mixtures, st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.integers(1, 4), st.data()
)
def test_any_ranks_have_the_same_global_batches_and_go_on_where_others_stopped(
    mixture, batch, world, epoch, new_batch, new_world, data
):
    sizes, counts = zip(*mixture, strict=True)
    order = mixed_order(3, epoch, sizes, counts)

    def read(batch, world, consumed):
        ranks = [[s.numbers for s in train_batches(order, batch, world, rank, consumed)] for rank in range(world)]
        return [number for step in zip(*ranks, strict=True) for numbers in step for number in numbers.tolist()]

    assert read(batch, world, 0) == order[: len(order) // (batch * world) * batch * world].tolist()
    consumed = data.draw(st.integers(0, steps_per_epoch(len(order), batch, world))) * batch * world
    got = read(new_batch, new_world, consumed)
    assert got == order[consumed : consumed + len(got)].tolist()
    assert len(order) - consumed - len(got) < new_batch * new_world


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_draws_are_counted(order):
    seen = Counter()
    for number, earlier in zip(order, earlier_draws(np.array(order)).tolist(), strict=True):
        assert earlier == seen[number]
        seen[number] += 1


@pytest.mark.timeout(60)
def test_millions_of_records_and_very_small_data_sets_are_quick():
    order = mixed_order(0, 3, [1_900_000, 180_000], [1_500_000, 500_000])
    assert (order < 1_900_000).sum() == 1_500_000
    small = mixed_order(0, 3, [200_000, 10], [200_000, 50_000])
    assert np.bincount(small[small >= 200_000] - 200_000).tolist() == [5000] * 10
