"""How much a judge's class probabilities differ between a generated sound and the real one of the same video.

The field's tools define KLD differently, so each definition has a name here. All take logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

EPSILON = 1e-6
"""What the variant "softmax_epsilon" adds to the generated probabilities."""


def _softmax(real: Tensor, generated: Tensor) -> Tensor:
    real, generated = real.log_softmax(1), generated.log_softmax(1)
    return (real.exp() * (real - generated)).sum(1).clamp(min=0)  # below 0 is rounding


def _softmax_epsilon(real: Tensor, generated: Tensor) -> Tensor:
    real = real.log_softmax(1)
    return (real.exp() * (real - (generated.softmax(1) + EPSILON).log())).sum(1)


def _sigmoid(real: Tensor, generated: Tensor) -> Tensor:
    present = real.sigmoid() * (F.logsigmoid(real) - F.logsigmoid(generated))
    absent = (-real).sigmoid() * (F.logsigmoid(-real) - F.logsigmoid(-generated))
    return (present + absent).sum(1).clamp(min=0)


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": _softmax,
    "softmax_epsilon": _softmax_epsilon,
    "sigmoid": _sigmoid,
}
VARIANTS = tuple(_FORMULAS)
"""Names of the definitions."""
_UNKNOWN = f"unknown variant of KLD {{!r}}: there is {', '.join(VARIANTS)}"


def paired_kl(real_logits: Tensor, generated_logits: Tensor, variant: str = "softmax") -> Tensor:
    """KL(real || generated) of each pair.

    Args:
        real_logits: (B, L) float, finite. The judge's output for the real sounds, before softmax or sigmoid.
        generated_logits: (B, L) float. The same for the generated sounds, row by row.
        variant: "softmax": of the softmax distributions, exact, by log-softmax (av-benchmark). 0 for equal rows, never
            below.
            "softmax_epsilon": the same with 1e-6 added to the generated probabilities before the logarithm
            (SpecVQGAN, audioldm_eval, audiocraft). Not a true divergence: at most about 13.8 nats, and about -L * 1e-6
            for equal rows.
            "sigmoid": each class present or absent by itself; the sum over classes of the divergences of two-valued
            distributions, exact. (The "KL sigmoid" of audioldm_eval leaves out the half of absent classes.)

    Returns:
        (B,) float64, nats; lower is better. The mean over pairs is the KLD of the field.

    Raises:
        ValueError: If the shapes differ, there are no classes, a number is not finite, or the variant is unknown.
    """
    if variant not in _FORMULAS:
        raise ValueError(_UNKNOWN.format(variant))
    if real_logits.ndim != 2 or real_logits.shape != generated_logits.shape or not real_logits.shape[1]:
        shapes = f"{tuple(real_logits.shape)} and {tuple(generated_logits.shape)}"
        raise ValueError(f"paired_kl compares logits (B, L) row by row over L classes, got {shapes}")
    for side, logits in (("real", real_logits), ("generated", generated_logits)):
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"paired_kl: the {side} logits have numbers that are not finite")
    return _FORMULAS[variant](real_logits.double(), generated_logits.double())


class PairedDivergence(Metric):
    """Mean of ``paired_kl`` over a whole data set: float64 sums, equal on any split over batches and ranks.

    A record that a rank repeats as padding must not be given twice.

    Args:
        variant: As in ``paired_kl``.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    pairs: Tensor

    def __init__(self, variant: str = "softmax") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(_UNKNOWN.format(variant))
        self.variant = variant
        for name in ("total", "pairs"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, real_logits: Tensor, generated_logits: Tensor) -> None:
        """Add a batch of pairs, (B, L) logits each, B >= 0; errors as in ``paired_kl``."""
        self.total += paired_kl(real_logits, generated_logits, self.variant).sum()
        self.pairs += len(real_logits)

    def compute(self) -> Tensor:
        """The mean, scalar float64, nats.

        Raises:
            ValueError: If there is no pair.
        """
        if not self.pairs > 0:
            raise ValueError("no pair was compared: there is no divergence to report")
        return self.total / self.pairs
