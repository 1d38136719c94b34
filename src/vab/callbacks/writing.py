"""How checkpoints get to the disk: whole files only, and written while the training goes on."""

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

_WAITING = 1
"""Checkpoints that may still be in memory, as bytes, when the next one is made."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own are written to the system's temporary folder and moved; onto another disk that is a copy, which a
    kill or a full disk leaves in halves under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the final place, then rename. Remote paths (``s3://...``) are left to Lightning.

        Raises:
            UserError: If the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self._write(Path(path), content)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one of ours.

        Raises:
            UserError: If the file is something else, or not whole.
        """
        with reading(path):
            content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            # What Lightning, and then the task, look up first.
            for name in ("pytorch-lightning_version", "state_dict"):
                content[name]
            content["hyper_parameters"]["_class_path"]
        return content

    def name_also(self, path: Path, name: Path) -> None:
        """Make ``name`` another name of the file ``path``, in one moment: before it, it is what it was."""
        temporary = name.with_name(name.name + TEMPORARY_SUFFIX)
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links: a copy
            write_atomically(name, memoryview(path.read_bytes()))
            return
        temporary.replace(name)
        sync_folder(name.parent)

    def keep_newest(self, folder: Path, pattern: str, count: int, spared: Path | None = None) -> None:
        """Remove the files of a pattern but for the newest ``count``, and the one that the run began with.

        By the time of writing, not by the step in the name: a run that was taken up from an earlier step leaves later
        ones behind that are not its own.
        """
        found = sorted(folder.glob(pattern), key=lambda file: (file.stat().st_mtime_ns, file.name))
        for file in found[:-count]:
            if spared is None or file.absolute() != spared.absolute():
                file.unlink(missing_ok=True)

    def _write(self, path: Path, content: io.BytesIO) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getbuffer())


class BackgroundCheckpoints(AtomicCheckpoints):
    """The same, beside the training, which waits until the state is in memory as bytes, not until it is on the disk.

    The bytes are made before the training goes on, so what is saved is the state at the moment of saving. Writes, names
    and removals are done one at a time, in the order in which they were asked for, and after a write that failed
    nothing is renamed or removed until one has succeeded. What went wrong is raised at the next checkpoint, or at the
    end of the run, which waits. Main memory holds up to two checkpoints. (Lightning's `AsyncCheckpointIO` would remove
    the older checkpoint before the newer is written, and it pickles in the thread, which holds up Python's others.)
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._unfinished: deque[tuple[Future[None], bool]] = deque()  # and whether it is a write
        self._failed = False  # the last write, so that what follows it must not be done

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Make the bytes now, write them later.

        Raises:
            UserError: If the disk was full when an earlier one was written.
        """
        self._collect(writes_left=_WAITING)
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one, which may be one that is still to be written."""
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one, once what was saved before is on the disk."""
        self._later(self._unless_failed, super().remove_checkpoint, path)

    def name_also(self, path: Path, name: Path) -> None:
        """As above, in its turn."""
        self._later(self._unless_failed, super().name_also, path, name)

    def keep_newest(self, folder: Path, pattern: str, count: int, spared: Path | None = None) -> None:
        """As above, in its turn."""
        self._later(self._unless_failed, super().keep_newest, folder, pattern, count, spared)

    def wait(self) -> None:
        """Until all is on the disk.

        Raises:
            UserError: If the disk was full.
        """
        self._collect(writes_left=0)

    def teardown(self) -> None:
        """Wait; of a run that an error stops, what else goes wrong here is told and not raised."""
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

    def _write(self, path: Path, content: io.BytesIO) -> None:
        self._later(self._write_now, path, content, is_write=True)

    def _write_now(self, path: Path, content: io.BytesIO) -> None:
        self._failed = True
        super()._write(path, content)
        self._failed = False

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        if not self._failed:
            work(*arguments)

    def _later(self, work: Callable[..., None], *arguments: Any, is_write: bool = False) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._unfinished.append((self._thread.submit(work, *arguments), is_write))

    def _collect(self, writes_left: int) -> None:
        """Wait until no more than so many writes are unfinished, and raise what went wrong in the others."""
        while self._unfinished:
            first, _ = self._unfinished[0]
            if 0 < writes_left >= sum(is_write for _, is_write in self._unfinished) and not first.done():
                return
            self._unfinished.popleft()
            first.result()


def finish_writing(trainer: Trainer) -> None:
    """Wait for a run's checkpoints.

    Raises:
        UserError: If the disk was full.
    """
    files = trainer.strategy.checkpoint_io
    if isinstance(files, BackgroundCheckpoints):
        files.wait()
