"""Checkpoints: when they are saved, and whole files only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from vab.callbacks.generation_eval import GENERATED, GenerationEval
from vab.data.format import write_atomically
from vab.spec import UserError


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints; the run's last step is saved also where no validation fell on it.

    A monitored figure of `GenerationEval` is there only after the validations that it was due at: the others save no
    best checkpoint, and nothing is saved for a figure of earlier weights.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a figure of generated sound that nobody takes, before any time is spent on it.

        Raises:
            UserError: With the names of those that are taken.
        """
        super().on_train_start(trainer, pl_module)
        names = self._figures(trainer)
        if self.monitor and GENERATED.match(self.monitor) and self.monitor not in names:
            there = ", ".join(names) or "none: add vab.callbacks.GenerationEval"
            raise UserError(f"Checkpoints cannot monitor {self.monitor}: the figures of generated sound are {there}")

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save if the figure is one of this moment's weights."""
        if self.monitor in monitor_candidates or self.monitor not in self._figures(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    @staticmethod
    def _figures(trainer: Trainer) -> list[str]:
        """Names that the run's `GenerationEval` callbacks log."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [name for callback in callbacks if isinstance(callback, GenerationEval) for name in callback.names]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``last.ckpt`` if the run has gone on since."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own are written to the system's temporary folder and moved; onto another disk that is a copy, which a
    kill or a full disk leaves in halves under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the final place, then rename. Remote paths (``s3://...``) are left to Lightning.

        Raises:
            UserError: If the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content.getbuffer())
