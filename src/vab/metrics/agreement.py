"""Classifier accuracy on generated sounds, for segments with one or several classes."""

from __future__ import annotations

import torch
from torch import Tensor


def class_agreement(scores: Tensor, truth: Tensor) -> Tensor:
    """Share of a segment's n true classes among the classifier's top n predictions.

    With one true class it is top-1 accuracy. By chance it is n / L.

    Args:
        scores: (B, L) float. Higher = more likely; ties go to the lower class number.
        truth: (B, L) bool. At least one True in each row.

    Returns:
        (B,) float64 in [0, 1].

    Raises:
        ValueError: If a row has no true class.
    """
    count = truth.sum(1)
    if not bool((count > 0).all()):
        raise ValueError("a segment without a true class has no agreement")
    order = scores.argsort(dim=1, descending=True, stable=True)  # (B, L) classes, most likely first
    ranked = truth.gather(1, order)  # (B, L) whether each prediction is true
    among_top = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    return (ranked & among_top).sum(1).double() / count
