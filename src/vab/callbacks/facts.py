"""What a checkpoint says of the run that it is of, for people who meet it later."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer

from vab import __version__
from vab.data.reading.datamodule import ShardDataModule


def run_facts(trainer: Trainer, validated_step: int | None) -> dict[str, Any]:
    """As plain JSON.

    Args:
        trainer: Of the run.
        validated_step: The step of the last validation, of which the figures are; None if there was none.
    """
    facts: dict[str, Any] = {
        "vab": __version__,
        "torch": str(torch.__version__),  # a class of its own, which no safe loader takes
        "lightning": lightning.__version__,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ShardDataModule):
        facts["records"] = len(data.train_dataset)
        facts["records_per_step"] = data.global_batch_size * trainer.accumulate_grad_batches
    if validated_step is not None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        facts |= {"validated_step": validated_step, "figures": logged}
    return facts
