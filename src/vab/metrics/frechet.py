"""Frechet distance between two sets of embeddings, each modelled as a Gaussian.

Computed in float64 by symmetric eigenvalues and singular values. The usual general matrix square root returns imaginary
parts, negative distances, or different numbers with another version of its library.

Also its standard error, its extrapolation to infinitely many generated sounds, the distance of each file, and a metric
that is updated in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from vab.metrics import streamed
from vab.metrics.uncertainty import clustered_error, file_numbers

STEPS = 25
"""Number of set sizes that an extrapolation is fitted to."""


class FrechetInfinity(NamedTuple):
    """Frechet distance extrapolated to infinitely many generated files or embeddings."""

    score: float
    """The distance at 1/n = 0, by the fitted line. It is an extrapolation, and may lie below 0."""
    slope: float
    """Growth of the distance with 1/n, where n counts what is drawn, files or embeddings."""
    r2: float
    """Share of the distances' variance that the line explains, at most 1. Far below 1 the score is not reliable."""


def moments(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of a set of embeddings.

    Args:
        embeddings: (N, E) float, N >= 2. With N <= E the covariance has no full rank: distances are defined, but depend
            strongly on N.

    Returns:
        (E,) and (E, E) float64.

    Raises:
        ValueError: If there are fewer than two embeddings, or a number is not finite.
    """
    embeddings = _embeddings(embeddings)
    if len(embeddings) < 2:
        raise ValueError(f"a covariance needs at least 2 embeddings, got {len(embeddings)}")
    mean = embeddings.mean(0)
    centred = embeddings - mean
    return mean, centred.T @ centred / (len(embeddings) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Squared Frechet distance of two Gaussians.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2. The last trace is the sum of the singular values of
    R1^T R2, where R R^T = C: roots of eigenvalues that are rounding errors (1e-16, whose root is 1e-8) never enter.

    Args:
        mean1: (E,) float.
        cov1: (E, E) float, symmetric and positive semi-definite; it may lack full rank.
        mean2: (E,) float.
        cov2: (E, E) float, as ``cov1``.

    Returns:
        Scalar float64, 0 or above; 0 for equal Gaussians. Symmetric in its arguments up to rounding.

    Raises:
        ValueError: If the shapes do not fit, or a number is not finite.

    Source: Dowson and Landau 1982; for audio (FAD) Kilgour et al. 2019.
    """
    mean1, cov1 = _gaussian(mean1, cov1, "first")
    mean2, cov2 = _gaussian(mean2, cov2, "second")
    if mean1.shape != mean2.shape:
        raise ValueError(f"moments are (E,) and (E, E) of one E, got {mean1.shape[0]} and {mean2.shape[0]}")
    shared = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared
    return distance.clamp(min=0)  # for equal Gaussians rounding may step below


def frechet_error(mean1: Tensor, cov1: Tensor, embeddings: Tensor, groups: Tensor | None = None) -> Tensor:
    """Standard error of the distance of generated embeddings to a reference, over generated sounds.

    By the delta method: the distance moves by the mean of the embeddings' influences,
    2 (m2 - m1)^T c + c^T (I - T) c - tr (I - T) C2 for c = x - m2, where T is the optimal transport map from the
    generated Gaussian to the reference (on the span of C2, where all c lie).

    The reference is taken as exact. The bias of few embeddings is not included (``frechet_infinity`` removes most of it
    on the generated side). The error is of first order: too small if the distance is not larger than its bias, as
    between equal sets.

    Args:
        mean1: (E,) float. The reference's moments.
        cov1: (E, E) float.
        embeddings: (M, E) float, the generated sounds'.
        groups: (M,) int64. The file of each embedding: windows of one sound are alike, and count together. None: each
            embedding is a sound of its own.

    Returns:
        Scalar float64, in the unit of the distance.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or there are fewer than two groups.

    Source: derivative of the distance in its second covariance, I - T: Takatsu 2011.
    """
    mean1, cov1 = _gaussian(mean1, cov1, "reference's")
    embeddings = _embeddings(embeddings, mean1)
    number, count = file_numbers(groups, embeddings)
    mean2, cov2 = moments(embeddings)
    centred = embeddings - mean2
    root2 = _root(cov2)  # (E, r), columns at right angles
    _, shared, turn = torch.linalg.svd(_root(cov1).T @ root2, full_matrices=False)
    # With c = R2 z, c^T T c = z^T (R2^T T R2) z, and R2^T T R2 = V S V^T: no inverse of a small number but in z.
    whitened = centred @ root2 / root2.square().sum(0)  # (M, r)
    transported = (whitened @ turn.T).square() @ shared
    influence = 2 * centred @ (mean2 - mean1) + centred.square().sum(1) - transported - cov2.trace() + shared.sum()
    return clustered_error(influence, number, count)


def frechet_infinity(
    mean1: Tensor, cov1: Tensor, embeddings: Tensor, groups: Tensor | None = None, *, seed: int = 0
) -> FrechetInfinity:
    """The distance extrapolated to infinitely many generated files, which removes most of the bias of few files.

    The distance of n files is too high by about a constant over n. For `STEPS` values of n, evenly spaced from half of
    the files to all, n files are drawn without replacement; a straight line is fitted to their distances over 1/n by
    least squares, and its value at 0 is the score. Draws with replacement would lead to the distance of the given
    files, bias included. Whole files are drawn, because windows of one file are alike and the bias depends on files.

    The bias of the reference stays: its moments are taken as exact.

    Args:
        mean1: (E,) float. The reference's moments.
        cov1: (E, E) float.
        embeddings: (N, E) float, the generated sounds', N >= 4 E. With fewer the bias is no straight line: half of
            them must be at least twice the dimensions of a covariance.
        groups: (N,) int64. The file of each embedding. None: each embedding is a sound of its own. Their order affects
            the draws.
        seed: Of the draws.

    Raises:
        ValueError: If there are fewer than 4 E embeddings or fewer than 2 `STEPS` files, the shapes do not fit, or a
            number is not finite.

    Source: Chong and Forsyth 2020, who start at a tenth of 50,000 images, 2.4 E; for audio Gui et al. 2023.
    """
    mean1, cov1 = _gaussian(mean1, cov1, "reference's")
    embeddings = _embeddings(embeddings, mean1)
    number, count = file_numbers(groups, embeddings)
    least = 4 * len(mean1)
    if len(embeddings) < least or count < 2 * STEPS:
        raise ValueError(
            f"it needs {least} embeddings (4 times their width) of {2 * STEPS} sounds or more, there are "
            f"{len(embeddings)} of {count}: give more sounds"
        )
    random = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(count / 2, count, STEPS, dtype=torch.float64).long()
    root1, distances = _root(cov1), []
    for size in sizes.tolist():
        drawn = torch.zeros(count, dtype=torch.bool)
        drawn[torch.randperm(count, generator=random)[:size]] = True
        rows = embeddings[drawn.to(number.device)[number]]
        distances.append(_distance_of(rows, torch.ones_like(rows[:, 0]), mean1, cov1, root1))
    return _at_infinity(sizes, distances)


def frechet_infinity_fadtk(
    mean1: Tensor, cov1: Tensor, embeddings: Tensor, *, seed: int = 0, min_n: int = 500
) -> FrechetInfinity:
    """FAD-infinity as the tool fadtk computes it, for comparison with its numbers. It removes almost no bias.

    For `STEPS` values of n from ``min_n`` to N, the distance of n embeddings drawn with replacement, and a straight
    line over 1/n. As n grows, the moments of such draws become those of the N embeddings, so the line leads to their
    distance, not to that of infinitely many: use ``frechet_infinity``. Draws are seeded; the tool's are not.

    Args:
        mean1: (E,) float. The reference's moments.
        cov1: (E, E) float.
        embeddings: (N, E) float, the generated sounds', N > ``min_n``. Their order affects the draws.
        seed: Of the draws.
        min_n: Smallest n, at least 2.

    Raises:
        ValueError: If there are ``min_n`` embeddings or fewer, the shapes do not fit, or a number is not finite.

    Source: fadtk (MIT), ``score_inf``.
    """
    mean1, cov1 = _gaussian(mean1, cov1, "reference's")
    embeddings = _embeddings(embeddings, mean1)
    if min_n < 2:
        raise ValueError(f"min_n must be 2 or more, got {min_n}")
    if len(embeddings) <= min_n:
        raise ValueError(f"it needs more than {min_n} embeddings, and there are {len(embeddings)}: give more sounds")
    random = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(min_n, len(embeddings), STEPS, dtype=torch.float64).long()
    root1, distances = _root(cov1), []
    for size in sizes.tolist():
        drawn = torch.randint(len(embeddings), (size,), generator=random)
        times = drawn.bincount(minlength=len(embeddings)).to(embeddings)  # how often each was drawn
        distances.append(_distance_of(embeddings[times > 0], times[times > 0], mean1, cov1, root1))
    return _at_infinity(sizes, distances)


def _at_infinity(sizes: Tensor, distances: Sequence[Tensor]) -> FrechetInfinity:
    """The straight line through distances over 1/n, by least squares."""
    found, inverse = torch.stack(list(distances)).cpu(), sizes.double().reciprocal()
    apart, spread = inverse - inverse.mean(), found - found.mean()
    slope = (apart * spread).sum() / apart.square().sum()
    left, total = (spread - slope * apart).square().sum(), spread.square().sum()
    r2 = 1 - left / total if total > 0 else torch.ones(())  # equal distances lie on a line
    return FrechetInfinity(float(found.mean() - slope * inverse.mean()), float(slope), float(r2))


def frechet_per_file(mean1: Tensor, cov1: Tensor, embeddings: Tensor, rows: Tensor) -> Tensor:
    """The distance of each file to a reference, by the file's own mean and covariance.

    It ranks files, to find outliers. With few windows the covariance has a low rank, so the value cannot be compared
    with that of a whole set. The covariance of a file with one window is 0.

    Args:
        mean1: (E,) float. The reference's moments.
        cov1: (E, E) float.
        embeddings: (M, E) float, of all files one after the other.
        rows: (B,) int64, 1 or more: number of embeddings of each file.

    Returns:
        (B,) float64.

    Raises:
        ValueError: If the shapes do not fit, a file has no embedding, or a number is not finite.

    Source: fadtk (MIT), ``score_individual``; Gui et al. 2023. There one window gives no number.
    """
    mean1, cov1 = _gaussian(mean1, cov1, "reference's")
    embeddings = _embeddings(embeddings, mean1)
    counts = rows.tolist()
    if rows.ndim != 1 or min(counts, default=1) < 1 or sum(counts) != len(embeddings):
        raise ValueError(
            f"rows are (B,), 1 or more, and sum to the {len(embeddings)} embeddings, got a sum of {rows.sum()}"
        )
    root1 = _root(cov1)
    ones = torch.ones(max(counts, default=0)).to(embeddings)
    parts = [_distance_of(part, ones[: len(part)], mean1, cov1, root1) for part in embeddings.split(counts)]
    return torch.stack(parts) if counts else embeddings.new_zeros(0)


class FrechetDistance(Metric):
    """``frechet_distance`` over whole data sets: streamed in float64, equal on any split over batches and ranks.

    A record that a rank repeats as padding must not be given twice.

    Args:
        embedding_dim: E, the width of an embedding.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    real: Tensor
    generated: Tensor

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        for name in ("real", "generated"):
            self.add_state(name, streamed.no_rows(embedding_dim), dist_reduce_fx=streamed.merge)

    def update(self, embeddings: Tensor, real: bool) -> None:
        """Add a batch of (M, E) float embeddings, M >= 0, to the real side or the generated one.

        Raises:
            ValueError: If the shape is another, or a number is not finite.
        """
        embeddings = _embeddings(embeddings, self.real[0, 1:])
        streamed.add(self.real if real else self.generated, embeddings)

    def compute(self) -> Tensor:
        """The distance, scalar float64.

        Raises:
            ValueError: If a side has fewer than two embeddings.
        """
        return frechet_distance(*self.moments(real=True), *self.moments(real=False))

    def moments(self, real: bool) -> tuple[Tensor, Tensor]:
        """Mean (E,) and covariance (E, E) of a side, float64: of this rank, within ``compute`` of all ranks.

        Raises:
            ValueError: If the side has fewer than two embeddings.
        """
        state = self.real if real else self.generated
        if (count := int(state[0, 0])) < 2:
            raise ValueError(
                f"Frechet distance: {'real' if real else 'generated'} embeddings: {count}, but 2 are needed"
            )
        return streamed.mean_and_covariance(state)


def _distance_of(rows: Tensor, times: Tensor, mean1: Tensor, cov1: Tensor, root1: Tensor) -> Tensor:
    """Distance to a reference of (N, E) rows that count (N,) times each; one row alone has no covariance."""
    total = times.sum()
    mean2 = (times @ rows) / total
    rows = (rows - mean2) * (times / (total - 1).clamp(min=1)).sqrt()[:, None]  # rows.T @ rows is the covariance
    shared = torch.linalg.svdvals(rows @ root1).sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + rows.square().sum() - 2 * shared).clamp(min=0)


def _root(cov: Tensor) -> Tensor:
    """(E, r) with R R^T = C, r its rank: eigenvectors times roots of eigenvalues, those that are rounding left out."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > max(32, len(values)) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()


def _gaussian(mean: Tensor, cov: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Moments in float64, of shapes that fit."""
    width = mean.shape[0] if mean.ndim == 1 else 0
    if not width or tuple(cov.shape) != (width, width):
        raise ValueError(f"moments are (E,) and (E, E) of one E, got {tuple(mean.shape)} and {tuple(cov.shape)}")
    return _finite(mean, f"{name} mean"), _finite(cov, f"{name} covariance")


def _embeddings(embeddings: Tensor, beside: Tensor | None = None) -> Tensor:
    """(N, E) in float64; of the width of ``beside`` (E,), if given."""
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise ValueError(f"embeddings are (N, E), got {tuple(embeddings.shape)}")
    if beside is not None and embeddings.shape[1] != len(beside):
        raise ValueError(f"embeddings are {embeddings.shape[1]} wide, but the reference or metric {len(beside)}")
    return _finite(embeddings, "embeddings")


def _finite(tensor: Tensor, name: str) -> Tensor:
    """In float64, every number of it finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"Frechet distance: the {name} has numbers that are not finite")
    return tensor.double()
