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
    """Lightning's ``ModelCheckpoint``, which also saves the last step if no validation follows it.

    A metric of `GenerationEval` is computed in some validations only. The others save no best checkpoint, and no
    checkpoint is called best for a metric of earlier weights.
    """

    def __init__(self, *args: Any, keep_last: int = 1, **kwargs: Any) -> None:
        """Configure how many checkpoints are kept.

        Args:
            *args: Of Lightning's ``ModelCheckpoint``.
            keep_last: How many of the last checkpoints are kept, with ``save_last``. From 2 on each is
                ``last-step=N.ckpt``, and ``last.ckpt`` is a hard link to the newest. Older ones are removed once the
                newer one is written.
            **kwargs: Of Lightning's ``ModelCheckpoint``.

        Raises:
            UserError: If ``keep_last`` is below 1, or above it without ``save_last``.
        """
        super().__init__(*args, **kwargs)
        if keep_last < 1 or (keep_last > 1 and self.save_last is not True):
            raise UserError(f"Checkpoints: keep_last must be 1 or more, and needs save_last: true, got {keep_last}")
        self.keep_last = keep_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse ``keep_last`` where files cannot be linked.

        Raises:
            UserError: With the reason.
        """
        super().setup(trainer, pl_module, stage)
        if self.keep_last > 1 and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpoints):
            raise UserError("Checkpoints: keep_last needs vab.callbacks.AtomicCheckpoints among the trainer's plugins")
        if self.keep_last > 1 and "://" in str(self.dirpath):
            raise UserError(f"Checkpoints: keep_last needs a local folder, got {self.dirpath}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete temporary files left by a killed run, and check a monitored metric of generated sound.

        Raises:
            UserError: If no callback computes it; with the names of those that are computed.
        """
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None and "://" not in str(self.dirpath):
            for unfinished in Path(self.dirpath).glob(f"*{self.FILE_EXTENSION}{TEMPORARY_SUFFIX}"):
                unfinished.unlink()
        names = self._generated_metrics(trainer)
        if self.monitor and GENERATED.match(self.monitor) and self.monitor not in names:
            known = ", ".join(names) or "none: add vab.callbacks.GenerationEval"
            raise UserError(f"Checkpoints cannot monitor {self.monitor}: the metrics of generated sound are {known}")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a metric of validation that does not exist before the training begins."""
        name = self.monitor or ""
        # val/codes/... exist only for the mask ratios that occur, perhaps not in these few batches.
        if not name.startswith("val/") or name.count("/") > 1 or GENERATED.match(name):
            return
        if name not in trainer.callback_metrics:
            raise self._missing_metric(trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``last.ckpt`` if the last step is not saved yet."""
        if not self.has_nothing_to_save(trainer):
            save_last(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until the checkpoints are written."""
        finish_writing(trainer)

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save only if the metric was computed with the current weights. If it does not exist, save last and stop."""
        if self.monitor not in metrics and self.monitor in self._generated_metrics(trainer):
            return
        try:
            super().write_best(trainer, metrics)
        except MisconfigurationException as error:
            save_last(self, trainer)
            raise self._missing_metric(metrics) from error

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save ``last.ckpt``. With ``keep_last`` it is a link to a file named by step; the oldest such is removed."""
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
            files.link(numbered, last)
            resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
            pattern = f"{self.CHECKPOINT_NAME_LAST}-step=*{self.FILE_EXTENSION}"
            files.keep_newest(folder, pattern, self.keep_last, resumed)

    def write(self, trainer: Trainer, path: str) -> None:
        """Save, and let `FiniteCheck` check weights that are saved alone: Lightning does not call its hook for them."""
        if self.save_weights_only:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, FiniteCheck):
                    callback.on_save_checkpoint(trainer, trainer.lightning_module, {})
        super().write(trainer, path)

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Remove only files in the run's own folder: a checkpoint that was resumed from may name others."""
        own = str(self.dirpath).rstrip("/")
        if "://" in previous or "://" in own:
            is_own = previous.startswith(f"{own}/") and ".." not in previous.split("/")
        else:
            is_own = Path(own).resolve() in Path(previous).resolve().parents
        return is_own and super().may_remove(trainer, previous, current)

    def _missing_metric(self, logged: Iterable[str]) -> UserError:
        names = ", ".join(sorted(name for name in logged if name.count("/") == 1))
        return UserError(f"Checkpoints cannot monitor {self.monitor}: the run has {names}")

    @staticmethod
    def _generated_metrics(trainer: Trainer) -> list[str]:
        """Names of the metrics that the run's `GenerationEval` callbacks log."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [name for callback in callbacks if isinstance(callback, GenerationEval) for name in callback.names]
