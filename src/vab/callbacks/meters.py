"""How fast a run is, what it waits for and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from vab.engines import whole
from vab.spec import Batch
from vab.tasks import BaseTask


class Meters(Callback):
    """Speed, the share of time spent waiting for data, memory, the gradient's norm, the learning rate."""

    def __init__(self) -> None:
        self._positions = self._steps = 0
        self._waited = 0.0
        self._since = self._batch_end = 0.0
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = self._batch_end = time.perf_counter()
        self._positions, self._waited, self._interrupted = 0, 0.0, False
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Between two batches the trainer waits for the loader, if it was not validating or saving."""
        if self._interrupted:
            self.on_train_start(trainer, pl_module)
        self._waited += time.perf_counter() - self._batch_end

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the norm before it is clipped."""
        if isinstance(pl_module, BaseTask) and pl_module.logs_this_step:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            pl_module.log("train/gradient_norm", whole(torch.nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log rates over the steps since the last log."""
        self._positions += len(batch) * (batch.codes.shape[-1] + batch.features.shape[1])
        self._batch_end = time.perf_counter()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0 and trainer.global_step > self._steps:
            elapsed = self._batch_end - self._since
            pl_module.log("meters/positions_per_second", self._positions * trainer.world_size / elapsed)
            pl_module.log("meters/seconds_per_step", elapsed / max(1, trainer.global_step - self._steps))
            pl_module.log("meters/data_wait_share", self._waited / elapsed)
            pl_module.log("meters/peak_memory_gib", peak_memory(pl_module.device) / 2**30)
            pl_module.log("meters/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])
            self._positions, self._waited, self._since = 0, 0.0, self._batch_end
            self._steps = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time spent validating, and saving after it, is not training time."""
        self._interrupted = True


def peak_memory(device: torch.device) -> int:
    """Bytes taken so far at most: of a GPU by this process's tensors, else of main memory by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
