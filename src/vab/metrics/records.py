"""Rows of records gathered from all ranks, each record counted once."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class RecordRows(Metric):
    """A metric that needs all records at once: it keeps their rows and gathers them from all ranks.

    If a rank has no records, it must still call ``update`` once, with tensors of 0 rows.
    """

    full_state_update = False
    columns: ClassVar[tuple[str, ...]]
    """Names of what is kept of each record, beside its number."""
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", *self.columns):
            self.add_state(name, [], dist_reduce_fx="cat")

    def keep(self, index: Tensor, **rows: Tensor) -> None:
        """Add a batch: record numbers (B,) int64, and (B, ...) for each of ``columns``."""
        for name, values in ({"index": index} | rows).items():
            getattr(self, name).append(values.detach().to(self.device))

    def rows(self) -> tuple[Tensor, ...]:
        """Record numbers (M,), ascending, and (M, ...) for each of ``columns``; within ``compute``, of all ranks.

        Raises:
            ValueError: If there is no record.
        """
        states = [getattr(self, name) for name in ("index", *self.columns)]
        # One list of batches on one rank, one tensor after ranks were gathered.
        index, *columns = (torch.cat(state) if isinstance(state, list) and state else state for state in states)
        if not len(index):
            raise ValueError("no record was given to the metric: there is nothing to report")
        return each_once(index, index, *columns)


def each_once(index: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in the order of their record numbers, one for each record.

    Ranks that must take equal steps are given some records twice. A metric that counted them twice, or that depended
    on who had them, would change with the number of ranks.

    Args:
        index: (N,) int64. Number of each row's record, in any order.
        *rows: (N, ...) each. Of several rows of one record the first is kept.

    Returns:
        As many tensors as ``rows``, (M, ...) for M different records.

    Raises:
        ValueError: If a tensor does not have N rows.
    """
    if index.ndim != 1 or any(len(tensor) != len(index) for tensor in rows):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (index, *rows))
        raise ValueError(f"record numbers (N,) and what they number must have equally many rows, got {shapes}")
    ordered, order = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return tuple(tensor[order[first]] for tensor in rows)
