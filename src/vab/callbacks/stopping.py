"""A run that is told to end: its state is saved at the end of the current step, on all ranks at the same one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from vab.callbacks.writing import finish_writing


class StoppedError(Exception):
    """A run was told to end and has saved its state."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None, requeued: bool) -> None:
        self.signal_name = signal.Signals(signum).name
        self.exit_status = 0 if requeued else 128 + signum  # as a shell gives it
        self.step = step
        self.checkpoint = checkpoint
        self.requeued = requeued
        super().__init__(f"stopped by {self.signal_name} after step {step}")


class StopOnSignal(Checkpoint):
    """On SIGTERM end after the current step with a checkpoint; on SLURM's warning signal also ask for the job back.

    Lightning's own handlers exchange tensors, and save, wherever in a step the signal finds each rank: between two
    gradients, say, where others wait for something else. Here a handler only takes note. After each optimizer step the
    ranks compare notes, and if any has one all save the state of that step and leave. A signal that comes during
    validation counts after the step that follows it.

    Derived from Lightning's base of checkpoint callbacks, so that it comes after those that change what is saved.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it puts back what was before at the end of the run."""
        self._received = None
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # notes are exchanged beside the GPU's work
        if threading.current_thread() is not threading.main_thread():
            return
        signals: set[int] = {signal.SIGTERM}
        if (requeue := _requeue_signal(trainer)) is not None:
            signals.add(requeue)

        def take_note(signum: int, frame: Any) -> None:
            if self._received is None:
                self._received = signum
                launcher = trainer.strategy.launcher
                if launcher is not None:
                    launcher.kill(signum)  # the ranks that this process has started

        for signum in signals:
            signal.signal(signum, take_note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        """After an optimizer step: leave if any rank has been told to.

        Raises:
            StoppedError: On all ranks, once the state is saved.
        """
        if trainer.fit_loop._should_accumulate():
            return
        signum = self._first_note(trainer)
        if not signum:
            return
        requeues = signum == _requeue_signal(trainer)
        checkpoint = requeue_checkpoint(trainer.default_root_dir) if requeues else None
        if checkpoint is None:
            checkpoint = _save_last(trainer)
        else:
            trainer.save_checkpoint(checkpoint)
        finish_writing(trainer)  # before the job is asked back, which ends this one
        requeued = requeues and (not trainer.is_global_zero or _requeue())
        raise StoppedError(signum, trainer.global_step, checkpoint, requeued)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that has come to its end needs no checkpoint to begin again with."""
        if trainer.is_global_zero and _requeue_signal(trainer) is not None:
            requeue_checkpoint(trainer.default_root_dir).unlink(missing_ok=True)

    def _first_note(self, trainer: Trainer) -> int:
        """The signal that any rank has received, the same on all of them; 0 for none."""
        note = torch.tensor(self._received or 0)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(note, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(note)


def requeue_checkpoint(folder: str | Path) -> Path:
    """Where a SLURM job that is put back into the queue leaves its state: a job has the same number when it returns.

    Args:
        folder: The trainer's ``default_root_dir``.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "0"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return Path(folder) / f"slurm_{job}{'' if task is None else '_' + task}.ckpt"


def _requeue_signal(trainer: Trainer) -> int | None:
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def _save_last(trainer: Trainer) -> Path | None:
    """``last.ckpt`` of the run, or None where it keeps no checkpoints."""
    keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    for keeper in keepers:
        if keeper.save_last:
            keeper._save_last_checkpoint(trainer, keeper._monitor_candidates(trainer))
            return Path(keeper.last_model_path)
    for keeper in keepers:
        path = Path(keeper.dirpath or trainer.default_root_dir) / "last.ckpt"
        trainer.save_checkpoint(path)
        return path
    return None


def _requeue() -> bool:
    """Ask SLURM to queue this job again; whether it will."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        rank_zero_info(f"scontrol is not there, so job {job} was not put back into the queue")
        return False
    if done.returncode:
        rank_zero_info(f"job {job} was not put back into the queue: {' '.join(done.stderr.split())}")
    return done.returncode == 0
