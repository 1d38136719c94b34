"""Stopping a run, or skipping a step, when a loss or a gradient is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from vab.callbacks.averaging import EMA
from vab.callbacks.writing import finish_writing
from vab.engines import is_sharded, local
from vab.lightning_internals import loss_scale, unscales_gradients
from vab.spec import UserError
from vab.tasks import BaseTask

_MAX_SKIPPED = 100
"""Steps that may be skipped one after the other."""
_SMALLEST_SCALE = 2.0**-24
"""Loss scale of 16-mixed below which no gradient was finite for some forty steps."""


class NonFiniteError(Exception):
    """A run has diverged. Nothing was saved since."""

    exit_status = 4

    def __init__(self, what: str, step: int, checkpoint: str | None) -> None:
        saved = f"its last good checkpoint is {checkpoint}" if checkpoint else "it has saved no checkpoint"
        super().__init__(
            f"{what} of step {step} is not finite: the run ends, {saved}; lower --model.optimizer.lr, or skip such"
            " steps with --trainer.callbacks+=vab.callbacks.FiniteCheck --trainer.callbacks.action=skip"
        )


class FiniteCheck(Callback):
    """Stops a run at the first loss or gradient norm that is not finite, or skips such steps.

    Nothing is saved from that step on, so the newest checkpoints are good. Weights and their average are checked before
    each checkpoint. A loss that is not finite on one rank makes the gradients NaN on all (`StepMetrics.take_loss`), and
    ranks compare their counts when they read them, so all decide alike. The device counts bad steps; the host reads the
    counts where a step is logged, before a validation and before a checkpoint (on CPUs after each step). In 16-mixed
    the loss scaler itself skips gradients that are not finite; there only the loss is checked, and the scale, which
    must not vanish.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        """Configure the reaction.

        Args:
            action: ``stop`` ends the run. ``skip`` leaves out the optimizer's update, counts it as
                ``train/skipped_steps``, and ends the run after 100 such steps in a row. With an optimizer that is not
                fused, or sharded weights, each step then waits for the GPU.

        Raises:
            UserError: If it is neither.
        """
        if action not in ("stop", "skip"):
            raise UserError(f"FiniteCheck: action must be stop or skip, got {action!r}")
        self.action = action
        self._reported = 0
        self._counts: Tensor | None = None
        """(3,) int64 on the model's device: twice the first bad step, plus 1 if it was the gradient norm; bad steps in
        all, and in a row."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
        self._reported, self._counts = 0, torch.zeros(3, dtype=torch.int64, device=pl_module.device)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Count the step if its loss or gradients are not finite, without waiting for the device (but see ``skip``)."""
        if not isinstance(pl_module, BaseTask) or pl_module.step_loss is None or self._counts is None:
            return
        loss = bad = ~pl_module.step_loss.isfinite()
        is_scaled = loss_scale(trainer) is not None
        if not is_scaled:
            bad = loss | ~pl_module.gradient_norm().isfinite()
        first, count, row = self._counts
        first = torch.where((first == 0) & bad, 2 * (trainer.global_step + 1) + ~loss, first)
        self._counts = torch.stack((first, count + bad, (row + 1) * bad))
        if pl_module.logs_this_step and pl_module.device.type != "cpu":
            pl_module.log_after_step(self._state(trainer), lambda state: self._check(trainer, state))
        if self.action == "stop":
            return
        if pl_module.logs_this_step:
            pl_module.log_after_step(self._counts[1], "train/skipped_steps")
        if is_scaled:
            return
        if unscales_gradients(optimizer) and not is_sharded(pl_module):
            optimizer.found_inf = bad.float()  # its kernel then changes nothing
        elif bad:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        """Read the counts on CPUs.

        Raises:
            NonFiniteError: On all ranks, if the run is to stop.
        """
        if pl_module.device.type == "cpu":
            self.require_finite(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not validate a run that has diverged."""
        self.require_finite(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not report a run that has diverged as finished."""
        self.require_finite(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            NonFiniteError: On all ranks.
        """
        self.require_finite(trainer)
        if self._counts is None:
            return
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        weights = [local(parameter).detach() for parameter in pl_module.parameters()]
        weights += [weight for average in averages for weight in average.weights]
        finite = bool(torch.stack([weight.isfinite().all() for weight in weights]).all())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise NonFiniteError("a weight", trainer.global_step, _last_checkpoint(trainer))

    def require_finite(self, trainer: Trainer) -> None:
        """Read the counts.

        Raises:
            NonFiniteError: On all ranks, if the run is to stop.
        """
        if self._counts is not None:
            self._check(trainer, self._state(trainer).cpu())

    def _state(self, trainer: Trainer) -> Tensor:
        """(ranks, 4) float64 on the model's device: the counts, and the loss scale of 16-mixed."""
        assert self._counts is not None
        scale = loss_scale(trainer)
        counts = self._counts.double()
        state = torch.cat([counts, torch.ones_like(counts[:1]) if scale is None else scale.view(1)])
        gathered: Tensor = trainer.strategy.all_gather(state)
        return gathered.view(-1, 4)

    def _check(self, trainer: Trainer, state: Tensor) -> dict[str, float]:
        """`require_finite` for a copy of `_state` on the host; there is nothing to log."""
        firsts, counts, rows, scales = state.T.tolist()
        first, count, row = min(filter(None, firsts), default=0), max(counts), max(rows)
        if count and (self.action == "stop" or row >= _MAX_SKIPPED):
            what = "the gradient norm" if first % 2 else "the loss"
            raise NonFiniteError(what, int(first // 2), _last_checkpoint(trainer))
        if min(scales) < _SMALLEST_SCALE:
            raise NonFiniteError("the gradient norm", trainer.global_step, _last_checkpoint(trainer))
        if count > self._reported:
            rank_zero_info(f"step {trainer.global_step}: skipped {int(count)} steps, loss or gradient norm not finite")
            self._reported = int(count)
        return {}


def _last_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint that the run has written, else the one that it resumed from."""
    finish_writing(trainer)
    saved = [
        path
        for saver in trainer.checkpoint_callbacks
        for name in ("last_model_path", "best_model_path")
        if (path := getattr(saver, name, "")) and ("://" in path or Path(path).is_file())
    ]
    return saved[0] if saved else None if trainer.ckpt_path is None else str(trainer.ckpt_path)
