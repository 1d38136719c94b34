"""Resuming: the position in the order of records, and the trainer's counters that must agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from vab.lightning_internals import add_to_logged_step, begin_epoch, progress_in


@dataclass
class Position:
    """Where training stands in the order of records.

    ``start`` records of the epoch were consumed when the current pass over the loader began. Since then the loader has
    returned ``handed`` batches. The trainer's own counter was ``processed`` at that time; it may still be processing
    the last batch.
    """

    epoch: int = 0
    start: int = 0
    handed: int = 0
    processed: int = 0


class Resumable(Protocol):
    """A datamodule that knows its position in the order."""

    def steps_left(self, consumed: int) -> int:
        """Steps left in an epoch after ``consumed`` records."""

    def starts_anew(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint belongs to other data or another seed."""

    def forget_unfinished(self) -> None:
        """Repeat the batch whose step was stopped by an exception."""


class LoopCounters(Callback):
    """Corrects the trainer's counters when it loads a checkpoint, so that they agree with the remaining records.

    Six things go wrong without it:

    1. The trainer counts an epoch in steps. With another number of ranks or another batch size an epoch has another
       number of steps, and the saved counter would end it too early or too late.
    2. After a checkpoint between two epochs, where no validation was due, the trainer runs a step of the old epoch.
    3. A checkpoint within a step, after an exception, counts that step twice.
    4. With accumulated gradients, a checkpoint between two optimizer steps counts batches whose gradients are lost.
    5. A checkpoint of the last step of a run that ended within an epoch counts that epoch as done.
    6. Validations are due by the number of all batches. A step may now have another number of batches.
    """

    def __init__(self, data: Resumable, settings: dict[str, Any]) -> None:
        """Keep what this callback needs.

        Args:
            data: The datamodule.
            settings: Of the trainer, by name, as they were before the datamodule changed them.
        """
        self._data = data
        self.settings = settings
        self._new_epoch = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the counts that the trainer is about to take."""
        state = checkpoint.get(type(self._data).__qualname__)
        self._new_epoch = False
        if trainer.state.fn != TrainerFn.FITTING or not state or "loops" not in checkpoint:
            return
        steps, epochs = progress_in(checkpoint)
        pending = state.get("pending_batches", 0)
        done = steps["current"]["processed"] - pending
        if pending or steps["current"]["ready"] > done:
            # As if taken at the end of the step before, from which the trainer resumes correctly.
            for scope in ("total", "current"):
                steps[scope] = dict.fromkeys(steps[scope], steps[scope]["processed"] - pending)
            if done:
                steps["total"]["completed"] -= 1
                steps["current"]["completed"] -= 1
                add_to_logged_step(checkpoint, -1)
        accumulated = trainer.accumulate_grad_batches
        batches = steps["total"]["processed"]
        # Checkpoints of earlier versions do not say how many batches a step had.
        before = state.get("accumulate_grad_batches") or max(1, batches // max(1, checkpoint["global_step"]))
        added = batches // before * accumulated - batches
        steps["total"] = {name: count + added for name, count in steps["total"].items()}
        whole, left = self._data.steps_left(0), self._data.steps_left(state["records_consumed"])
        over = not state["steps_left"] or not left or self._data.starts_anew(state)
        self._new_epoch = over or not state["records_consumed"]
        if not self._new_epoch:
            steps["current"] = {name: count + whole - left - done for name, count in steps["current"].items()}
            steps["is_last_batch"] = False
            if epochs["current"]["processed"] == epochs["current"]["started"]:
                # A run whose last step was within an epoch counted that epoch as done; a longer run continues in it.
                for scope, count in epochs.items():
                    less = {name: count[name] - 1 for name in ("processed", "completed")}
                    epochs[scope] = count | less
            return
        inside = epochs["current"]["processed"] < epochs["current"]["started"]
        if over and inside and state["records_consumed"]:
            # The trainer would have counted the epoch and its last step a moment after the checkpoint.
            add_to_logged_step(checkpoint, 1)
        steps["current"] = dict.fromkeys(steps["current"], 0)
        steps["is_last_batch"] = False
        for scope, count in epochs.items():
            epochs[scope] = dict.fromkeys(count, count["started" if over else "processed"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Repeat the batch in another ``fit`` by the same trainer; a checkpoint does not count it anyway."""
        if trainer.training:
            self._data.forget_unfinished()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch if the checkpoint was written between two epochs."""
        if self._new_epoch:
            # The epoch begins as it would have without the interruption.
            begin_epoch(trainer)
            self._new_epoch = False
