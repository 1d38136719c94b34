"""How differently a judge hears a generated sound and the real one of the same video."""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-6
"""Probabilities below this read as this, so that no logarithm is infinite. A pair is at most 13.8 nats apart."""


def paired_kl(real_probabilities: Tensor, generated_probabilities: Tensor) -> Tensor:
    """KL(real || generated) of each pair.

    Both sides are raised to `SMALLEST` and divided by their sum, so the result is a divergence proper: 0 for equal
    rows, never below. The change from the exact value is of the order of L * `SMALLEST` where nothing is near 0.

    Args:
        real_probabilities: (B, L) float. What the judge hears in the real sounds: softmax outputs, rows summing to 1.
        generated_probabilities: (B, L) float. The same for the generated sounds, row by row.

    Returns:
        (B,) float64, nats; lower is better. The mean over pairs is the KLD of the field.

    Raises:
        ValueError: If the shapes differ, or a row is no distribution.
    """
    if real_probabilities.ndim != 2 or real_probabilities.shape != generated_probabilities.shape:
        shapes = f"{tuple(real_probabilities.shape)} and {tuple(generated_probabilities.shape)}"
        raise ValueError(f"paired_kl compares probabilities (B, L) row by row, got {shapes}")
    real, generated = (_distribution(side) for side in (real_probabilities, generated_probabilities))
    return (real * (real.log() - generated.log())).sum(1).clamp(min=0)  # below 0 is rounding


def _distribution(probabilities: Tensor) -> Tensor:
    """Rows in float64, above 0 everywhere and summing to 1."""
    rows = probabilities.double()
    # Logits or sigmoid outputs would give a number, too, but not this one.
    if not bool(((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-3)).all()):
        raise ValueError("paired_kl takes class probabilities: 0 or above, each row summing to 1")
    rows = rows.clamp(min=SMALLEST)
    return rows / rows.sum(1, keepdim=True)
