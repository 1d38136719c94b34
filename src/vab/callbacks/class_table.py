"""What a classification knows of each class: tables beside the checkpoints, and a confusion matrix in TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vab.callbacks.pictures import confusion_figure
from vab.callbacks.tensorboard import tensorboards
from vab.files import write_atomically
from vab.spec import UserError
from vab.tasks import ClassifyTask

TABLE, FIGURES = "classes.csv", "figures.json"
_COLUMNS = ("records", "top_1", "average_precision", "roc_auc", "d_prime")
_DRAWN = 50
"""Classes that a picture can show."""


class ClassTable(Callback):
    """After each validation: ``classes.csv`` and ``figures.json`` in the run's folder, and a confusion matrix.

    The matrix is for records of one class; of more than 50 classes it shows those that are confused most. A cell that
    is empty in the table is a figure that this class does not have, such as one without a record.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that has no classes."""
        if not isinstance(pl_module, ClassifyTask):
            raise UserError(f"ClassTable is for a ClassifyTask, not {type(pl_module).__name__}: leave the callback out")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both, on the first rank."""
        assert isinstance(pl_module, ClassifyTask)
        # Without a logger log_dir is the folder one is in, into which only a training may write.
        writes = trainer.state.fn == TrainerFn.FITTING or bool(trainer.loggers)
        folder = Path(trainer.log_dir or ".") if writes else None  # which all ranks must ask for
        if not trainer.is_global_zero or trainer.sanity_checking or not pl_module.figures:
            return
        figures, labels, loggers = pl_module.figures, pl_module.labels, tensorboards(trainer)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / TABLE, class_csv(labels, figures))
            whole = {name: value.item() for name, value in figures.items() if value.ndim == 0}
            whole = {"step": trainer.global_step, "records": int(figures["records"]), "labels": len(labels)} | whole
            write_atomically(folder / FIGURES, (json.dumps(whole, indent=1) + "\n").encode())
        if "confusion_matrix" in figures and loggers:
            counts = figures["confusion_matrix"].cpu()
            drawn = _most_confused(counts, _DRAWN)
            title = f"validation, step {trainer.global_step}"
            if len(drawn) < len(labels):
                title += f": the {len(drawn)} of {len(labels)} classes most often confused"
            picture = confusion_figure(counts[drawn][:, drawn], [labels[i] for i in drawn.tolist()], title)
            for logger in loggers:
                logger.experiment.add_image("confusion", picture, trainer.global_step, dataformats="HWC")


def class_csv(labels: tuple[str, ...], figures: dict[str, Tensor]) -> str:
    """The figures of each class that ``Classification`` found, as a CSV: a line for each, in the vocabulary's order."""
    columns = [figures.get(f"{name}_per_class") for name in _COLUMNS]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *_COLUMNS])
    for number, label in enumerate(labels):
        cells = [None if column is None else column[number].item() for column in columns]
        writer.writerow([label, *("" if cell is None or cell != cell else f"{cell:.6g}" for cell in cells)])
    return text.getvalue()


def _most_confused(counts: Tensor, most: int) -> Tensor:
    """Numbers of the classes, in order, that have the most records in wrong cells; all if there are no more."""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return torch.sort(torch.argsort(wrong, descending=True, stable=True)[:most]).values
