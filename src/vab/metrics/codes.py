"""Loss and accuracy of predicted codes over a data set, per level and per share of hidden codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BUCKETS = 10
"""Number of intervals of the share of hidden codes."""


def guessing_table(per_level: Tensor, per_bucket: Tensor) -> dict[str, Tensor]:
    """Means from sums; levels and intervals without hidden codes are left out.

    Give sums on the CPU: which of them are left out depends on their values, and on a GPU the host would wait for each.

    Args:
        per_level: (K, 3) float64. Of each level: negative log-likelihood in nats, right predictions, hidden codes.
        per_bucket: (BUCKETS, 3) float64. The same of the records in each interval of the share of hidden codes.

    Returns:
        Scalars on the CPU, named ``loss``, ``accuracy``, ``loss_level_0``, ..., ``loss_hidden_50_60``, ...; nats, and
        shares of 1.
    """
    suffixes = ["", *(f"_level_{level}" for level in range(len(per_level)))]
    suffixes += [f"_hidden_{bucket * 100 // BUCKETS}_{(bucket + 1) * 100 // BUCKETS}" for bucket in range(BUCKETS)]
    rows = torch.cat([per_level.sum(0, keepdim=True), per_level, per_bucket]).cpu()  # one copy from the device
    table: dict[str, Tensor] = {}
    for suffix, (nll, correct, hidden) in zip(suffixes, rows, strict=True):
        if hidden > 0:
            table[f"loss{suffix}"] = nll / hidden
            table[f"accuracy{suffix}"] = correct / hidden
    return table


class GuessingQuality(Metric):
    """``guessing_table`` over a whole data set: streamed in float64 sums, equal on any split over batches and ranks."""

    full_state_update = False
    per_level: Tensor
    per_bucket: Tensor

    def __init__(self, num_codebooks: int) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("per_level", torch.zeros(num_codebooks, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("per_bucket", torch.zeros(BUCKETS, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, per_level: Tensor, per_bucket: Tensor) -> None:
        """Add a batch's sums; shapes as in ``guessing_table``."""
        self.per_level += per_level
        self.per_bucket += per_bucket

    def compute(self) -> dict[str, Tensor]:
        """The table.

        Raises:
            ValueError: If no hidden code was counted.
        """
        per_level, per_bucket = torch.cat([self.per_level, self.per_bucket]).cpu().split((len(self.per_level), BUCKETS))
        if not per_level[:, 2].sum() > 0:
            raise ValueError("no hidden code was counted: there is nothing to report")
        return guessing_table(per_level, per_bucket)
