"""Count, mean and scatter of rows in batches, on any number of ranks: one tensor that can be merged.

Sums of rows and of their outer products would be simpler, but a covariance is their difference: if the mean is 1,000
times the spread, float64 loses 6 of its 16 digits, which ones depends on the split. Here each batch is centred on its
own mean, and a merge adds the spread between means (Chan, Golub and LeVeque 1979): the loss grows with mean / spread,
not with its square, and hardly depends on the split.

Layout, for width E: (E + 1, E + 1) float64 with the count at [0, 0], the mean at [0, 1:], and the scatter, the sum of
outer products of rows less the mean, at [1:, 1:]. One tensor, not three, because torchmetrics reduces each state alone,
and means cannot be merged without their counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def no_rows(width: int) -> Tensor:
    """The state before the first row, (width + 1, width + 1) float64."""
    return torch.zeros(width + 1, width + 1, dtype=torch.float64)


def merge(states: Tensor) -> Tensor:
    """The state of all rows of several states; torchmetrics takes it as ``dist_reduce_fx``.

    Args:
        states: (W, E + 1, E + 1) float64, of W batches or ranks; some may have no rows.

    Returns:
        (E + 1, E + 1) float64.
    """
    counts, means = states[:, 0, 0], states[:, 0, 1:]  # (W,), (W, E)
    total = counts.sum()
    if not total > 0:
        return states[0].clone()
    origin = means[counts.argmax()]  # differences from a mean, not means, are averaged: they are small
    mean = origin + (counts[:, None] * (means - origin)).sum(0) / total
    apart = (means - mean) * counts.sqrt()[:, None]
    merged = torch.empty_like(states[0])
    merged[0, 0], merged[0, 1:], merged[1:, 0] = total, mean, 0
    merged[1:, 1:] = states[:, 1:, 1:].sum(0) + apart.T @ apart
    return merged


def add(state: Tensor, rows: Tensor) -> None:
    """Add a batch to a state, in place.

    Args:
        state: (E + 1, E + 1) float64.
        rows: (N, E) float, finite, N >= 0.
    """
    if not len(rows):
        return
    rows = rows.detach().double()
    before, mean = state[0, 0].clone(), rows.mean(0)
    total = before + len(rows)
    moved = mean - state[0, 1:]
    # The spread between the means is one more row, so that the large scatter is read and written once.
    apart = moved * (before * len(rows) / total).sqrt()
    centred = torch.cat([rows - mean, apart[None]])
    state[1:, 1:].addmm_(centred.T, centred)
    state[0, 1:] += moved * (len(rows) / total)
    state[0, 0] = total


def mean_and_covariance(state: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (E,) and unbiased covariance (E, E) in float64 of a state of at least two rows."""
    return state[0, 1:].clone(), state[1:, 1:] / (state[0, 0] - 1)
