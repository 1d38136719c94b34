"""Metrics of classification: average precision, ROC AUC, d-prime, top-k accuracy, confusion matrix.

The definitions hold for one and for several labels a record. Scores are logits or probabilities: only their order
counts, so a softmax or a sigmoid changes nothing but top-k across classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vab.metrics.records import RecordRows

TOP = (1, 5)
"""Top-k accuracy is reported for these k."""


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class: the area under its precision-recall curve, as steps.

    The mean over the records of a class of the precision at their score. Records of equal score enter together, as in
    scikit-learn's ``average_precision_score``, so the order of a file cannot matter. (torchmetrics' is float32, puts
    logits through a sigmoid that makes large ones equal, and gives 0 for a class without records.)

    Args:
        scores: (N, L) float. Higher = more likely.
        targets: (N, L) bool. The true classes of each record.

    Returns:
        (L,) float64 in (0, 1]; NaN for a class without records, whose precision is not defined.

    Raises:
        ValueError: If the shapes do not fit, there is no record, or a score is NaN.
    """
    values = []
    for column, truth in _classes(scores, targets):
        own = column[truth].sort().values
        true = len(own) - torch.searchsorted(own, own)  # records of the class that score at least as high
        among = len(column) - torch.searchsorted(column.sort().values, own)  # all records that do
        values.append((true.double() / among).mean())
    return torch.stack(values)


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
    values = []
    for column, truth in _classes(scores, targets):
        own, others = column[truth], column[~truth].sort().values
        below = torch.searchsorted(others, own) + torch.searchsorted(others, own, right=True)  # twice as many
        values.append(below.double().mean() / (2 * len(others)))
    return torch.stack(values)


def d_prime(auc: Tensor) -> Tensor:
    """The separation of two normal distributions, in standard deviations, with this area under the curve.

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

    Ties count against: fewer than k other classes may score at least as high. A network that gives all classes the same
    score is never right. (torchmetrics takes the lowest class number.)

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
    """How often each class was predicted for each true class.

    Args:
        predicted: (N,) int64 in [0, L).
        true: (N,) int64 in [0, L).
        num_classes: L.

    Returns:
        (L, L) int64: row = true class, column = predicted class.

    Raises:
        ValueError: If the shapes differ, or a number is no class.
    """
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError(f"confusion_matrix compares (N,) with (N,), got {(*predicted.shape,)} and {(*true.shape,)}")
    for labels in (predicted, true):
        _in_vocabulary(labels, num_classes)
    counts = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


class Classification(RecordRows):
    """All of this over a whole data set, each record once, on any number of ranks.

    Average precision needs all scores in one order, so they are kept: float32, N * L * 4 bytes.

    Args:
        classes: Names of the L classes, or how many there are.
    """

    columns = ("scores", "targets")

    def __init__(self, classes: Sequence[str] | int) -> None:
        super().__init__()
        self.width = classes if isinstance(classes, int) else len(classes)

    def update(self, scores: Tensor, targets: Tensor, index: Tensor) -> None:
        """Keep a batch.

        Args:
            scores: (B, L) float.
            targets: (B, L) bool, or (B,) int64 in [0, L) where each record has one class.
            index: (B,) int64. Numbers of the records.

        Raises:
            ValueError: If the shapes do not fit, or a label is no class.
        """
        if targets.ndim == 1 and targets.dtype != torch.bool:
            _in_vocabulary(targets, self.width)
            targets = torch.nn.functional.one_hot(targets, self.width).bool()
        shape = (len(index), self.width)
        if tuple(scores.shape) != shape or tuple(targets.shape) != shape or targets.dtype != torch.bool:
            shapes = f"{tuple(scores.shape)}, {tuple(targets.shape)} {targets.dtype} and {tuple(index.shape)}"
            raise ValueError(
                f"Classification takes (B, {self.width}) scores and bool targets, and (B,) numbers, got {shapes}"
            )
        self.keep(index, scores=scores.float(), targets=targets.to(torch.uint8))  # not every backend gathers bool

    def compute(self) -> dict[str, Tensor]:
        """Metrics of the whole data set, and of each class.

        A class is counted if some record has it and some record has not.

        Returns:
            Scalars: ``map`` and ``roc_auc``, means over the counted classes; ``d_prime`` of the mean area, as AudioSet
            papers report it (the mean of the classes' own is mostly larger, and infinite once one class is perfect);
            ``classes_counted``, ``records``.
            Vectors (L,): ``average_precision_per_class``, ``roc_auc_per_class``, ``d_prime_per_class`` (NaN where not
            counted) and ``records_per_class``.
            Where every record has one class also ``top_1``, ``top_5`` (of records; left out unless k < L),
            ``top_1_macro`` (mean over the classes that have records), ``top_1_per_class`` (L,) (NaN for those without)
            and ``confusion_matrix`` (L, L), whose predictions are the highest score and, of equal ones, a wrong class:
            the sum of its diagonal gives ``top_1``.

        Raises:
            ValueError: If there is no record, a score is NaN, or no class is counted.
        """
        _, scores, targets = self.rows()
        targets = targets.bool()
        auc = roc_auc(scores, targets)
        counted = ~auc.isnan()
        if not bool(counted.any()):
            raise ValueError("no class has both records that are of it and records that are not")
        precision = average_precision(scores, targets).masked_fill(~counted, math.nan)
        metrics = {
            "map": precision[counted].mean(),
            "roc_auc": auc[counted].mean(),
            "d_prime": d_prime(auc[counted].mean()),
            "classes_counted": counted.sum(),
            "records": torch.tensor(len(scores)),
            "average_precision_per_class": precision,
            "roc_auc_per_class": auc,
            "d_prime_per_class": d_prime(auc),
            "records_per_class": targets.sum(0),
        }
        if bool((targets.sum(1) == 1).all()):
            metrics |= _one_label(scores, targets.to(torch.uint8).argmax(1))
        return metrics


def _one_label(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Metrics that need one true class a record."""
    width = scores.shape[1]
    top = {f"top_{k}": top_k_accuracy(scores, labels, k) for k in TOP if k < width}
    records, correct = labels.bincount(minlength=width), top_k_correct(scores, labels)
    hits = torch.zeros(width, dtype=torch.float64, device=labels.device)
    share = hits.index_add(0, labels, correct.double()) / records  # bincount has no deterministic kernel on GPUs
    others = scores.scatter(1, labels[:, None], -math.inf).argmax(1)  # of equal scores the wrong class, as for top 1
    return top | {
        "top_1_macro": share[records > 0].mean(),
        "top_1_per_class": share,
        "confusion_matrix": confusion_matrix(torch.where(correct, labels, others), labels, width),
    }


def _classes(scores: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each class in turn scores (N,) and truth (N,) bool; errors as for ``average_precision``."""
    if scores.ndim != 2 or scores.shape != targets.shape or 0 in scores.shape or targets.dtype != torch.bool:
        shapes = f"{tuple(scores.shape)} and {tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"classes take scores (N, L) and bool targets of the same shape, got {shapes}")
    if bool(scores.isnan().any()):
        raise ValueError("scores are NaN: they have no order")
    return zip(scores.unbind(1), targets.unbind(1), strict=True)


def _in_vocabulary(labels: Tensor, num_classes: int) -> None:
    if len(labels) and not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
