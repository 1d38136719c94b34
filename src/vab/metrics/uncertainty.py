"""Standard errors of metrics: by how much a value would move with other records."""

from __future__ import annotations

import math

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
