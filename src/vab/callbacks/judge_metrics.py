"""What a judge makes of generated sounds beside the codec round trips of the same records: states over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from vab.frozen.listening import Impressions, class_columns, true_classes
from vab.frozen.protocols import Judge
from vab.metrics.agreement import class_agreement
from vab.metrics.classification import confusion_matrix
from vab.metrics.divergence import PairedDivergence
from vab.metrics.frechet import FrechetDistance
from vab.metrics.recall import CUTS, match_ranks
from vab.metrics.records import each_once
from vab.spec import UserError


@dataclass(frozen=True)
class Rows:
    """What was heard, record by record, on the CPU; M records in the order of their numbers."""

    index: Tensor
    """(M,) int64."""
    real: Tensor
    """(M, E) float32: mean embedding of each round trip."""
    generated: Tensor
    """(M, E) float32."""
    logits: Tensor
    """(M, L) float32: of the generated sounds."""
    truth: Tensor
    """(M, L) bool: the true classes; none anywhere where the judge does not know the labels."""

    def confusion(self) -> Tensor:
        """(L, L) int64: a record of n true classes counts in n rows, each time as what was heard most."""
        record, true = self.truth.nonzero(as_tuple=True)
        return confusion_matrix(self.logits.argmax(1)[record], true, self.truth.shape[1])

    def ranks(self) -> Tensor | None:
        """(M,) int64: at which place a generated sound finds the round trip of its record; 0 = first.

        None where some sound has an embedding of zeros, which is like nothing.
        """
        if not bool((self.real.any(1) & self.generated.any(1)).all()):
            return None
        return match_ranks(self.generated, self.real)


class _Gathered(Metric):
    """Rows of all ranks."""

    full_state_update = False
    index: list[Tensor]
    real: list[Tensor]
    generated: list[Tensor]
    logits: list[Tensor]
    truth: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", "real", "generated", "logits", "truth"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, index: Tensor, **rows: Tensor) -> None:
        """Keep a batch."""
        for name, values in ({"index": index} | rows).items():
            getattr(self, name).append(values.to(self.device))

    def compute(self) -> list[Tensor]:
        """Each record once: the columns of `Rows`."""
        states = (self.index, self.real, self.generated, self.logits, self.truth)
        columns = [state if isinstance(state, Tensor) else torch.cat(state) for state in states]
        return [column.cpu() for column in each_once(columns[0], *columns)]


class Ear:
    """A judge with what it has heard; `update` after each batch, `compute` on all ranks at once."""

    def __init__(self, judge: Judge, labels: Sequence[str], device: torch.device) -> None:
        """Begin.

        Args:
            judge: Listens where it is.
            labels: Of the data set; agreement is known where the judge knows them all.
            device: Where ranks exchange their sums: that of the network that is trained.
        """
        self.judge = judge
        self.columns = _columns(judge, labels)
        self._distance = FrechetDistance(judge.embedding_dim).to(device)
        self._divergence = PairedDivergence().to(device)
        self._rows = _Gathered().to(device)

    def names(self) -> list[str]:
        """Of the figures that only this judge has, without ``val/``."""
        kinds = ("fad", "kld") if self.judge.classes else ("fad",)
        return [f"{kind}_{self.judge.name}_to_codec" for kind in kinds]

    def update(self, real: Impressions, generated: Impressions, index: Tensor, labels: Tensor) -> None:
        """Add records.

        Args:
            real: Of B round trips.
            generated: Of the B sounds made for them.
            index: (B,) int64 numbers of the records.
            labels: (B, number of labels) float of 0 and 1.
        """
        device = self._distance.device
        self._distance.update(real.embedding.to(device), real=True)
        self._distance.update(generated.embedding.to(device), real=False)
        if self.judge.classes:
            self._divergence.update(real.logits.to(device), generated.logits.to(device))
        self._rows.update(
            index,
            real=_pooled(real),
            generated=_pooled(generated),
            logits=generated.logits,
            truth=self._truth(labels),
        )

    def compute(self) -> tuple[dict[str, float], Rows]:
        """Figures by name, and what they rest on; then forget what was heard."""
        states: list[Metric] = [self._distance, *([self._divergence] if self.judge.classes else [])]
        figures = {name: float(state.compute()) for name, state in zip(self.names(), states, strict=True)}
        rows = Rows(*self._rows.compute())
        self.reset()
        return figures, rows

    def reset(self) -> None:
        """Forget what was heard."""
        for state in (self._distance, self._divergence, self._rows):
            state.reset()

    def _truth(self, labels: Tensor) -> Tensor:
        """(B, L) bool."""
        if self.columns is None:
            return torch.zeros(len(labels), len(self.judge.classes), dtype=torch.bool)
        return true_classes(self.judge, self.columns, labels)


def shared_figures(rows: Rows) -> dict[str, float]:
    """What is told once, by the judge that knows the labels best: agreement, and recall of the right record.

    What has no value is left out: agreement without labels, and recall where a sound has no direction.
    """
    figures = {}
    known = rows.truth.any(1)
    if bool(known.any()):
        figures["agreement"] = float(class_agreement(rows.logits[known], rows.truth[known]).mean())
    ranks = rows.ranks()
    if ranks is not None:
        figures |= {f"recall_at_{cut}_g2r": float((ranks < cut).double().mean()) for cut in CUTS if cut < len(ranks)}
    return figures


def nobody(judge: Judge) -> Impressions:
    """What a judge heard in no sound at all."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Impressions(torch.zeros(0, judge.embedding_dim), empty, torch.zeros(0, len(judge.classes)))


def _pooled(heard: Impressions) -> Tensor:
    """(B, E): the mean over each sound's windows."""
    parts = heard.embedding.split(heard.rows.tolist())
    return torch.stack([part.mean(0) for part in parts]) if len(heard.rows) else heard.embedding


def _columns(judge: Judge, labels: Sequence[str]) -> list[int] | None:
    """Where the judge's list has each label; None if it has not all of them."""
    try:
        return class_columns(judge, labels)
    except UserError:
        return None
