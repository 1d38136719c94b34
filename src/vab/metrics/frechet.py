"""Frechet distance between two sets of embeddings: how far apart they lie as a whole, each seen as a Gaussian.

All of it in float64 and by symmetric eigenvalues. A general matrix square root, the usual way, returns imaginary parts,
negative distances, or other numbers with another version of its library.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"embeddings are (N, E), got {tuple(embeddings.shape)}")
    if len(embeddings) < 2:
        raise ValueError(f"a covariance needs at least 2 embeddings, got {len(embeddings)}")
    embeddings = _finite(embeddings, "embeddings")
    mean = embeddings.mean(0)
    centred = embeddings - mean
    return mean, centred.T @ centred / (len(embeddings) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Squared Frechet distance of two Gaussians.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2, the last trace being the sum of the roots of the
    eigenvalues.

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
    width = mean1.shape[0] if mean1.ndim == 1 else 0
    shapes = [tuple(tensor.shape) for tensor in (mean1, cov1, mean2, cov2)]
    if not width or shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"moments are (E,) and (E, E) of one E, got {', '.join(map(str, shapes))}")
    mean1, mean2 = _finite(mean1, "first mean"), _finite(mean2, "second mean")
    cov1, cov2 = _finite(cov1, "first covariance"), _finite(cov2, "second covariance")
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # C1^1/2; what is below 0 is rounding
    # The product is symmetric but for rounding, and eigvalsh reads one triangle of it only.
    product = root @ cov2 @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared
    return distance.clamp(min=0)  # for equal Gaussians rounding may step below


def _finite(tensor: Tensor, name: str) -> Tensor:
    """In float64, every number of it finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"Frechet distance: the {name} has numbers that are not finite")
    return tensor.double()
