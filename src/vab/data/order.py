"""Which record is read when, as pure functions: of seed, epoch, position, number of ranks and rank.

Training: one permutation of all records per epoch; global batch t is the slice of it from t * batch_size * world_size
on, and rank r takes the r-th ``batch_size`` of the slice. Any start in the epoch is a slice, too, so going on after an
interruption needs no re-reading, and the number of ranks may change in between.

Class-balanced training: the same, but the epoch's order is as many draws with replacement, by weight.

Evaluation: each record once, in the data set's order, the same number of steps on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """What one rank reads for one step."""

    numbers: np.ndarray
    """(B,) int64 record numbers."""
    valid: np.ndarray
    """(B,) bool: False for a place that is only filled so that all ranks have as many; it must not be scored."""


def permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    """The order of all records in one epoch, the same on every machine and with every version of numpy.

    Sorting raw generator output, because numpy keeps that fixed for ever but not the order that its own ``permutation``
    gives.

    Args:
        seed: Of the run, 0 or more.
        epoch: From 0.
        num_records: In the data set.

    Returns:
        (num_records,) int64.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(num_records), kind="stable")


def weighted_draws(seed: int, epoch: int, weights: np.ndarray) -> np.ndarray:
    """As many records as there are, drawn with replacement by weight: one epoch of a class-balanced order.

    The same on every machine: raw generator output, and one comparison of sums for each draw.

    Args:
        seed: Of the run, 0 or more.
        epoch: From 0.
        weights: (num_records,) float64, 0 or more, not all 0. A record's chance is its share of the sum.

    Returns:
        (num_records,) int64.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch, 1]))
    share = (generator.random_raw(len(weights)) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    ends = np.cumsum(weights)
    return np.searchsorted(ends, share * ends[-1], side="right").clip(max=len(weights) - 1).astype(np.int64)


def steps_per_epoch(num_records: int, batch_size: int, world_size: int, consumed: int = 0) -> int:
    """Steps that are left in an epoch of which ``consumed`` records are done.

    A step takes ``batch_size * world_size`` records. What is left at the end is too little for a step and sits out this
    epoch: fewer than ``batch_size * world_size`` records, others in each epoch.

    Args:
        num_records: In the data set.
        batch_size: Records per rank and step.
        world_size: Ranks.
        consumed: Records of this epoch that all ranks together have had.
    """
    return max(0, num_records - consumed) // (batch_size * world_size)


def train_batches(order: np.ndarray, batch_size: int, world_size: int, rank: int, consumed: int = 0) -> Iterator[Share]:
    """One rank's batches for the rest of an epoch.

    Args:
        order: (num_records,) int64 from ``permutation`` or ``weighted_draws``.
        batch_size: Records per rank and step.
        world_size: Ranks.
        rank: 0 to ``world_size - 1``.
        consumed: Records of this epoch that all ranks together have had; any number.

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
    """One rank's batches of an evaluation in which all ranks together see each record exactly once.

    Every rank has the same number of steps and, at each step, the same number of places. In the last step the records
    that are left are spread evenly; a rank with one fewer gets the data set's last record once more, marked not valid.
    Valid records of rank 0, 1, ... put one behind the other, step by step, are the data set in order.

    Args:
        num_records: To score: records 0 to ``num_records - 1``.
        batch_size: Records per rank and step, at most.
        world_size: Ranks.
        rank: 0 to ``world_size - 1``.
    """
    for step in range(evaluation_steps(num_records, batch_size, world_size)):
        start = step * batch_size * world_size
        left = min(num_records - start, batch_size * world_size)
        places = -(-left // world_size)
        # As numpy.array_split: the first left % world_size ranks get one more.
        share, longer = divmod(left, world_size)
        first = start + rank * share + min(rank, longer)
        index = np.arange(first, first + places, dtype=np.int64)
        valid = np.arange(places) < share + (rank < longer)
        yield Share(np.where(valid, index, num_records - 1), valid)


def spread_evenly(count: int, total: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
