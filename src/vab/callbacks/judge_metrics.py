"""A judge's metrics of generated sounds against the codec round trips of the same records, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vab.frozen.batches import JudgeOutputs, class_columns, true_classes
from vab.frozen.protocols import Judge
from vab.metrics.agreement import class_agreement
from vab.metrics.classification import confusion_matrix
from vab.metrics.divergence import PairedDivergence
from vab.metrics.frechet import FrechetDistance
from vab.metrics.recall import CUTS, match_ranks
from vab.metrics.records import RecordRows
from vab.spec import UserError


@dataclass(frozen=True)
class JudgedRecords:
    """A judge's outputs record by record, on the CPU; M records in the order of their numbers."""

    index: Tensor
    """(M,) int64."""
    real: Tensor
    """(M, E) float32: mean embedding of each round trip."""
    generated: Tensor
    """(M, E) float32."""
    logits: Tensor
    """(M, L) float32: of the generated sounds."""
    truth: Tensor
    """(M, L) bool: the true classes; all False if the judge does not know the labels."""

    def confusion(self) -> Tensor:
        """(L, L) int64: a record of n true classes counts in n rows, each time as the class of the highest logit."""
        record, true = self.truth.nonzero(as_tuple=True)
        return confusion_matrix(self.logits.argmax(1)[record], true, self.truth.shape[1])

    def ranks(self) -> Tensor | None:
        """(M,) int64: at which place a generated sound finds the round trip of its record; 0 = first.

        None if a sound has an embedding of zeros, which has no direction.
        """
        if not bool((self.real.any(1) & self.generated.any(1)).all()):
            return None
        return match_ranks(self.generated, self.real)

    def metrics(self) -> dict[str, float]:
        """Agreement with the labels, and recall of the record's own round trip; each left out if it has no value."""
        metrics = {}
        known = self.truth.any(1)
        if bool(known.any()):
            metrics["agreement"] = float(class_agreement(self.logits[known], self.truth[known]).mean())
        if (ranks := self.ranks()) is not None:
            metrics |= {f"recall_at_{k}_g2r": float((ranks < k).double().mean()) for k in CUTS if k < len(ranks)}
        return metrics


class _Records(RecordRows):
    columns = ("real", "generated", "logits", "truth")

    def update(self, index: Tensor, **rows: Tensor) -> None:
        """Keep a batch."""
        self.keep(index, **rows)

    def compute(self) -> list[Tensor]:
        """Each record once: the fields of `JudgedRecords`."""
        return [column.cpu() for column in self.rows()]


class JudgeMetrics:
    """A judge with the sums of its metrics; ``update`` after each batch, ``compute`` on all ranks at once."""

    def __init__(self, judge: Judge, labels: Sequence[str], device: torch.device) -> None:
        """Begin.

        Args:
            judge: It runs on the device that it is on.
            labels: Of the data set; agreement is computed if the judge knows them all.
            device: Where ranks exchange their sums: that of the network that is trained.
        """
        self.judge = judge
        self.label_columns: list[int] | None
        """Place of each label among the judge's classes; None if it does not know them all."""
        try:
            self.label_columns = class_columns(judge, labels)
        except UserError:
            self.label_columns = None
        self._distance = FrechetDistance(judge.embedding_dim).to(device)
        self._divergence = PairedDivergence().to(device)
        self._records = _Records().to(device)

    def names(self) -> list[str]:
        """Names of the metrics that each judge has for itself, without ``val/``."""
        kinds = ("fad", "kld") if self.judge.classes else ("fad",)
        return [f"{kind}_{self.judge.name}_to_codec" for kind in kinds]

    def update(self, real: JudgeOutputs, generated: JudgeOutputs, index: Tensor, labels: Tensor) -> None:
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
        if self.label_columns is None:
            truth = torch.zeros(len(labels), len(self.judge.classes), dtype=torch.bool)
        else:
            truth = true_classes(self.judge, self.label_columns, labels)
        means = {"real": _means(real), "generated": _means(generated)}
        self._records.update(index, **means, logits=generated.logits, truth=truth)

    def compute(self) -> tuple[dict[str, float], JudgedRecords]:
        """Metrics by name and the outputs that they rest on; afterwards start again with no records."""
        states = [self._distance, self._divergence]
        metrics = {name: float(state.compute()) for name, state in zip(self.names(), states, strict=False)}
        records = JudgedRecords(*self._records.compute())
        self.reset()
        return metrics, records

    def reset(self) -> None:
        """Forget all records."""
        for state in (self._distance, self._divergence, self._records):
            state.reset()


def empty_outputs(judge: Judge) -> JudgeOutputs:
    """A judge's outputs for no sounds."""
    empty = torch.zeros(0, dtype=torch.int64)
    return JudgeOutputs(torch.zeros(0, judge.embedding_dim), empty, torch.zeros(0, len(judge.classes)))


def _means(outputs: JudgeOutputs) -> Tensor:
    """(B, E): the mean over each sound's windows."""
    parts = outputs.embedding.split(outputs.rows.tolist())
    return torch.stack([part.mean(0) for part in parts]) if len(outputs.rows) else outputs.embedding
