"""The loss and the metrics of a training step. The host waits for the device once, and only at steps that log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from vab.lightning_internals import is_accumulating, log_numbers


class StepMetrics(LightningModule):
    """The part of a task that takes the loss of each batch and logs what a training step measures.

    ``self.log`` would copy each value from the device by itself, and the host would wait at each copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self._losses_of_step: list[Tensor] = []  # of each batch: loss times weight, and weight
        self._to_log: list[tuple[Tensor, Callable[[Tensor], Mapping[str, float]]]] = []
        self.step_loss: Tensor | None = None
        """Scalar: the loss of the last optimizer step, over all its batches; over all ranks too if the step logs."""

    @property
    def logs_this_step(self) -> bool:
        """Whether the trainer will write what this training step logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def on_fit_start(self) -> None:
        """Forget the batches of a run that was stopped within a step."""
        self._losses_of_step.clear()
        self._to_log.clear()
        super().on_fit_start()

    def take_loss(self, loss: Tensor, weight: Tensor | None = None) -> Tensor:
        """Turn a batch's loss into what ``training_step`` returns, and log the loss of the whole optimizer step.

        What is logged is the mean over all batches and ranks of the step. The gradient is that of loss times weight,
        whose mean over batches and ranks the trainer takes. If a weight is a number of terms over a constant, it is the
        sum of all terms over a constant, on any split of the same records over batches and ranks.

        Args:
            loss: Scalar, a mean over the terms of the batch.
            weight: Scalar: the number of terms over the number that is expected. None if all batches have equally many.
        """
        weight = torch.ones_like(loss) if weight is None else weight
        self._losses_of_step.append(torch.stack((loss * weight, weight)).detach().float())
        if not is_accumulating(self.trainer):
            self._log_loss()
        # A loss that is not finite makes the gradient NaN, by which all ranks know of it.
        return loss * (weight + 0 * loss.detach())

    def _log_loss(self) -> None:
        sums = torch.stack(self._losses_of_step).sum(0)
        self._losses_of_step.clear()
        logs, world_size = self.logs_this_step, self.trainer.world_size
        if logs and world_size > 1:
            torch.distributed.all_reduce(sums)  # not strategy.reduce, which begins with a barrier: the host would wait
        self.step_loss = sums[0] / sums[1]
        if logs or world_size == 1:
            self.log("train/loss", self.step_loss, logger=False)  # for callbacks that monitor it
        if logs:
            self.log_after_step(self.step_loss, "train/loss")

    def log_after_step(self, value: Tensor, metrics: str | Callable[[Tensor], Mapping[str, float]]) -> None:
        """Log a value of this training step once the step is done. All such values are copied to the host at once.

        Call it at steps that log only (`logs_this_step`).

        Args:
            value: A tensor on the device.
            metrics: The name of a scalar; or a function that takes the tensor's copy on the host, (float64, the same
                shape), and returns names and numbers. It is called once the device has finished the step.
        """
        function = metrics if callable(metrics) else lambda copied: {metrics: float(copied)}
        self._to_log.append((value.detach(), function))

    def on_train_batch_end(self, *unused: Any) -> None:
        """Copy what this step logs to the host, and write it. A subclass that has this hook must call this one."""
        if not self._to_log or is_accumulating(self.trainer):
            return
        values, functions = zip(*self._to_log, strict=True)
        self._to_log.clear()
        flat = torch.cat([value.double().flatten() for value in values]).cpu()
        copies = flat.split([value.numel() for value in values])
        numbers: dict[str, float] = {}
        for copied, value, function in zip(copies, values, functions, strict=True):
            numbers.update(function(copied.view(value.shape)))
        log_numbers(self.trainer, numbers)
