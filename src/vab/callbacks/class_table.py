"""Metrics of each class: a table beside the checkpoints, and a confusion matrix in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vab.callbacks.pictures import confusion_figure
from vab.callbacks.tensorboard import tensorboards
from vab.files import csv_text, write_atomically
from vab.spec import UserError
from vab.tasks import ClassifyTask

TABLE, METRICS = "classes.csv", "figures.json"
_COLUMNS = ("records", "top_1", "average_precision", "roc_auc", "d_prime")
_DRAWN = 50
"""Largest number of classes in a picture."""


class ClassTable(Callback):
    """After each validation: ``classes.csv`` and ``figures.json`` in the run's folder, and a confusion matrix.

    The matrix needs records of one class each; of more than 50 classes it shows those most often confused. In the table
    a cell is empty if the class has no such metric, for example if no record is of the class.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that has no classes."""
        if not isinstance(pl_module, ClassifyTask):
            raise UserError(f"ClassTable is for a ClassifyTask, not {type(pl_module).__name__}: leave the callback out")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both, on the first rank."""
        assert isinstance(pl_module, ClassifyTask)
        # Without a logger log_dir is the current folder, into which only a training may write.
        writes = trainer.state.fn == TrainerFn.FITTING or bool(trainer.loggers)
        folder = Path(trainer.log_dir or ".") if writes else None  # all ranks must ask for it
        metrics, labels, loggers = pl_module.last_metrics, pl_module.labels, tensorboards(trainer)
        if not trainer.is_global_zero or trainer.sanity_checking or not metrics:
            return
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / TABLE, class_csv(labels, metrics))
            whole = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
            whole = {"step": trainer.global_step, "records": int(metrics["records"]), "labels": len(labels)} | whole
            write_atomically(folder / METRICS, json.dumps(whole, indent=1) + "\n")
        if "confusion_matrix" in metrics and loggers:
            counts = metrics["confusion_matrix"].cpu()
            drawn = _most_confused(counts, _DRAWN)
            title = f"validation, step {trainer.global_step}"
            if len(drawn) < len(labels):
                title += f": the {len(drawn)} of {len(labels)} classes most often confused"
            picture = confusion_figure(counts[drawn][:, drawn], [labels[i] for i in drawn.tolist()], title)
            for logger in loggers:
                logger.experiment.add_image("confusion", picture, trainer.global_step, dataformats="HWC")


def class_csv(labels: tuple[str, ...], metrics: dict[str, Tensor]) -> str:
    """The metrics of each class from ``Classification`` as a CSV: a line for each, in the vocabulary's order."""
    empty = [math.nan] * len(labels)
    columns = [metrics[name].tolist() if name in metrics else empty for name in (f"{it}_per_class" for it in _COLUMNS)]
    cells = [[None if cell != cell else f"{cell:.6g}" for cell in column] for column in columns]
    return csv_text([["class", *_COLUMNS], *zip(labels, *cells, strict=True)])


def _most_confused(counts: Tensor, most: int) -> Tensor:
    """Numbers of the ``most`` classes, ascending, with the most records in wrong cells."""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return torch.sort(torch.argsort(wrong, descending=True, stable=True)[:most]).values
