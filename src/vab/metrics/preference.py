"""Which of two systems listeners prefer: shares of their five answers, with intervals clustered by listener and trial.

Answers of one listener are alike, and so are answers to one trial: n of them say less than n independent ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from vab.metrics.uncertainty import sums_by_group

ANSWERS = ("first_much_better", "first_better", "no_preference", "second_better", "second_much_better")
"""The five answers, in order; an answer is its place here."""


@dataclass(frozen=True)
class Interval:
    """A share of answers with its confidence interval."""

    share: float
    """0..1."""
    low: float
    """Lower end of the confidence interval."""
    high: float
    """Upper end."""


@dataclass(frozen=True)
class Preference:
    """Listeners' answers about two systems."""

    counts: tuple[int, ...]
    """How often each of ``ANSWERS`` was given."""
    first: Interval
    """Share of answers that prefer the first system."""
    second: Interval
    """Share of answers that prefer the second system."""
    num_raters: int
    """Listeners with at least one answer."""
    num_trials: int
    """Trials with at least one answer."""
    p_raters: float
    """Sign test over listeners, by which system each preferred more often: would other listeners say the same?"""
    p_trials: float
    """Sign test over trials, by which system more listeners preferred: would other videos say the same?"""

    @property
    def num_answers(self) -> int:
        """All answers."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of ``ANSWERS``; their sum is 1."""
        return tuple(count / self.num_answers for count in self.counts)


def preference(answers: Tensor, raters: Tensor, trials: Tensor, level: float = 0.95) -> Preference:
    """Summarise listeners' answers about two systems.

    Args:
        answers: (N,) int64, places in ``ANSWERS``, N >= 1.
        raters: (N,) int64: which listener gave each answer; any numbers.
        trials: (N,) int64: which trial it is about; any numbers. A listener answers a trial once.
        level: Of the intervals, between 0 and 1.

    Raises:
        ValueError: If there is no answer, shapes differ, a number is no answer, or a listener answers a trial twice.
    """
    if answers.ndim != 1 or not len(answers) or answers.shape != raters.shape or answers.shape != trials.shape:
        shapes = ", ".join(str((*given.shape,)) for given in (answers, raters, trials))
        raise ValueError(f"preference takes three times (N,), N >= 1; got {shapes}")
    if answers.min() < 0 or answers.max() >= len(ANSWERS):
        raise ValueError(f"answers are 0..{len(ANSWERS) - 1}, got {int(answers.min())}..{int(answers.max())}")
    if len(torch.stack([raters, trials]).unique(dim=1).T) != len(answers):
        raise ValueError("a listener answers a trial once, got two answers of one listener to one trial")
    middle = len(ANSWERS) // 2
    signs = torch.sign(middle - answers)  # (N,): 1 for the first system, -1 for the second
    for_first, for_second = signs > 0, signs < 0
    return Preference(
        counts=tuple(torch.bincount(answers, minlength=len(ANSWERS)).tolist()),
        first=share_interval(for_first, raters, trials, level, like=for_second),
        second=share_interval(for_second, raters, trials, level, like=for_first),
        num_raters=len(raters.unique()),
        num_trials=len(trials.unique()),
        p_raters=_sign_test_by(signs, raters),
        p_trials=_sign_test_by(signs, trials),
    )


def share_interval(
    chosen: Tensor, raters: Tensor, trials: Tensor, level: float = 0.95, like: Tensor | None = None
) -> Interval:
    """Share of chosen answers with Wilson's interval, for the number of independent answers that these are worth.

    Args:
        chosen: (N,) bool, N >= 1.
        raters: (N,) int64: who gave each answer.
        trials: (N,) int64: what it is about.
        level: Between 0 and 1.
        like: (N,) bool of another answer, whose spread is used if ``chosen`` has none because all agree.
    """
    share = float(chosen.double().mean())
    spread = like if share in (0.0, 1.0) and like is not None else chosen
    return Interval(share, *wilson_interval(share, effective_answers(spread, raters, trials), level))


def effective_answers(chosen: Tensor, raters: Tensor, trials: Tensor) -> float:
    """The number of independent answers that these are worth, for their share.

    The share's variance is summed within listeners and within trials (each cluster's residuals are added before they
    are squared); that of single answers is in both sums and subtracted once. The largest of the two one-way variances,
    this two-way one and that of independent answers is used. The result is share (1 - share) / variance.

    Answers that all agree have no variance: they are worth one per listener or one per trial, whichever is less,
    ignoring a single listener or trial.

    Args:
        chosen: (N,) bool, N >= 1.
        raters: (N,) int64.
        trials: (N,) int64.

    Returns:
        1 to N.

    Source: two-way clusters: Cameron, Gelbach, Miller 2011, "Robust inference with multiway clustering";
    with the factor G / (G - 1) for G clusters relative to that of N single answers. Effective sample size in a Wilson
    interval: Dean and Pagano 2015, "Evaluating confidence interval methods for binomial proportions in clustered
    surveys".
    """
    x = chosen.double()
    n, share = len(x), float(x.mean())
    clusters = [_numbered(names) for names in (raters, trials)]
    if share in (0.0, 1.0):
        return float(min([size for _, size in clusters if size > 1], default=1))
    single = share * (1 - share) / n
    by_cluster = [_variance(x - share, *cluster) for cluster in clusters]
    variance = max(single, *by_cluster, sum(by_cluster) - single)
    return max(share * (1 - share) / variance, 1.0)


def wilson_interval(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of n independent answers; it stays within 0..1 and has a width at 0 and 1 too.

    Args:
        share: 0..1.
        n: Number of answers, above 0; need not be whole.
        level: Between 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Ends at 0 and 1 are exact by the formula; rounding must not put them outside, or past the share itself.
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a split if both were as likely; exact, draws left out beforehand.

    Args:
        wins: 0 or more.
        losses: 0 or more.

    Returns:
        0..1; 1 if there is neither win nor loss.
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def _sign_test_by(signs: Tensor, names: Tensor) -> float:
    """Over clusters, by the sign of each one's sum."""
    sums = sums_by_group(signs, *_numbered(names))
    return sign_test(int((sums > 0).sum()), int((sums < 0).sum()))


def _numbered(names: Tensor) -> tuple[Tensor, int]:
    """The same clusters, numbered from 0 without gaps, (N,) int64; and how many there are."""
    numbers = names.unique(return_inverse=True)[1]
    return numbers, int(numbers.max()) + 1


def _variance(residuals: Tensor, numbers: Tensor, size: int) -> float:
    """Of the mean, from sums within clusters; 0 for a single cluster, whose sum is 0 by definition."""
    n = len(residuals)
    if size == 1:
        return 0.0
    sums = sums_by_group(residuals, numbers, size)
    return float(sums.square().sum()) / n**2 * (size / (size - 1)) * ((n - 1) / n)
