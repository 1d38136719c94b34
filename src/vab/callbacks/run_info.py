"""Information about a run, stored in its checkpoints."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer

from vab import __version__
from vab.data.reading.datamodule import ShardDataModule


def run_info(trainer: Trainer, validated_step: int | None) -> dict[str, Any]:
    """Collect versions, precision, batch size and the last validation's metrics, as plain JSON.

    Args:
        trainer: Of the run.
        validated_step: The step of the last validation; None if there was none.
    """
    info: dict[str, Any] = {
        "vab": __version__,
        "torch": str(torch.__version__),  # a str subclass that weights_only loading refuses
        "lightning": lightning.__version__,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ShardDataModule):
        info["records"] = len(data.train_dataset)
        info["records_per_step"] = data.global_batch_size
    if validated_step is not None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        info |= {"validated_step": validated_step, "figures": logged}
    return info
