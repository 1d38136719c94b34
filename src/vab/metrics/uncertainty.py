"""Standard errors of metrics: by how much a value would move with other records."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (B,) numbers, B >= 2, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def ratio_and_error(above: Tensor, below: Tensor) -> tuple[float, float | None]:
    """Ratio of two sums over records, and its standard error by the delta method.

    Args:
        above: (B,) float, what each record adds to the numerator.
        below: (B,) float, what it adds to the denominator; the sum is not 0.

    Returns:
        The ratio, and its standard error; None with fewer than two records. For ``below`` all 1 it is
        ``mean_and_error``.
    """
    above, below = above.double(), below.double()
    total = below.sum()
    ratio = above.sum() / total
    if len(above) < 2:
        return float(ratio), None
    left = above - ratio * below  # mean 0
    return float(ratio), float(left.std() * math.sqrt(len(left)) / total)


def file_numbers(groups: Tensor | None, embeddings: Tensor) -> tuple[Tensor, int]:
    """The file of each embedding, numbered from 0 without gaps, (M,) int64; and the number of files.

    Args:
        groups: (M,) int64, any number for each file. None: each embedding is a file of its own.
        embeddings: (M, E).

    Raises:
        ValueError: If there is not one number for each embedding.
    """
    groups = torch.arange(len(embeddings), device=embeddings.device) if groups is None else groups
    if groups.shape != embeddings.shape[:1]:
        raise ValueError(f"groups are (M,), one for each of {len(embeddings)} embeddings, got {tuple(groups.shape)}")
    number = groups.unique(return_inverse=True)[1]
    return number, int(number.max()) + 1 if len(number) else 0


def sums_by_group(values: Tensor, number: Tensor, count: int) -> Tensor:
    """(G,) float64: the sum of the values (M,) of each of ``count`` groups, which ``number`` (M,) names."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, number, values.double())


def clustered_error(influence: Tensor, number: Tensor, count: int) -> Tensor:
    """Standard error of a metric of embeddings from files: those of one file are alike, and count together.

    Args:
        influence: (M,) float64, how far each embedding moves the metric; mean 0.
        number: (M,) int64, the file of each embedding: see ``file_numbers``.
        count: Files.

    Returns:
        Scalar float64.

    Raises:
        ValueError: If there are fewer than two files.

    Source: Liang and Zeger 1986.
    """
    if count < 2:
        raise ValueError(f"a standard error needs embeddings of at least 2 files, got {count}")
    return (sums_by_group(influence, number, count).var() * count).sqrt() / len(influence)
