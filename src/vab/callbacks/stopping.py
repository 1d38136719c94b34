"""Stopping a run by a signal: all ranks save the state after the same step. SLURM jobs are requeued and resume."""

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
from torch import Tensor

from vab.callbacks.writing import finish_writing
from vab.lightning_internals import cluster_environment, is_accumulating, save_last

_SAME_PRESS = 1.0
"""Seconds within which a second SIGINT is the same Ctrl-C: a launcher repeats what the terminal has sent already."""


class StoppedError(Exception):
    """A run was stopped by a signal and has saved its state."""

    def __init__(self, signum: int, step: int, checkpoint: str | Path | None, requeued: bool) -> None:
        self.exit_status = 0 if requeued else 128 + signum  # a shell's convention
        self.checkpoint = checkpoint
        self.requeued = requeued
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")


class StopOnSignal(Checkpoint):
    """Stops a run on SIGTERM or Ctrl-C after the current step, with a checkpoint; a second Ctrl-C stops it at once.

    On SLURM's warning signal it also requeues the job.

    Lightning's own handlers communicate and save wherever the signal finds each rank, perhaps between two collective
    operations. Here a handler only records the signal. After each optimizer step the ranks send what they received,
    and after the next one they read it: if any has received a signal, all save the state of that step and exit. A
    single process exits after the step in which it received the signal. A signal during validation takes effect after
    the next step.

    The base class makes Lightning call this callback after those that change what is saved.
    """

    def __init__(self, run: str = "run") -> None:
        """Configure where a requeued SLURM job finds its run.

        Args:
            run: Name of the run, the same whenever it is started and unlike that of the job's other runs.
        """
        self.run = run
        self._received: int | None = None
        self._received_at = 0.0  # of the monotonic clock
        self._group: Any = None
        self._exchange: tuple[Any, Tensor] | None = None  # of the last step: the work, and the highest signal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers; at the end of the run Lightning restores the ones before its own."""
        self._received = self._exchange = None
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")  # does not wait for the GPUs
        if threading.current_thread() is not threading.main_thread():
            return
        signals: set[int] = {signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores it for background jobs
            signals.add(signal.SIGINT)
        if (requeue := _requeue_signal(trainer)) is not None:
            signals.add(requeue)

        def record(signum: int, frame: Any) -> None:
            now = time.monotonic()
            if self._received is not None:
                if signum == signal.SIGINT and now - self._received_at > _SAME_PRESS:
                    raise KeyboardInterrupt
                return
            self._received, self._received_at = signum, now
            if signum != signal.SIGINT:
                if trainer.strategy.launcher is not None:
                    trainer.strategy.launcher.kill(signum)  # the ranks that this process has started
            elif trainer.is_global_zero:
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not safe here

        folder = _folder_of_last(trainer)
        if requeue is not None and folder and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _replace_by_link(requeue_folder(trainer.default_root_dir, self.run), folder)
        for signum in signals:
            signal.signal(signum, record)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        """Stop after an optimizer step if any rank has received a signal.

        Raises:
            StoppedError: On all ranks, once the state is saved.
        """
        if is_accumulating(trainer):
            return
        signum = self._received_by_any(trainer)
        if not signum:
            return
        self._end_exchange()
        requeues = signum == _requeue_signal(trainer)
        checkpoint = _save_last(trainer)
        if requeues and _folder_of_last(trainer) is None:
            checkpoint = requeue_folder(trainer.default_root_dir, self.run) / "last.ckpt"
            trainer.save_checkpoint(checkpoint)
        finish_writing(trainer)  # before the requeue, which ends this job
        requeued = requeues and (not trainer.is_global_zero or _requeue())
        raise StoppedError(signum, trainer.global_step, checkpoint, requeued)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the link to a finished run, which is not to be resumed."""
        self._end_exchange()
        if trainer.is_global_zero and _requeue_signal(trainer) is not None:
            _replace_by_link(requeue_folder(trainer.default_root_dir, self.run), None)

    def _end_exchange(self) -> None:
        """Wait for the exchange that is under way: its process group must outlive it."""
        if self._exchange is not None:
            _result(self._exchange)
            self._exchange = None

    def _received_by_any(self, trainer: Trainer) -> int:
        """The highest signal that any rank had received, the same number on all ranks; 0 for none.

        Several ranks exchange signals in the background: what they send at the end of a step is read at the end of the
        next one, so that no step waits for another rank.
        """
        received = torch.tensor(self._received or 0)
        if trainer.world_size == 1:
            return int(received)
        before = self._exchange
        work = torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = (work, received)
        return 0 if before is None else _result(before)


def _result(exchange: tuple[Any, Tensor]) -> int:
    work, received = exchange
    work.wait()
    return int(received)


def requeue_folder(root: str | Path, run: str) -> Path:
    """Where a requeued SLURM job finds a run: a link to the folder of the run's checkpoints.

    It exists from the start of the run, as a node can fail without a warning. A run without checkpoints gets a real
    folder, with the checkpoint that is saved at SLURM's warning.

    Args:
        root: The trainer's ``default_root_dir``.
        run: Name of the run: a job may train several, one after another.
    """
    return Path(root) / f"{_job_prefix()}{run}"


def folder_of_requeued_job(root: str | Path, run: str) -> Path | None:
    """The folder of checkpoints from which a run of a requeued SLURM job resumes; None for a new run.

    Args:
        root: The trainer's ``default_root_dir``.
        run: Name of the run.
    """
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    found = {folder for folder in Path(root).glob(f"{_job_prefix()}*") if any(folder.glob("last*.ckpt"))}
    if (own := requeue_folder(root, run)) in found:
        return own.resolve()
    for other in sorted(found):
        rank_zero_warn(
            f"job {os.environ['SLURM_JOB_ID']} was requeued and starts a new run, because its run in {other.resolve()}"
            " has other settings; to resume that one, give --ckpt_path"
        )
    return None


def _job_prefix() -> str:
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "0"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"slurm_{job}_" if task is None else f"slurm_{job}_{task}_"


def _replace_by_link(path: Path, target: Path | None) -> None:
    """Replace a link or folder by a link to another folder, or by nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if target is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))


def _requeue_signal(trainer: Trainer) -> int | None:
    environment = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def _folder_of_last(trainer: Trainer) -> Path | None:
    """The folder of the run's ``last.ckpt``, if it is a local one."""
    saver = _saver_of_last(trainer)
    if saver is None:
        return None
    folder = str(saver.dirpath or trainer.default_root_dir)
    return None if "://" in folder else Path(folder)


def _saver_of_last(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that saves ``last.ckpt``, else the first that saves anything, else None."""
    savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return next((saver for saver in savers if saver.save_last), savers[0] if savers else None)


def _save_last(trainer: Trainer) -> str | Path | None:
    """Save the run's ``last.ckpt`` and return its path; None if the run has no callback that saves checkpoints."""
    saver = _saver_of_last(trainer)
    if saver is None:
        return None
    if saver.save_last:
        save_last(saver, trainer)
        return saver.last_model_path
    path = os.path.join(saver.dirpath or trainer.default_root_dir, "last.ckpt")  # perhaps of an object store
    trainer.save_checkpoint(path)
    return path


def _requeue() -> bool:
    """Ask SLURM to requeue this job; returns whether it agreed."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        rank_zero_info(f"job {job} was not requeued: there is no scontrol command")
        return False
    if done.returncode:
        rank_zero_info(f"job {job} was not requeued: {' '.join(done.stderr.split())}")
    return done.returncode == 0
