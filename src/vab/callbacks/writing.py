"""Writing checkpoint files: whole or not at all, and in the background while the training continues."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vab.files import TEMPORARY_SUFFIX, sync_folder, write_atomically
from vab.spec import UserError
from vab.tasks.checkpoints import reading

_MAX_WAITING = 1
"""Checkpoints that may still be in memory, as bytes, when the next one is made."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoint files that are written whole or not at all.

    Lightning writes to the system's temporary folder and moves the file. Onto another disk that is a copy, and a kill
    or a full disk leaves half of it under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file in the same folder, then rename it. Remote paths are left to Lightning.

        Raises:
            UserError: If the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self._run(_write, Path(path), content, is_write=True)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint of ours.

        Raises:
            UserError: If the file is something else, or incomplete.
        """
        with reading(path):
            content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            # The keys that Lightning and the task look up first.
            for name in ("pytorch-lightning_version", "state_dict"):
                content[name]
            content["hyper_parameters"]["_class_path"]
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        self._run(super().remove_checkpoint, path)

    def link(self, path: Path, name: Path) -> None:
        """Make ``name`` another name of the file ``path``, replacing a file of that name in one step."""
        self._run(_link, path, name)

    def keep_newest(self, folder: Path, pattern: str, count: int, resumed: Path | None = None) -> None:
        """Remove the files that match a pattern, except the newest ``count`` and the one that the run resumed from.

        Newest by time of writing. The step in the name does not tell: a run that resumes from an earlier step finds
        files of later steps, which are not its own.
        """
        self._run(_keep_newest, folder, pattern, count, resumed)

    def _run(self, work: Callable[..., None], *arguments: Any, is_write: bool = False) -> None:
        work(*arguments)


class BackgroundCheckpoints(AtomicCheckpoints):
    """`AtomicCheckpoints` that are written in a thread: the training waits for the copy in memory, not for the disk.

    The checkpoint becomes bytes before the training continues, so it holds the state at the moment of saving. Writes,
    links and removals are done one at a time, in order; after a failed write nothing is linked or removed until a write
    succeeds. An error is raised at the next checkpoint, or at the end of the run, which waits. Main memory holds up to
    two checkpoints. (Lightning's `AsyncCheckpointIO` would remove the older checkpoint before the newer is written, and
    it pickles in the thread, which blocks Python's other threads.)
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._unfinished: deque[tuple[Future[None], bool]] = deque()  # with whether it is a write
        self._failed = False  # the last write

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy the state as bytes now, write them later.

        Raises:
            UserError: If the disk was full when an earlier checkpoint was written.
        """
        self._collect(max_writes=_MAX_WAITING)
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, after all writes are done."""
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: If the disk was full.
        """
        self._collect(max_writes=0)

    def teardown(self) -> None:
        """Wait. If an exception is stopping the run already, an error here is printed and not raised."""
        is_stopping = sys.exception() is not None
        try:
            self.wait()
        except (UserError, OSError) as error:
            if not is_stopping:
                raise
            print(f"warning: the last checkpoint was not written: {error}", file=sys.stderr)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _run(self, work: Callable[..., None], *arguments: Any, is_write: bool = False) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._unfinished.append((self._thread.submit(self._run_in_thread, work, arguments, is_write), is_write))

    def _run_in_thread(self, work: Callable[..., None], arguments: tuple[Any, ...], is_write: bool) -> None:
        if is_write:
            self._failed = True
            work(*arguments)
            self._failed = False
        elif not self._failed:
            work(*arguments)

    def _collect(self, max_writes: int) -> None:
        """Wait until at most so many writes are unfinished, and raise the errors of the others."""
        while self._unfinished:
            first, _ = self._unfinished[0]
            if 0 < max_writes >= sum(is_write for _, is_write in self._unfinished) and not first.done():
                return
            self._unfinished.popleft()
            first.result()


def finish_writing(trainer: Trainer) -> None:
    """Wait until a run's checkpoints are written.

    Raises:
        UserError: If the disk was full.
    """
    files = trainer.strategy.checkpoint_io
    if isinstance(files, BackgroundCheckpoints):
        files.wait()


def _write(path: Path, content: io.BytesIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getbuffer())


def _link(path: Path, name: Path) -> None:
    temporary = name.with_name(name.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # no hard links on this file system
        write_atomically(name, memoryview(path.read_bytes()))
        return
    temporary.replace(name)
    sync_folder(name.parent)


def _keep_newest(folder: Path, pattern: str, count: int, resumed: Path | None) -> None:
    found = sorted(folder.glob(pattern), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in found[:-count]:
        if resumed is None or file.absolute() != resumed.absolute():
            file.unlink(missing_ok=True)
