"""Which record is read when, as pure functions of seed, epoch, position, number of ranks and rank.

Training: one permutation of all records per epoch. Global batch t is the slice of it that begins at
t * batch_size * world_size, and rank r reads the r-th ``batch_size`` records of the slice. A run can resume at any
position of the epoch without reading the earlier records again, also with another number of ranks.

Several data sets: each gives a fixed number of records to every epoch. Each data set's own permutations follow one
another across epochs, so that no record is repeated before all others have been read. A permutation of the epoch
decides at which positions each data set gives its next record.

Class-balanced training: the epoch's order is drawn with replacement, by weight.

Evaluation: each record once, in the order of the data set, with the same number of steps on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Purpose of the random numbers, the third number after seed and epoch; a permutation of all records has none. Changing
# a value changes the orders. Never 0: numpy pads seeds with zeros, so that [seed, epoch, 0] equals [seed, epoch].
_DRAWS, _PLACES, CHANGES, _DATA_SETS = 1, 2, 3, 4


class Changes(NamedTuple):
    """How the records of a share are augmented (``vab.data.reading.augment``)."""

    spliced: np.ndarray
    """(B,) bool: whether another record replaces it from second ``cuts`` on."""
    partners: np.ndarray
    """(B,) int64: number of the other record."""
    cuts: np.ndarray
    """(B,) int64, seconds."""
    shifts: np.ndarray
    """(B,) int64: seconds by which it is shifted, its end wrapping around to its start; 0 for no shift."""


class Share(NamedTuple):
    """What one rank reads for one step."""

    numbers: np.ndarray
    """(B,) int64 record numbers."""
    valid: np.ndarray
    """(B,) bool: False for padding that gives all ranks equally many records; it must not be scored."""
    draws: np.ndarray | None = None
    """(B,) int64: how often each was drawn before in the epoch; None if no record is repeated."""
    changes: Changes | None = None
    """None if nothing is augmented."""


def permutation(seed: int, epoch: int, num_records: int, stream: int | None = None) -> np.ndarray:
    """The order of all records in one epoch, the same on every machine and with every version of numpy.

    It sorts raw generator output, which numpy keeps fixed across versions; numpy's own ``permutation`` may change.

    Args:
        seed: Seed of the run, 0 or more.
        epoch: From 0.
        num_records: Records in the data set.
        stream: 1 or more; permutations of different streams are independent.

    Returns:
        (num_records,) int64.
    """
    entropy = [seed, epoch] if stream is None else [seed, epoch, stream]
    generator = np.random.Philox(np.random.SeedSequence(entropy))
    return np.argsort(generator.random_raw(num_records), kind="stable")


def passes(seed: int, num_records: int, start: int, count: int, stream: int | None = None) -> np.ndarray:
    """A slice of the endless sequence of a data set's permutations, one after the other.

    Args:
        seed: Seed of the run, 0 or more.
        num_records: Records in the data set.
        start: Position in the sequence.
        count: Length of the slice.
        stream: As in ``permutation``, whose epochs are these passes.

    Returns:
        (count,) int64.
    """
    first, end = start // num_records, -(-(start + count) // num_records)
    whole = [permutation(seed, number, num_records, stream) for number in range(first, end)]
    return np.concatenate([np.empty(0, np.int64), *whole])[start - first * num_records :][:count]


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Integers that add up to ``total`` in proportion to ``weights``, by the largest-remainder method.

    Args:
        weights: Above 0; only their ratios count.
        total: 0 or more.

    Returns:
        For each weight its share, rounded down or up. Of equal remainders the first is rounded up.
    """
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda number: counts[number] - quotas[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return tuple(counts)


def mixed_order(seed: int, epoch: int, sizes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The order of one epoch of several data sets. For a single one, read whole, it equals ``permutation``.

    Args:
        seed: Seed of the run, 0 or more.
        epoch: From 0.
        sizes: Records of each data set. Record numbers are consecutive: those of the second follow the first's.
        counts: Records that each gives to every epoch, 0 or more.

    Returns:
        (sum of counts,) int64.
    """
    if len(sizes) == 1:
        return passes(seed, sizes[0], epoch * counts[0], counts[0])
    giver = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    giver = giver[permutation(seed, epoch, len(giver), _PLACES)]
    order = np.empty(len(giver), dtype=np.int64)
    first = 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        # Each data set keeps the order of its own permutations.
        order[giver == number] = first + passes(seed, size, epoch * count, count, _DATA_SETS + number)
        first += size
    return order


def earlier_draws(order: np.ndarray) -> np.ndarray:
    """How often each record of an epoch was read before in the same epoch.

    Args:
        order: (n,) int64.

    Returns:
        (n,) int64.
    """
    by_record = np.argsort(order, kind="stable")
    records = order[by_record]
    begins = np.flatnonzero(np.diff(records, prepend=records[:1] - 1))  # of the run of each record
    lengths = np.diff(begins, append=len(records))
    earlier = np.empty_like(order)
    earlier[by_record] = np.arange(len(order)) - np.repeat(begins, lengths)
    return earlier


def weighted_draws(seed: int, epoch: int, weights: np.ndarray, count: int | None = None) -> np.ndarray:
    """Records drawn with replacement by weight: one epoch of a class-balanced order.

    The same on every machine: it compares raw generator output with cumulative sums.

    Args:
        seed: Seed of the run, 0 or more.
        epoch: From 0.
        weights: (num_records,) float64, 0 or more, not all 0. A record's probability is its share of the sum.
        count: Number of draws; default: ``num_records``.

    Returns:
        (count,) int64.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch, _DRAWS]))
    share = (generator.random_raw(len(weights) if count is None else count) >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53  # [0, 1)
    ends = np.cumsum(weights)
    return np.searchsorted(ends, share * ends[-1], side="right").clip(max=len(weights) - 1).astype(np.int64)


def steps_per_epoch(num_records: int, batch_size: int, world_size: int, consumed: int = 0) -> int:
    """Steps left in an epoch after ``consumed`` records.

    A step reads ``batch_size * world_size`` records. If fewer are left at the end, they are not read in this epoch;
    which ones differs from epoch to epoch.

    Args:
        num_records: Records in an epoch.
        batch_size: Records per rank and step.
        world_size: Number of ranks.
        consumed: Records of this epoch that all ranks together have read.
    """
    return max(0, num_records - consumed) // (batch_size * world_size)


def train_batches(order: np.ndarray, batch_size: int, world_size: int, rank: int, consumed: int = 0) -> Iterator[Share]:
    """One rank's batches for the rest of an epoch.

    Args:
        order: (num_records,) int64 from ``mixed_order`` or ``weighted_draws``.
        batch_size: Records per rank and step.
        world_size: Number of ranks.
        rank: 0 to ``world_size - 1``.
        consumed: Records of this epoch that all ranks together have read; any number.

    Yields:
        ``steps_per_epoch`` shares of ``batch_size``, all valid.
    """
    valid = np.ones(batch_size, dtype=bool)
    for step in range(steps_per_epoch(len(order), batch_size, world_size, consumed)):
        start = consumed + (step * world_size + rank) * batch_size
        yield Share(order[start : start + batch_size], valid)


def evaluation_steps(num_records: int, batch_size: int, world_size: int) -> int:
    """Steps on every rank to score ``num_records`` once: rounded up."""
    return -(-num_records // (batch_size * world_size))


def evaluation_batches(num_records: int, batch_size: int, world_size: int, rank: int) -> Iterator[Share]:
    """One rank's batches of an evaluation in which all ranks together read each record exactly once.

    All ranks have the same number of steps and, at each step, equally many records. In the last step the remaining
    records are spread evenly; a rank with one fewer is padded with the last record, marked not valid. Step by step,
    the valid records of rank 0, 1, ... are the data set in order.

    Args:
        num_records: Records 0 to ``num_records - 1`` are read.
        batch_size: Maximum of records per rank and step.
        world_size: Number of ranks.
        rank: 0 to ``world_size - 1``.
    """
    for step in range(evaluation_steps(num_records, batch_size, world_size)):
        start = step * batch_size * world_size
        left = np.arange(start, min(start + batch_size * world_size, num_records), dtype=np.int64)
        shares = np.array_split(left, world_size)  # the first ranks get one more
        valid = np.arange(len(shares[0])) < len(shares[rank])
        numbers = np.full(len(valid), num_records - 1, dtype=np.int64)
        numbers[valid] = shares[rank]
        yield Share(numbers, valid)


def spread_evenly(count: int, total: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
