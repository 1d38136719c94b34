"""A run that is told to end: its state is saved at the end of the current step, on all ranks at the same one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vab.callbacks.writing import finish_writing
from vab.lightning_internals import cluster_environment, is_accumulating, save_last


class StoppedError(Exception):
    """A run was told to end and has saved its state."""

    def __init__(self, signum: int, step: int, checkpoint: str | Path | None, requeued: bool) -> None:
        self.signal_name = signal.Signals(signum).name
        self.exit_status = 0 if requeued else 128 + signum  # as a shell gives it
        self.step = step
        self.checkpoint = checkpoint
        self.requeued = requeued
        super().__init__(f"stopped by {self.signal_name} after step {step}")


_ONE_PRESS = 1.0
"""Seconds within which a second SIGINT is the same Ctrl-C: a launcher passes on what the terminal sent already."""


class StopOnSignal(Checkpoint):
    """On SIGTERM and Ctrl-C end after the current step with a checkpoint; a second Ctrl-C ends the run at once.

    On SLURM's warning signal also ask for the job back.

    Lightning's own handlers exchange tensors, and save, wherever in a step the signal finds each rank: between two
    gradients, say, where others wait for something else. Here a handler only takes note. After each optimizer step the
    ranks compare notes, and if any has one all save the state of that step and leave. A signal that comes during
    validation counts after the step that follows it.

    Derived from Lightning's base of checkpoint callbacks, so that it comes after those that change what is saved.
    """

    def __init__(self, run: str = "run") -> None:
        """Configure where a SLURM job that comes back finds its run.

        Args:
            run: Name of the run, the same whenever it is started and unlike that of the job's other runs.
        """
        self.run = run
        self._received: int | None = None
        self._noted_at = 0.0  # by the monotonic clock
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it puts back what was before at the end of the run."""
        self._received = None
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # notes are exchanged beside the GPU's work
        if threading.current_thread() is not threading.main_thread():
            return
        signals: set[int] = {signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a run in the background has it
            signals.add(signal.SIGINT)
        if (requeue := _requeue_signal(trainer)) is not None:
            signals.add(requeue)

        def take_note(signum: int, frame: Any) -> None:
            now = time.monotonic()
            if self._received is not None:
                if signum == signal.SIGINT and now - self._noted_at > _ONE_PRESS:
                    raise KeyboardInterrupt
                return
            self._received, self._noted_at = signum, now
            if signum != signal.SIGINT:
                if trainer.strategy.launcher is not None:
                    trainer.strategy.launcher.kill(signum)  # the ranks that this process has started
            elif trainer.is_global_zero:  # not print, which may be at work where the signal came
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

        folder = _folder_of_last(trainer)
        if requeue is not None and folder and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _leave_a_link(requeue_folder(trainer.default_root_dir, self.run), folder)
        for signum in signals:
            signal.signal(signum, take_note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        """After an optimizer step: leave if any rank has been told to.

        Raises:
            StoppedError: On all ranks, once the state is saved.
        """
        if is_accumulating(trainer):
            return
        signum = self._first_note(trainer)
        if not signum:
            return
        requeues = signum == _requeue_signal(trainer)
        checkpoint = _save_last(trainer)
        if requeues and _folder_of_last(trainer) is None:
            checkpoint = requeue_folder(trainer.default_root_dir, self.run) / "last.ckpt"
            trainer.save_checkpoint(checkpoint)
        finish_writing(trainer)  # before the job is asked back, which ends this one
        requeued = requeues and (not trainer.is_global_zero or _requeue())
        raise StoppedError(signum, trainer.global_step, checkpoint, requeued)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that has come to its end is not one to go on with."""
        if trainer.is_global_zero and _requeue_signal(trainer) is not None:
            _leave_a_link(requeue_folder(trainer.default_root_dir, self.run), None)

    def _first_note(self, trainer: Trainer) -> int:
        """The signal that any rank has received, the same on all of them; 0 for none."""
        note = torch.tensor(self._received or 0)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(note, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(note)


def requeue_folder(root: str | Path, run: str) -> Path:
    """Where a SLURM job that comes back finds a run: a link to the folder of the run's checkpoints.

    It is there from the start of the run, as a node can fail without a warning. For a run that keeps no checkpoints it
    is a folder with the one that is saved at the warning.

    Args:
        root: The trainer's ``default_root_dir``.
        run: Name of the run: a job may do several, one after another.
    """
    return Path(root) / f"{_job_prefix()}{run}"


def folder_of_returned_job(root: str | Path, run: str) -> Path | None:
    """The folder of checkpoints with which a run of a job goes on that SLURM has started again; None for any other.

    Args:
        root: The trainer's ``default_root_dir``.
        run: Name of the run.
    """
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    left = {folder for folder in Path(root).glob(f"{_job_prefix()}*") if any(folder.glob("last*.ckpt"))}
    if (own := requeue_folder(root, run)) in left:
        return own.resolve()
    for other in sorted(left):
        rank_zero_warn(
            f"job {os.environ['SLURM_JOB_ID']} is back and begins a new run: the one in {other.resolve()} that it left"
            " has other settings; to go on with that one, give --ckpt_path"
        )
    return None


def _job_prefix() -> str:
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "0"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"slurm_{job}_" if task is None else f"slurm_{job}_{task}_"


def _leave_a_link(place: Path, target: Path | None) -> None:
    """Let a place be a link to a folder, or nothing, whatever it was before."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if target is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()))


def _requeue_signal(trainer: Trainer) -> int | None:
    environment = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def _folder_of_last(trainer: Trainer) -> Path | None:
    """Where the run keeps its ``last.ckpt``, if that is a folder of this machine."""
    keeper = _keeper_of_last(trainer)
    if keeper is None:
        return None
    folder = str(keeper.dirpath or trainer.default_root_dir)
    return None if "://" in folder else Path(folder)


def _keeper_of_last(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that saves ``last.ckpt``, else the first that saves any, else None."""
    keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return next((keeper for keeper in keepers if keeper.save_last), keepers[0] if keepers else None)


def _save_last(trainer: Trainer) -> str | Path | None:
    """``last.ckpt`` of the run, or None where it keeps no checkpoints."""
    keeper = _keeper_of_last(trainer)
    if keeper is None:
        return None
    if keeper.save_last:
        save_last(keeper, trainer)
        return keeper.last_model_path
    path = os.path.join(keeper.dirpath or trainer.default_root_dir, "last.ckpt")  # of an object store, perhaps
    trainer.save_checkpoint(path)
    return path


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
