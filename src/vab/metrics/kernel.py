"""Kernel distance between two sets of embeddings: it assumes no Gaussian and is unbiased, also for few embeddings.

The squared maximum mean discrepancy, unbiased, with a Gaussian kernel as wide as the reference's median distance, times
100: the KAD of the field. Tables of pairs are computed in pieces, so memory does not grow with N squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vab.metrics.uncertainty import clustered_error, file_numbers

SCALE = 100.0
"""The distance is multiplied by this, as KAD is."""
PIECE = 1 << 22
"""Pairs at once: some 100 MB of float64 with what is computed from them."""
BINS = 1 << 12
"""Bins of one pass in the search for a median."""
Bin = tuple[float, float, int]
"""An interval from low to high, and which of its `BINS` parts."""


def median_bandwidth(reference: Tensor) -> Tensor:
    """Median distance of pairs of embeddings, i < j: the width of the kernel.

    Exact for any N. Of an even number of pairs it is the lower of the two in the middle. Where all distances at once
    are too many, passes over them count how many fall in each of 4,096 bins of an ever narrower interval, until those
    in it can be sorted: two or three passes.

    Args:
        reference: (N, E) float, N >= 2.

    Returns:
        Scalar float64, above 0.

    Raises:
        ValueError: If there are fewer than two embeddings, a number is not finite, or half of the pairs are equal.
    """
    reference = _embeddings(reference, "reference")
    reference = reference - reference.mean(0)  # far from 0 a distance would be a small difference of large numbers
    pairs = len(reference) * (len(reference) - 1) // 2
    square = _select(reference, (pairs - 1) // 2, pairs)
    # Equal embeddings are at about 1e-16 of their squared length, not at 0: a distance is a difference of products.
    if square <= 1e-14 * float(reference.square().sum(1).mean()):
        raise ValueError("kernel distance: half of the reference's pairs are equal, so their median distance is 0")
    return reference.new_tensor(square).sqrt()


def kernel_distance(real: Tensor, generated: Tensor, bandwidth: Tensor | float | None = None) -> Tensor:
    """Unbiased squared maximum mean discrepancy, times `SCALE`.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over pairs of two different embeddings, with
    k(x, y) = exp(-|x - y|^2 / (2 s^2)).

    Args:
        real: (N, E) float, N >= 2. The reference.
        generated: (M, E) float, M >= 2.
        bandwidth: s, above 0. None: ``median_bandwidth`` of the reference, so the distance is not symmetric.

    Returns:
        Scalar float64. 0 on average for sets from one distribution, so it may lie below 0.

    Raises:
        ValueError: If a side has fewer than two embeddings, widths differ, a number is not finite, or the bandwidth is
            not above 0.

    Source: Gretton et al. 2012, eq. (3); as KAD Chung et al. 2025 (2502.15602). Their tool kadtk (1.1) takes the median
    of all pairs of its second set, the evaluated one, in spite of its README (which says the reference's) and in
    float32: to compare with its numbers, give the median of ``generated`` as the bandwidth.
    """
    real, generated, width = _prepare(real, generated, bandwidth)
    within_real = _means_within(real, width).mean()
    within_generated = _means_within(generated, width).mean()
    return SCALE * (within_real + within_generated - 2 * _means_across(generated, real, width).mean())


def kernel_error(
    real: Tensor, generated: Tensor, bandwidth: Tensor | float | None = None, groups: Tensor | None = None
) -> Tensor:
    """Standard error of ``kernel_distance``: how far other generated sounds would move it.

    By the delta method: a generated embedding moves the distance by twice its mean kernel with the generated ones less
    that with the real ones. The reference counts as given; between equal sets, where this vanishes, it is too small.

    Args:
        real: (N, E) float, N >= 2. The reference.
        generated: (M, E) float, M >= 2.
        bandwidth: As in ``kernel_distance``.
        groups: (M,) int64. The file that each generated embedding is from. None: each is a sound of its own.

    Returns:
        Scalar float64, in the unit of the distance.

    Raises:
        ValueError: As ``kernel_distance``, or if there are fewer than two groups.
    """
    real, generated, width = _prepare(real, generated, bandwidth)
    number, count = file_numbers(groups, generated)
    influence = 2 * (_means_within(generated, width) - _means_across(generated, real, width))
    influence = influence - influence.mean()
    return SCALE * clustered_error(influence, number, count)


def _prepare(real: Tensor, generated: Tensor, bandwidth: Tensor | float | None) -> tuple[Tensor, Tensor, float]:
    """Both sides in float64 about the reference's mean, and the bandwidth."""
    real, generated = _embeddings(real, "real"), _embeddings(generated, "generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"kernel distance: embeddings are {real.shape[1]} and {generated.shape[1]} wide, not equally")
    width = float(median_bandwidth(real) if bandwidth is None else bandwidth)
    if not width > 0:
        raise ValueError(f"kernel distance: the bandwidth must be above 0, got {width}")
    centre = real.mean(0)
    return real - centre, generated - centre, width


def _squares(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, C) squared distances."""
    lengths = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return torch.addmm(lengths, rows, columns.T, alpha=-2).clamp_(min=0)


def _means_across(rows: Tensor, columns: Tensor, width: float) -> Tensor:
    """(R,) mean kernel of each row with all columns."""
    parts = [
        (_squares(part, columns) / (-2 * width**2)).exp_().mean(1) for part in rows.split(max(1, PIECE // len(columns)))
    ]
    return torch.cat(parts)


def _means_within(rows: Tensor, width: float) -> Tensor:
    """(R,) mean kernel of each row with all others; each pair is computed once."""
    sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    step = max(1, PIECE // len(rows))
    for start in range(0, len(rows), step):
        table = (_squares(rows[start : start + step], rows[start:]) / (-2 * width**2)).exp_()
        size = len(table)
        sums[start : start + size] += table.sum(1) - table[:, :size].diagonal()
        sums[start + size :] += table[:, size:].sum(0)
    return sums / (len(rows) - 1)


def _select(rows: Tensor, rank: int, pairs: int) -> float:
    """The squared distance of pairs i < j that has ``rank`` smaller ones, 0 <= rank < pairs."""
    low, high = 0.0, 4.01 * float(rows.square().sum(1).max())  # (|x| + |y|)^2, and room for rounding
    chosen: list[Bin] = []
    while pairs > PIECE:  # are left
        if high - low <= 1e-15 * high:
            return low  # they are equal but for rounding
        counts = torch.zeros(BINS, dtype=torch.int64, device=rows.device)
        for squares in _pairs(rows, chosen):
            counts += _bins(squares, low, high).bincount(minlength=BINS)
        smaller = counts.cumsum(0)
        place = int((smaller <= rank).sum())
        rank -= int(smaller[place] - counts[place])
        pairs = int(counts[place])
        chosen.append((low, high, place))
        low, high = low + (high - low) * place / BINS, low + (high - low) * (place + 1) / BINS
    return float(torch.cat(list(_pairs(rows, chosen))).sort().values[rank])


def _bins(values: Tensor, low: float, high: float) -> Tensor:
    """Which of `BINS` parts of an interval each value is in, int64; never a lower one for a larger value."""
    return ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)


def _pairs(rows: Tensor, chosen: Sequence[Bin]) -> Iterator[Tensor]:
    """Squared distances of pairs i < j that lie in the chosen bins, in pieces (n,)."""
    step = max(1, PIECE // len(rows))
    for start in range(0, len(rows) - 1, step):
        table = _squares(rows[start : start + step], rows[start:])
        first, second = torch.triu_indices(len(table), len(table), 1, device=rows.device)
        squares = torch.cat([table[first, second], table[:, len(table) :].flatten()])
        for low, high, place in chosen:
            squares = squares[_bins(squares, low, high) == place]
        yield squares


def _embeddings(embeddings: Tensor, name: str) -> Tensor:
    """(N, E) in float64, at least two."""
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise ValueError(f"kernel distance: {name} embeddings are (N, E), got {tuple(embeddings.shape)}")
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(f"kernel distance: the {name} embeddings have numbers that are not finite")
    if len(embeddings) < 2:
        raise ValueError(f"kernel distance: {name} embeddings: {len(embeddings)}, but 2 are needed")
    return embeddings.double()
