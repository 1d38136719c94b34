"""The progress bar of a run."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from vab.callbacks.meters import Meters
from vab.console import ProgressBar
from vab.tasks import BaseTask


class StepProgress(LightningProgressBar):
    """One bar for the whole run: steps, rate, time left, losses, meters. Not on a terminal: a line per validation."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: ProgressBar | None = None
        self._enabled = True
        self._text, self._next_text = "", 0.0

    def disable(self) -> None:
        """Lightning's switch, used on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Lightning's switch."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        total = int(trainer.estimated_stepping_batches)
        self._bar = ProgressBar("train", total, "steps", completed=trainer.global_step, show=self._enabled)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is not None and self._bar.is_shown:
            self._bar.update(trainer.global_step, note=self._text_of_this_second(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line if there is no bar."""
        if self._enabled and not (self._bar and self._bar.is_shown) and trainer.state.fn == TrainerFn.FITTING:
            print(f"step {trainer.global_step}: {self.text(trainer)}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar and leave it on the screen."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the bar."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text_of_this_second(self, trainer: Trainer) -> str:
        """`text`, made once a second: the host waits for the device to read the loss."""
        if (now := time.monotonic()) >= self._next_text:
            self._next_text, self._text = now + 1.0, self.text(trainer)
        return self._text

    @staticmethod
    def text(trainer: Trainer) -> str:
        """The losses and rates beside the bar; the training loss is that of the last step."""
        task, shown = trainer.lightning_module, trainer.progress_bar_metrics
        if isinstance(task, BaseTask) and task.step_loss is not None:
            shown = {"train/loss": float(task.step_loss), **shown}
        words = [f"{name} {value:.3f}" for name, value in shown.items() if isinstance(value, float)]
        meters = (callback.text for callback in trainer.callbacks if isinstance(callback, Meters))  # type: ignore[attr-defined]
        return " ".join([*words, *filter(None, meters)])
