"""Which codes training hides: first each record's mask ratio, then its mask.

Both are pure functions of the record's key (`vab.tokens.noise`): the same key gives the same mask in any batch.
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
    """The distribution of the mask ratio. The defaults are the paper's.

    A mask ratio is drawn for each record. Then each code of the record is hidden with that probability, independently
    of the other levels and steps.

    Source: VAB, Su et al. 2024 (mean and standard deviation, as third parties report them); bounds: MAGE, Li et al.
    2023, and the authors' follow-up code; independence over levels and steps: the follow-up code.
    """

    law: RatioLaw = "truncated_normal"
    """Distribution of the ratio: ``truncated_normal``, ``cosine`` (MaskGIT) or ``fixed``."""
    mean: float = 0.55
    """Mean of the normal distribution before truncation (``truncated_normal``)."""
    std: float = 0.25
    """Standard deviation of the normal distribution before truncation (``truncated_normal``)."""
    low: float = 0.5
    """Smallest ratio (``truncated_normal``)."""
    high: float = 1.0
    """Largest ratio (``truncated_normal``)."""
    ratio: float = 0.75
    """The ratio of every record (``fixed``)."""

    def __post_init__(self) -> None:
        """Refuse settings that define no distribution."""
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

    @property
    def mean_ratio(self) -> float:
        """The mean of the mask ratio: 0.6936 for the paper's law."""
        if self.law == "cosine":
            return 2 / math.pi
        if self.law == "fixed":
            return self.ratio
        mass = _normal_cdf(self.high, self.mean, self.std) - _normal_cdf(self.low, self.mean, self.std)
        low, high = ((bound - self.mean) / self.std for bound in (self.low, self.high))
        return self.mean + self.std * (math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)) / (
            math.sqrt(2 * math.pi) * mass
        )

    def ratios(self, keys: Tensor) -> Tensor:
        """Each record's mask ratio, the probability that a code is hidden.

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
        """`independent_mask` with the records' own ratios: (B, K, T) bool."""
        return independent_mask(keys, self.ratios(keys), num_codebooks, num_steps, steps)


def truncated_normal(uniform: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """Numbers from a normal distribution truncated to [low, high], by the inverse of its distribution function.

    Args:
        uniform: Any shape, float in (0, 1).
        mean: Mean before truncation.
        std: Standard deviation before truncation, above 0.
        low: Smallest value.
        high: Largest value.

    Returns:
        The shape of ``uniform``; a monotonic function of it.
    """
    lowest, highest = _normal_cdf(low, mean, std), _normal_cdf(high, mean, std)
    quantile = torch.special.ndtri(lowest + (highest - lowest) * uniform)
    return (mean + std * quantile).clamp(low, high)  # rounding may exceed a bound


def independent_mask(
    keys: Tensor, ratios: Tensor, num_codebooks: int, num_steps: int, steps: Tensor | None = None
) -> Tensor:
    """Hide each code independently, with its record's probability.

    Args:
        keys: (B,) int64.
        ratios: (B,) float in [0, 1].
        num_codebooks: K.
        num_steps: T.
        steps: (B,) int64 in [1, T]: the codec steps of each record before its padding; None if no record has padding.

    Returns:
        (B, K, T) bool, True = hidden. Every record has at least one hidden code; padding is never hidden.
    """
    numbers = uniform(keys, Stream.MASK, (num_codebooks, num_steps))  # (B, K, T)
    if steps is not None:
        is_padding = torch.arange(num_steps, device=keys.device) >= steps[:, None]  # (B, T)
        numbers = numbers.masked_fill(is_padding[:, None], torch.inf)
    # With a threshold of at least the smallest number, exactly one code is hidden where otherwise none would be.
    threshold = torch.maximum(ratios, reduce(numbers, "B K T -> B", "min"))
    return numbers <= threshold[:, None, None]


def _normal_cdf(value: float, mean: float, std: float) -> float:
    return 0.5 * math.erfc((mean - value) / (std * math.sqrt(2)))
