"""Checkpoints: when they are saved, and how many are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from vab.callbacks.finite import FiniteCheck
from vab.callbacks.generation_eval import GENERATED, GenerationEval
from vab.callbacks.writing import AtomicCheckpoints, finish_writing
from vab.files import TEMPORARY_SUFFIX
from vab.lightning_internals import CheckpointHooks, save_last
from vab.spec import UserError


class Checkpoints(CheckpointHooks):
    """Lightning's checkpoints; the run's last step is saved also where no validation fell on it.

    A monitored figure of `GenerationEval` is there only after the validations that it was due at: the others save no
    best checkpoint, and nothing is saved for a figure of earlier weights.
    """

    def __init__(self, *args: Any, keep_last: int = 1, **kwargs: Any) -> None:
        """Configure what is kept.

        Args:
            *args: As Lightning's ``ModelCheckpoint`` has them.
            keep_last: How many of the last checkpoints stay, with ``save_last``. From 2 on each is
                ``last-step=N.ckpt``, and ``last.ckpt`` is another name of the newest, which takes no space. What is
                older goes once the newer one is whole on the disk.
            **kwargs: As Lightning's ``ModelCheckpoint`` has them.

        Raises:
            UserError: If ``keep_last`` is below 1, or above it without ``save_last``.
        """
        super().__init__(*args, **kwargs)
        if keep_last < 1 or (keep_last > 1 and self.save_last is not True):
            raise UserError(f"Checkpoints: keep_last must be 1 or more, and needs save_last: true, got {keep_last}")
        self.keep_last = keep_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to keep several where names cannot be given to files.

        Raises:
            UserError: Saying what is in the way.
        """
        super().setup(trainer, pl_module, stage)
        if self.keep_last > 1 and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpoints):
            raise UserError("Checkpoints: keep_last needs vab.callbacks.AtomicCheckpoints among the trainer's plugins")
        if self.keep_last > 1 and "://" in str(self.dirpath):
            raise UserError(f"Checkpoints: keep_last needs a folder of this machine, got {self.dirpath}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a figure of generated sound that nobody takes, before any time is spent on it.

        What a run that was killed left half written goes.

        Raises:
            UserError: With the names of those that are taken.
        """
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None and "://" not in str(self.dirpath):
            for half in Path(self.dirpath).glob(f"*{self.FILE_EXTENSION}{TEMPORARY_SUFFIX}"):
                half.unlink()
        names = self._generated_metrics(trainer)
        if self.monitor and GENERATED.match(self.monitor) and self.monitor not in names:
            there = ", ".join(names) or "none: add vab.callbacks.GenerationEval"
            raise UserError(f"Checkpoints cannot monitor {self.monitor}: the figures of generated sound are {there}")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a figure of validation that there is not, before any time is spent on it."""
        name = self.monitor or ""
        # Figures by share of hidden codes, val/codes/..., are there only for shares that these few batches have.
        if not name.startswith("val/") or name.count("/") > 1 or GENERATED.match(name):
            return
        if name not in trainer.callback_metrics:
            raise self._missing_metric(trainer.callback_metrics)

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save only if the metric was computed with the current weights. If there is no such metric, save and stop."""
        if self.monitor not in metrics and self.monitor in self._generated_metrics(trainer):
            return
        try:
            super().write_best(trainer, metrics)
        except MisconfigurationException as error:
            save_last(self, trainer)
            raise self._missing_metric(metrics) from error

    def _missing_metric(self, there: Iterable[str]) -> UserError:
        figures = ", ".join(sorted(name for name in there if name.count("/") == 1))
        return UserError(f"Checkpoints cannot monitor {self.monitor}: the run has {figures}")

    @staticmethod
    def _generated_metrics(trainer: Trainer) -> list[str]:
        """Names that the run's `GenerationEval` callbacks log."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [name for callback in callbacks if isinstance(callback, GenerationEval) for name in callback.names]

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        """As Lightning's, and only files of the run's own folder: a checkpoint that was resumed from names others."""
        own = str(self.dirpath).rstrip("/")
        if "://" in previous or "://" in own:
            is_own = previous.startswith(f"{own}/") and ".." not in previous.split("/")
        else:
            is_own = Path(own).resolve() in Path(previous).resolve().parents
        return is_own and super().may_remove(trainer, previous, current)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``last.ckpt`` if the run has gone on since."""
        if not self.has_nothing_to_save(trainer):
            save_last(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No run ends before its checkpoints are on the disk, whatever the strategy does at its end."""
        finish_writing(trainer)

    def write(self, trainer: Trainer, path: str) -> None:
        """Save; weights alone are saved without the hook by which `FiniteCheck` sees other checkpoints."""
        if self.save_weights_only:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, FiniteCheck):
                    callback.on_save_checkpoint(trainer, trainer.lightning_module, {})
        super().write(trainer, path)

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """The newest under its own name first; then ``last.ckpt`` is moved on to it, and the oldest goes."""
        if self.keep_last == 1:
            super().write_last(trainer, metrics)
            return
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        numbered = folder / f"{self.CHECKPOINT_NAME_LAST}-step={trainer.global_step}{self.FILE_EXTENSION}"
        last = folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        self.last_model_path = str(last)
        self.write(trainer, str(numbered))
        if trainer.is_global_zero:
            files = trainer.strategy.checkpoint_io
            assert isinstance(files, AtomicCheckpoints)
            files.name_also(numbered, last)
            resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
            pattern = f"{self.CHECKPOINT_NAME_LAST}-step=*{self.FILE_EXTENSION}"
            files.keep_newest(folder, pattern, self.keep_last, resumed)
