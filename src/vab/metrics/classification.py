"""How well classes are told apart: average precision, ROC AUC, d-prime, top-k accuracy, confusion.

One definition for one and for several labels a record. Scores are logits or probabilities: only their order counts, so
a softmax or a sigmoid changes nothing but top-k across classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from vab.metrics.records import each_once, joined

TOP = (1, 5)
"""Top-k accuracy is told for these k."""
_COLUMNS = 64  # classes sorted at once: bounds the memory of large vocabularies


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class: the area under its precision-recall curve, as steps.

    The sum over thresholds of precision times the gain in recall; records of equal score enter together, as in
    scikit-learn's ``average_precision_score``, so the order of a file cannot matter.

    Args:
        scores: (N, L) float. Higher = more likely.
        targets: (N, L) bool. The true classes of each record.

    Returns:
        (L,) float64 in (0, 1]; NaN for a class with no record, whose precision is defined nowhere.

    Raises:
        ValueError: If the shapes do not fit, there is no record, or a score is NaN.
    """
    _check(scores, targets)
    values = [
        _precision(*columns)
        for columns in zip(scores.split(_COLUMNS, dim=1), targets.split(_COLUMNS, dim=1), strict=True)
    ]
    return torch.cat(values)


def _precision(scores: Tensor, targets: Tensor) -> Tensor:
    ordered, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double()  # (N, columns)
    last = _last_of_ties(ordered)
    found = hits.cumsum(0).gather(0, last)  # true ones down to the end of each one's ties
    return (hits * found / (last + 1)).sum(0) / hits.sum(0)


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under each class's ROC curve: how often a true record scores above a false one; equal scores count half.

    Args:
        scores: (N, L) float.
        targets: (N, L) bool.

    Returns:
        (L,) float64 in [0, 1], 0.5 by chance; NaN for a class that no record has, or that all have.

    Raises:
        ValueError: As for ``average_precision``.
    """
    _check(scores, targets)
    values = []
    for part, truth in zip(scores.split(_COLUMNS, dim=1), targets.split(_COLUMNS, dim=1), strict=True):
        ordered, order = part.sort(dim=0)
        hits = truth.gather(0, order).double()
        last = _last_of_ties(ordered)
        first = len(part) - 1 - _last_of_ties(ordered.flip(0)).flip(0)
        place = (first + last).double() / 2 + 1  # 1 = lowest score; ties share their mean place
        positives = hits.sum(0)
        pairs = positives * (len(part) - positives)
        values.append(((hits * place).sum(0) - positives * (positives + 1) / 2) / pairs)
    return torch.cat(values)


def _last_of_ties(ordered: Tensor) -> Tensor:
    """(N, L) int64: for each row of sorted columns the last row of equal value."""
    count = len(ordered)
    rows = torch.arange(count, device=ordered.device)[:, None].expand_as(ordered)
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    return rows.where(ends, rows.new_full((), count)).flip(0).cummin(0).values.flip(0)


def d_prime(auc: Tensor) -> Tensor:
    """Separation of two normal distributions, in standard deviations, that would have this area under the curve.

    Args:
        auc: float in [0, 1].

    Returns:
        float64 of the same shape: sqrt(2) times the inverse normal distribution. 0 by chance; infinite for a perfect
        area, -infinite for 0.

    Source: Gemmeke et al. 2017 and the AudioSet literature since.
    """
    return math.sqrt(2) * torch.special.ndtri(auc.double())


def top_k_correct(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each record's class is among its k highest scores.

    Ties count against: it is so if fewer than k other classes score at least as high. A network that gives all classes
    one score is right nowhere.

    Args:
        scores: (N, L) float.
        labels: (N,) int64 in [0, L). The one true class of each record.
        k: 1 or more.

    Returns:
        (N,) bool.

    Raises:
        ValueError: If the shapes do not fit, there is no record, a score is NaN, or a label is no class.
    """
    if scores.ndim != 2 or tuple(labels.shape) != (len(scores),) or 0 in scores.shape or k < 1:
        shapes = f"{tuple(scores.shape)}, {tuple(labels.shape)} and k = {k}"
        raise ValueError(f"top-k takes scores (N, L), labels (N,) and k of 1 or more, got {shapes}")
    _in_vocabulary(labels, scores.shape[1])
    if bool(scores.isnan().any()):
        raise ValueError("scores are NaN: they have no order")
    own = scores.gather(1, labels[:, None])
    return (scores >= own).sum(1) - 1 < k  # less the class itself


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Share of records that ``top_k_correct`` finds right; scalar float64."""
    return top_k_correct(scores, labels, k).double().mean()


def confusion_matrix(predicted: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """How often each class was taken for each.

    Args:
        predicted: (N,) int64 in [0, L).
        true: (N,) int64 in [0, L).
        num_classes: L.

    Returns:
        (L, L) int64: row = true class, column = predicted one. Rows sum to the records of each class.

    Raises:
        ValueError: If the shapes differ, or a number is no class.
    """
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError(f"confusion_matrix compares (N,) with (N,), got {(*predicted.shape,)} and {(*true.shape,)}")
    for labels in (predicted, true):
        _in_vocabulary(labels, num_classes)
    counts = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class ClassTable:
    """What is known of each class. A class is counted if some record has it and some has not; others are NaN."""

    classes: tuple[str, ...]
    """L names."""
    positives: Tensor
    """(L,) int64: records of each class."""
    average_precision: Tensor
    """(L,) float64; NaN for classes not counted, in all columns."""
    roc_auc: Tensor
    """(L,) float64."""
    d_prime: Tensor
    """(L,) float64."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the classes that are not counted."""
        return tuple(name for name, auc in zip(self.classes, self.roc_auc.tolist(), strict=True) if math.isnan(auc))

    def macro(self) -> dict[str, Tensor]:
        """Means over the counted classes, each weighing the same.

        Returns:
            float64 scalars: ``map``, ``roc_auc``, and ``d_prime``, that of the mean area, as AudioSet papers report it:
            the mean of the classes' own is mostly larger, and infinite once one class is perfect.

        Raises:
            ValueError: If no class is counted.
        """
        counted = ~self.roc_auc.isnan()
        if not bool(counted.any()):
            raise ValueError("no class has both records that are of it and records that are not")
        auc = self.roc_auc[counted].mean()
        return {"map": self.average_precision[counted].mean(), "roc_auc": auc, "d_prime": d_prime(auc)}


def class_table(scores: Tensor, targets: Tensor, classes: Sequence[str] | None = None) -> ClassTable:
    """Average precision, ROC AUC and d-prime of each class.

    Args:
        scores: (N, L) float.
        targets: (N, L) bool.
        classes: L names; "0", "1", ... if None.

    Raises:
        ValueError: If the shapes do not fit, there is no record, a score is NaN, or there are not L names.
    """
    names = tuple(map(str, range(scores.shape[-1]))) if classes is None else tuple(classes)
    precision, auc = average_precision(scores, targets), roc_auc(scores, targets)
    if len(names) != len(auc):
        raise ValueError(f"got scores of {len(auc)} classes and {len(names)} names")
    precision = precision.masked_fill(auc.isnan(), math.nan)  # a class that all records have is no task
    return ClassTable(names, targets.sum(0), precision, auc, d_prime(auc))


class Classification(Metric):
    """All of this over a whole data set, each record once, on any number of ranks.

    Average precision needs all scores in one order, so they are kept (float32, N * L * 4 bytes) and gathered with their
    record numbers. Where one rank has nothing to add, give it an update with (0, L) tensors.

    Args:
        classes: Names of the classes, or how many there are.
    """

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]
    index: list[Tensor]

    def __init__(self, classes: Sequence[str] | int) -> None:
        super().__init__()
        self.classes = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        for name in ("scores", "targets", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor, index: Tensor) -> None:
        """Keep a batch.

        Args:
            scores: (B, L) float.
            targets: (B, L) bool, or (B,) int64 in [0, L) where each record has one class.
            index: (B,) int64. Numbers of the records.

        Raises:
            ValueError: If the shapes do not fit, or a label is no class.
        """
        width = len(self.classes)
        if targets.ndim == 1 and targets.dtype != torch.bool:
            _in_vocabulary(targets, width)
            targets = torch.nn.functional.one_hot(targets, width).bool()
        shape = (len(index), width)
        if tuple(scores.shape) != shape or tuple(targets.shape) != shape or targets.dtype != torch.bool:
            shapes = f"{tuple(scores.shape)}, {tuple(targets.shape)} {targets.dtype} and {tuple(index.shape)}"
            raise ValueError(
                f"Classification takes (B, {width}) scores and bool targets, and (B,) numbers, got {shapes}"
            )
        self.scores.append(scores.detach().float())
        self.targets.append(targets.to(torch.uint8))  # not every backend gathers bool
        self.index.append(index)

    def compute(self) -> dict[str, Tensor]:
        """Figures of the whole, and of each class.

        Returns:
            Scalars ``map``, ``roc_auc``, ``d_prime`` (see ``ClassTable.macro``), ``classes_counted``, ``records``;
            vectors (L,) ``average_precision_per_class``, ``roc_auc_per_class``, ``d_prime_per_class`` (NaN where not
            counted) and ``records_per_class``. Where every record has one class also ``top_1``, ``top_5`` (of records),
            ``top_1_macro`` (mean over the classes that have records), ``top_1_per_class`` (L,) (NaN for those that have
            none) and ``confusion_matrix`` (L, L), its predictions the highest score, of equal ones a wrong class: its
            diagonal is ``top_1``.
            A top k not below L is left out: it is 1 whatever the scores.

        Raises:
            ValueError: If there is no record, a score is NaN, or no class is counted.
        """
        gathered = [joined(state) for state in (self.index, self.scores, self.targets)]
        if not len(gathered[0]):
            raise ValueError("no record was scored: there is nothing to report")
        scores, targets = each_once(*gathered)
        targets = targets.bool()
        table = class_table(scores, targets, self.classes)
        figures = table.macro() | {
            "classes_counted": (~table.roc_auc.isnan()).sum(),
            "records": torch.tensor(len(scores)),
            "average_precision_per_class": table.average_precision,
            "roc_auc_per_class": table.roc_auc,
            "d_prime_per_class": table.d_prime,
            "records_per_class": table.positives,
        }
        if bool((targets.sum(1) == 1).all()):
            figures |= _one_label(scores, targets.to(torch.uint8).argmax(1))
        return figures


def _one_label(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What needs one true class a record."""
    width = scores.shape[1]
    figures = {f"top_{k}": top_k_accuracy(scores, labels, k) for k in TOP if k < width}
    records, correct = labels.bincount(minlength=width), top_k_correct(scores, labels)
    share = labels.bincount(correct.double(), minlength=width) / records
    others = scores.scatter(1, labels[:, None], -math.inf).argmax(1)  # of a tie the wrong class, as top 1 has it
    return figures | {
        "top_1_macro": share[records > 0].mean(),
        "top_1_per_class": share,
        "confusion_matrix": confusion_matrix(torch.where(correct, labels, others), labels, width),
    }


def _check(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != targets.shape or 0 in scores.shape or targets.dtype != torch.bool:
        shapes = f"{tuple(scores.shape)} and {tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"classes take scores (N, L) and bool targets of the same shape, got {shapes}")
    if bool(scores.isnan().any()):
        raise ValueError("scores are NaN: they have no order")


def _in_vocabulary(labels: Tensor, num_classes: int) -> None:
    if len(labels) and not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
