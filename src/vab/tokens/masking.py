"""Which codes training hides: how large a share of each record (the ratio), then which ones (the pattern).

Both are pure functions of a record's key (`vab.tokens.noise`): the same key gives the same mask in any batch.
True means hidden, to be predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import reduce
from torch import Tensor

from vab.spec import UserError
from vab.tokens.noise import Stream, uniform

RatioLaw = Literal["truncated_normal", "cosine", "fixed"]


@dataclass(frozen=True)
class Masking:
    """How much of a record to hide. The defaults are the paper's.

    A ratio is drawn for each record, then every code of the record is hidden with that probability, whatever its
    level or step: no order of levels, no spans.

    Source: VAB, Su et al. 2024 (mean and standard deviation, as third parties report them); bounds: MAGE, Li et al.
    2023, and the authors' follow-up code; independent hiding over levels and steps: the follow-up code.
    """

    law: RatioLaw = "truncated_normal"
    """How a record's ratio is drawn: ``truncated_normal``, ``cosine`` (MaskGIT) or ``fixed``."""
    mean: float = 0.55
    """Of the normal before truncation (``truncated_normal``)."""
    std: float = 0.25
    """Standard deviation of the normal before truncation (``truncated_normal``)."""
    low: float = 0.5
    """Smallest ratio (``truncated_normal``)."""
    high: float = 1.0
    """Largest ratio (``truncated_normal``)."""
    ratio: float = 0.75
    """The one ratio (``fixed``)."""

    def __post_init__(self) -> None:
        """Refuse laws that are none."""
        if self.law not in get_args(RatioLaw):
            raise UserError(f"masking: law must be one of {', '.join(get_args(RatioLaw))}, got {self.law!r}")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"masking: need 0 <= low < high <= 1, got low {self.low}, high {self.high}")
        if not 0 < self.ratio <= 1:
            raise UserError(f"masking: ratio must be above 0 and at most 1, got {self.ratio}")
        if not self.std > 0:
            raise UserError(f"masking: std must be above 0, got {self.std}")
        if not _normal_cdf(self.high, self.mean, self.std) - _normal_cdf(self.low, self.mean, self.std) > 1e-4:
            raise UserError(
                f"masking: a normal of mean {self.mean} and std {self.std} is practically never "
                f"between low {self.low} and high {self.high}; move mean or widen the bounds"
            )

    def ratios(self, keys: Tensor) -> Tensor:
        """Each record's probability that a code is hidden.

        Args:
            keys: (B,) int64.

        Returns:
            (B,) float32 in [0, 1].
        """
        numbers = uniform(keys, Stream.MASK_RATIO)
        if self.law == "truncated_normal":
            return truncated_normal(numbers, self.mean, self.std, self.low, self.high)
        if self.law == "cosine":
            return torch.cos(math.pi / 2 * numbers)
        return torch.full_like(numbers, self.ratio)

    def mask(self, keys: Tensor, num_codebooks: int, num_steps: int, steps: Tensor | None = None) -> Tensor:
        """Draw the codes to hide.

        Args:
            keys: (B,) int64.
            num_codebooks: K.
            num_steps: T.
            steps: (B,) int64 in [1, T]. How many steps of each record are sound; None if all.

        Returns:
            (B, K, T) bool, True = hidden. At least one code of every record is hidden, and no padding.
        """
        return independent_mask(keys, self.ratios(keys), num_codebooks, num_steps, steps)


def truncated_normal(uniform: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """Numbers of a normal law that was cut to [low, high], by the inverse of its distribution function.

    Args:
        uniform: Any shape, float in (0, 1).
        mean: Of the normal before the cut.
        std: Of the normal before the cut, above 0.
        low: Smallest value.
        high: Largest value.

    Returns:
        The shape of ``uniform``. Rises with it.
    """
    lowest, highest = _normal_cdf(low, mean, std), _normal_cdf(high, mean, std)
    quantile = torch.special.ndtri(lowest + (highest - lowest) * uniform)
    return (mean + std * quantile).clamp(low, high)  # rounding may step over a bound


def independent_mask(
    keys: Tensor, ratios: Tensor, num_codebooks: int, num_steps: int, steps: Tensor | None = None
) -> Tensor:
    """Hide each code on its own, with its record's probability.

    Args:
        keys: (B,) int64.
        ratios: (B,) float in [0, 1].
        num_codebooks: K.
        num_steps: T.
        steps: (B,) int64 in [1, T]. How many steps of each record are sound; None if all.

    Returns:
        (B, K, T) bool, True = hidden. At least one code of every record is hidden, and no padding.
    """
    numbers = uniform(keys, Stream.MASK, (num_codebooks, num_steps))  # (B, K, T)
    if steps is not None:
        is_padding = torch.arange(num_steps, device=keys.device) >= steps[:, None]  # (B, T)
        numbers = numbers.masked_fill(is_padding[:, None], torch.inf)
    # Raising the bar to the smallest number hides exactly one code where none would be, and changes nothing elsewhere.
    bar = torch.maximum(ratios, reduce(numbers, "B K T -> B", "min"))
    return numbers <= bar[:, None, None]


def _normal_cdf(value: float, mean: float, std: float) -> float:
    return 0.5 * math.erfc((mean - value) / (std * math.sqrt(2)))
