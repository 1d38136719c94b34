"""Where a run's sounds, pictures and pages go."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers of a run, whichever of its loggers they are."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
