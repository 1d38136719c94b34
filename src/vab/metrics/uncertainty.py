"""Standard errors of metrics: by how much a value would move with other records."""

from __future__ import annotations

import math

from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (B,) numbers, B >= 2, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
