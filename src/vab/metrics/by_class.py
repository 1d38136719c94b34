"""Frechet distance and divergence of each class of sounds.

A record of several classes counts for each of them. A class with too few records is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments
from vab.metrics.uncertainty import mean_and_error


@dataclass(frozen=True)
class ByClass:
    """Metrics of each class, in the order of the classes."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """By class: the metrics and the counts that they rest on."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By class without metrics: the reason."""


def frechet_by_class(
    real: Tensor,
    generated: Tensor,
    real_classes: Tensor,
    generated_classes: Tensor,
    names: Sequence[str],
    min_count: int = 32,
) -> ByClass:
    """Frechet distance of each class's generated embeddings to its real ones.

    Few embeddings raise the distance: compare a class between systems with equal counts, not one class with another.

    Args:
        real: (N, E) float embeddings.
        generated: (M, E) float.
        real_classes: (N, L) bool. Classes of each embedding's record; windows have the classes of their sound:
            ``truth.repeat_interleave(rows, 0)``.
        generated_classes: (M, L) bool.
        names: L different names.
        min_count: Embeddings that each side of a class needs, 2 or more.

    Returns:
        Metrics ``frechet``, ``real`` and ``generated`` (counts of embeddings).

    Raises:
        ValueError: If the shapes do not fit, ``min_count`` is below 2, or a number is not finite.
    """
    _check(names, min_count, (real, real_classes), (generated, generated_classes))
    found = ByClass()
    for column, name in enumerate(names):
        sides = (real[real_classes[:, column]], generated[generated_classes[:, column]])
        counts = (len(sides[0]), len(sides[1]))
        if min(counts) < min_count:
            found.left_out[name] = f"{counts[0]} real and {counts[1]} generated embeddings, fewer than {min_count}"
            continue
        distance = frechet_distance(*moments(sides[0]), *moments(sides[1]))
        found.figures[name] = {"frechet": float(distance), "real": counts[0], "generated": counts[1]}
    return found


def kld_by_class(
    real_logits: Tensor,
    generated_logits: Tensor,
    classes: Tensor,
    names: Sequence[str],
    variant: str = "softmax",
    min_count: int = 2,
) -> ByClass:
    """Mean of ``paired_kl`` over the pairs of each class, with its standard error.

    Args:
        real_logits: (B, J) float over the judge's J classes.
        generated_logits: (B, J) float, row by row.
        classes: (B, L) bool. Classes of each pair, which need not be the judge's.
        names: L different names.
        variant: As in ``paired_kl``.
        min_count: Pairs that a class needs, 2 or more.

    Returns:
        Metrics ``kld`` and ``kld_error`` in nats, and ``pairs`` (their count).

    Raises:
        ValueError: If the shapes do not fit, ``min_count`` is below 2, a number is not finite, or the variant is
            unknown.
    """
    _check(names, min_count, (real_logits, classes))
    divergence = paired_kl(real_logits, generated_logits, variant)
    found = ByClass()
    for column, name in enumerate(names):
        own = divergence[classes[:, column]]
        if len(own) < min_count:
            found.left_out[name] = f"{len(own)} pairs, fewer than {min_count}"
            continue
        mean, error = mean_and_error(own)
        found.figures[name] = {"kld": mean, "kld_error": error, "pairs": len(own)}
    return found


def _check(names: Sequence[str], min_count: int, *sides: tuple[Tensor, Tensor]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("by class: two classes have one name")
    if min_count < 2:
        raise ValueError(f"by class: min_count must be 2 or more, got {min_count}")
    for rows, classes in sides:
        if classes.dtype != torch.bool or tuple(classes.shape) != (len(rows), len(names)):
            got = f"{tuple(classes.shape)} {classes.dtype}"
            raise ValueError(f"by class: classes are ({len(rows)}, {len(names)}) bool, got {got}")
