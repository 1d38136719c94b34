"""Whether the order is a shuffle: no stripes, epochs that differ, and every pair of records meets as often as chance.

Seeds are fixed, so a test gives the same answer each time; limits are where chance alone would go once in 10,000 seeds.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from vab.data.reading.order import mixed_order, permutation, train_batches

RECORDS, EPOCHS = 64, 2000


def plain(epoch):
    return permutation(11, epoch, RECORDS)


def mixed(epoch):
    """Two data sets of 40 and 24, each whole in every epoch, so that the same is asked of it."""
    return mixed_order(11, epoch, [40, 24], [40, 24])


def continued(epoch):
    """A data set of which an epoch has half: what it is in the middle of a way through the records."""
    pair = [mixed_order(11, 2 * epoch + half, [RECORDS], [RECORDS // 2]) for half in (0, 1)]
    return np.concatenate(pair)


def limit(freedom):
    return chi2.ppf(1 - 1e-4, freedom)


@pytest.fixture(scope="module", params=[plain, mixed, continued], ids=lambda way: way.__name__)
def orders(request):
    """(EPOCHS, RECORDS)."""
    return np.stack([request.param(epoch) for epoch in range(EPOCHS)])


def test_every_record_is_as_often_at_every_place(orders):
    table = np.zeros((RECORDS, RECORDS))
    for place in range(RECORDS):
        table[place] = np.bincount(orders[:, place], minlength=RECORDS)
    expected = EPOCHS / RECORDS
    assert ((table - expected) ** 2 / expected).sum() < limit((RECORDS - 1) ** 2)


def test_every_pair_of_records_is_as_often_next_to_each_other(orders):
    pairs = np.bincount((orders[:, :-1] * RECORDS + orders[:, 1:]).ravel(), minlength=RECORDS**2)
    apart = pairs.reshape(RECORDS, RECORDS)[~np.eye(RECORDS, dtype=bool)]
    expected = EPOCHS / RECORDS  # EPOCHS * (RECORDS - 1) / (RECORDS * (RECORDS - 1))
    assert apart.sum() == EPOCHS * (RECORDS - 1)
    # The pairs of an epoch exclude each other, which makes the sum a little smaller than chi-squared, not larger.
    assert ((apart - expected) ** 2 / expected).sum() < limit(len(apart))
    assert apart.min() > 0


def test_every_pair_of_records_meets_in_a_batch(orders):
    size = 8
    batches = orders.reshape(EPOCHS * RECORDS // size, size)
    together = np.zeros((RECORDS, RECORDS))
    for first in range(size):
        for second in range(size):
            if first != second:
                np.add.at(together, (batches[:, first], batches[:, second]), 1)
    met = together[np.triu_indices(RECORDS, 1)]
    chance = (size - 1) / (RECORDS - 1)
    z = (met - EPOCHS * chance) / np.sqrt(EPOCHS * chance * (1 - chance))
    assert np.abs(z).max() < 5.2  # the largest of 2016 normal numbers: once in 2,500 seeds
    assert 0.8 < z.std() < 1.2


def test_there_are_no_stripes(orders):
    """Neighbours in the data set, which are often of one recording or one class, do not come in a row."""
    steps = np.diff(orders, axis=1)
    share = {step: (steps == step).mean() for step in (-2, -1, 1, 2)}
    for step, got in share.items():
        expected = (RECORDS - abs(step)) / (RECORDS * (RECORDS - 1))
        deviation = np.sqrt(expected / steps.size)
        assert abs(got - expected) < 4.5 * deviation, step
    # Nor are there slower trends: the correlation of a place with the one 1, 2, 4, ... later.
    centred = orders - (RECORDS - 1) / 2
    for lag in (1, 2, 4, 8, 16, 32):
        correlation = (centred[:, :-lag] * centred[:, lag:]).mean() / centred.var()
        expected = -1 / (RECORDS - 1)  # of drawing without replacement
        assert abs(correlation - expected) < 4.5 / np.sqrt(EPOCHS * (RECORDS - lag)), lag


def test_epochs_differ(orders):
    assert len(np.unique(orders, axis=0)) == EPOCHS
    fixed = (orders[1:] == orders[:-1]).sum(1)  # records at the same place as in the epoch before: Poisson of mean 1
    counts = np.bincount(np.minimum(fixed, 4), minlength=5)
    shares = np.exp(-1) * np.array([1, 1, 1 / 2, 1 / 6])
    expected = (EPOCHS - 1) * np.append(shares, 1 - shares.sum())
    assert ((counts - expected) ** 2 / expected).sum() < limit(4)


def test_ranks_do_not_keep_to_records_of_their_own():
    ranks, batch = 4, 4
    table = np.zeros((ranks, RECORDS))
    for epoch in range(EPOCHS):
        for rank in range(ranks):
            for share in train_batches(plain(epoch), batch, ranks, rank):
                table[rank] += np.bincount(share.numbers, minlength=RECORDS)
    expected = EPOCHS / ranks
    assert (table.sum(0) == EPOCHS).all()
    assert ((table - expected) ** 2 / expected).sum() < limit((ranks - 1) * RECORDS)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(2, 300))
def test_an_epoch_is_not_the_data_sets_own_order_nor_another_epochs(seed, epoch, count):
    order, following = permutation(seed, epoch, count), permutation(seed, epoch + 1, count)
    # Fixed points and successions are Poisson of mean 1 each: beyond 12 once in 10^10.
    assert (order == np.arange(count)).sum() <= 12 or count < 12
    assert (np.diff(order) == 1).sum() <= 12 or count < 12
    assert (order == following).sum() <= 12 or count < 12
