"""Inception score: how certain a judge's predictions are, and how varied over the sounds. It needs no reference.

It does not say whether the sounds are right. Compare it only for the same judge and number of sounds.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 1, seed: int = 2020) -> tuple[Tensor, Tensor]:
    """The exponential of the mean KL(p(y|x) || p(y)), where p(y) is the mean over the sounds.

    Args:
        logits: (B, L) float, finite. The judge's output before softmax.
        splits: Parts to score, after a shuffle; few sounds in a part lower the score. The field's tools use 10.
        seed: Of the shuffle, by NumPy's older generator, so that the parts are those of av-benchmark (seed 2020).

    Returns:
        Mean over the parts, 1 to L, higher is better; and their standard deviation (of the parts themselves, divided by
        their number; 0 for one part). Scalars, float64.

    Raises:
        ValueError: If the shape is not (B, L), there are fewer sounds than parts, or a number is not finite.

    Source: Salimans et al. 2016; parts and shuffle as in torch-fidelity (Apache-2.0) and av-benchmark.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"inception score: logits are (B, L) over L classes, got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("inception score: the logits have numbers that are not finite")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"inception score: {splits} parts of {len(logits)} sounds: every part needs one")
    order = np.random.RandomState(seed).permutation(len(logits))  # as av-benchmark orders them
    shuffled = logits.double()[torch.from_numpy(order).to(logits.device)]
    bounds = [part * len(logits) // splits for part in range(splits + 1)]
    parts = [_score(shuffled[start:end]) for start, end in itertools.pairwise(bounds)]
    scores = torch.stack(parts)
    return scores.mean(), scores.std(correction=0)


def _score(logits: Tensor) -> Tensor:
    """Of (B, L) float64. The mean KL(p || q) is the mean of sum p log p, less sum q log q, where q is the mean of p."""
    logs = logits.log_softmax(1)
    mean = logs.exp().sum(0) / len(logits)
    return ((logs.exp() * logs).sum() / len(logits) - torch.xlogy(mean, mean).sum()).clamp(min=0).exp()  # 0: rounding
