"""What tasks put on top of the backbone: a mean over positions, and a linear layer in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.precision import full_precision


def sum_over(positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum over each record's valid positions, and their number.

    Args:
        positions: (B, P, D) float. Padding may hold anything.
        lengths: (B,) int64, 0 or more: how many positions are valid, the first ones; None if all are.

    Returns:
        (B, D) and (B, 1) float32; divide them for a mean.
    """
    if lengths is None:
        total = positions.sum(1, dtype=torch.float32)
        return total, total.new_full((len(positions), 1), positions.shape[1])
    return without_padding(positions, lengths).sum(1, dtype=torch.float32), lengths[:, None].to(torch.float32)


def without_padding(positions: Tensor, lengths: Tensor) -> Tensor:
    """(B, P, D) with 0 at and after each record's length, (B,) int64."""
    is_valid = torch.arange(positions.shape[1], device=lengths.device) < lengths[:, None]  # (B, P)
    return positions.masked_fill(~is_valid[..., None], 0.0)


def linear_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32 or wider, also under autocast and with weights in bfloat16.

    For outputs whose order is a metric: in bfloat16 scores are often equal, and ties count against the right one.

    Args:
        layer: (D, E).
        x: (..., D) float.

    Returns:
        (..., E) float32.
    """
    with full_precision(x.device):
        if layer.weight.dtype in (torch.float32, torch.float64):
            scores: Tensor = layer(x.to(layer.weight.dtype))
            return scores.float()
        return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
