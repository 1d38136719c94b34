"""The loss and the metrics of a training step. The host waits for the device once, and only at steps that log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from vab.engines import local
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
        """Scalar: the loss of the last optimizer step, over all its batches and ranks."""

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
        """Turn a batch's loss into what ``training_step`` returns; the loss of the whole optimizer step is logged.

        On several ranks, or with accumulated gradients, Lightning averages the losses of batches. If batches differ in
        their numbers of hidden codes, that is not the mean over codes that one large batch has. So each loss is
        multiplied by its weight here, and `on_after_backward` divides the gradient by the weights of all batches.

        Args:
            loss: Scalar, a mean over the batch.
            weight: Scalar, what the mean is over; None if all batches of a step weigh the same.
        """
        trainer = self.trainer
        if trainer.world_size * trainer.accumulate_grad_batches == 1:
            self._log_loss(loss.detach())
            return loss
        if weight is None:
            weight = torch.ones_like(loss)
        loss = loss * weight
        self._losses_of_step.append(torch.stack((loss, weight)).detach().float())
        return loss

    def on_after_backward(self) -> None:
        """When the gradients of an optimizer step are complete, divide them by their weights; see `take_loss`."""
        trainer = self.trainer
        if not self._losses_of_step or is_accumulating(trainer):
            return
        loss, total = self.sum_over_ranks(torch.stack(self._losses_of_step).sum(0))
        self._losses_of_step.clear()
        self._log_loss(loss / total)
        # The trainer has divided by the batches of a step, and the strategy by the ranks.
        factor = trainer.world_size * trainer.accumulate_grad_batches / total
        for parameter in self.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor.to(parameter.grad.dtype))

    def _log_loss(self, loss: Tensor) -> None:
        self.step_loss = loss
        self.log("train/loss", loss, logger=False)  # for callbacks that monitor it
        if self.logs_this_step:
            self.log_after_step(loss, "train/loss")

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place. The host does not wait for the device."""
        # Not strategy.reduce: it begins with a barrier, at which the host waits.
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

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
