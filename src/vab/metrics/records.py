"""Rows gathered from all ranks, each record counted once."""

from __future__ import annotations

import torch
from torch import Tensor


def each_once(index: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in the order of their record numbers, one for each record.

    Ranks that must take equal steps are given some records twice. A metric that counted them twice, or that depended
    on who had them, would change with the number of ranks.

    Args:
        index: (N,) int64. Number of each row's record, in any order.
        *rows: (N, ...) each. What is known of the records; of a record's rows the first stays.

    Returns:
        As many tensors as ``rows``, (M, ...) for M different records.

    Raises:
        ValueError: If a tensor has not N rows.
    """
    if index.ndim != 1 or any(len(tensor) != len(index) for tensor in rows):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (index, *rows))
        raise ValueError(f"record numbers (N,) and what they number must have equally many rows, got {shapes}")
    if not len(index):
        return rows
    ordered, order = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return tuple(tensor[order[first]] for tensor in rows)


def joined(state: list[Tensor] | Tensor) -> Tensor:
    """All rows of a metric's state: a list of batches on one rank, one tensor once ranks were gathered."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0)
