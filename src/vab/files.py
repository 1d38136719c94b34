"""Files that a command writes: atomic writes, CSV, names that fit, full disks, SHA-256, locks and early checks."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

from vab import UserError

TEMPORARY_SUFFIX = ".tmp"

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""

MAX_NAME_BYTES = 255
"""Length of a file name that the file systems in use allow (ext4, XFS, APFS, NTFS, Lustre, NFS)."""


def fitting_name(name: str, suffix: str = "") -> str:
    """``name`` and ``suffix`` as one file name, shortened where it would be longer than file systems allow.

    A shortened name is the beginning of ``name``, a hash of the whole of it, and ``suffix``.

    Args:
        name: Of a file, without folders; any bytes, as ``os.fsdecode`` gives them.
        suffix: What follows it; at most 200 bytes.
    """
    if len(os.fsencode(name + suffix)) <= MAX_NAME_BYTES:
        return name + suffix
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}{suffix}"
    return os.fsencode(name)[: MAX_NAME_BYTES - len(os.fsencode(end))].decode("utf-8", "ignore") + end


def as_utf8(text: str) -> bytes:
    """Text with file names as UTF-8; names that are not UTF-8 keep their bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character of UTF-16, as JSON may have
        return text.encode("utf-8", "surrogatepass")


def as_plot_text(text: str) -> str:
    """Text with names for matplotlib, which fails at names that are not UTF-8 and reads $ as mathematics."""
    return as_utf8(text).decode(errors="backslashreplace").replace("$", r"\$")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write the new content of ``path`` to; it gets its name once it is whole and on the disk."""
    temporary = path.with_name(fitting_name(path.name, TEMPORARY_SUFFIX))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Write ``content``, one piece or several, to ``path``: whole or not at all, also after a kill or a power cut.

    Text is written as ``as_utf8`` gives it.

    Raises:
        UserError: If the disk is full.
    """
    content = as_utf8(content) if isinstance(content, str) else content
    needed = 0
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            for piece in [content] if isinstance(content, (bytes, memoryview)) else content:
                needed += len(piece)
                file.write(piece)
    except OSError as error:
        raise explain_full_disk(error, path.parent, needed) from error


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows of cells as CSV with Unix line ends, for ``write_atomically``; None is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (renames) last through a power cut."""
    if os.name == "nt":  # which opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that have no fsync for folders
            raise
    finally:
        os.close(handle)


_OWN = ".vab-"
"""Names of temporary folders begin like this; host and process follow."""
_DAY = 86_400
"""s. Temporary folders of other hosts are deleted when they are older."""


def own_folder(parent: Path) -> Path:
    """Make a temporary folder that ``sweep`` knows to be of this process."""
    return Path(tempfile.mkdtemp(TEMPORARY_SUFFIX, f"{_OWN}{gethostname()}-{os.getpid()}-", parent))


def sweep(parent: Path) -> None:
    """Delete the temporary folders of killed processes, and none of processes at work."""
    for path in parent.glob(f"{_OWN}*{TEMPORARY_SUFFIX}"):
        with suppress(OSError, ValueError):
            host, process = path.name.removeprefix(_OWN).rsplit("-", 2)[:2]
            is_mine = host == gethostname() and os.name != "nt"
            if not _is_running(int(process)) if is_mine else time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def explain_full_disk(error: OSError, folder: Path, needed: int) -> OSError | UserError:
    """The error itself, or a ``UserError`` if it says that the disk or the quota is full.

    Args:
        error: What the system raised.
        folder: Where it was being written; it need not be there.
        needed: Bytes that the file being written needs; 0 if not known.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    wanted = f"the next file needs {needed:,} bytes, " if needed else ""
    return UserError(
        f"no space left in {folder}: {wanted}{shutil.disk_usage(there).free:,} bytes are free; free some space and run"
        " the same command again, a training with --ckpt_path and its folder; what is already written is kept"
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """A lock between processes, on a file or a folder.

    It is held until ``close``, until the object is collected, or until the process ends, however it ends. A pickled
    lock is a shared lock where it is unpickled.

    Args:
        path: File to lock, made if absent, or folder.
        shared: Hold it together with other shared locks, instead of exclusively. On Windows, where open files cannot
            be deleted, a shared lock excludes nobody.
        wait: Wait for other holders.
        required: Whether a file system without locks, as some clusters have, is an error. If not, continue without.
        temporary: Delete the file on ``close``.

    Raises:
        BlockingIOError: If another process holds it and ``wait`` is false.
    """

    def __init__(
        self, path: Path, *, shared: bool = False, wait: bool = True, required: bool = True, temporary: bool = False
    ) -> None:
        self.path, self._required = path, required
        self._to_delete: list[Path] = []  # what to delete on closing
        while True:
            self._handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
            self.close = weakref.finalize(self, _close, self._handle, self._to_delete)
            try:
                self._take(shared, wait)
            except BaseException:
                self.close()
                raise
            if not temporary:
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._handle)):
                    break
            self.close()  # the lock is on a file that its last holder has deleted in the meantime
        self._to_delete.append(path)

    def _take(self, shared: bool, wait: bool) -> None:
        from filelock import lock_descriptor

        try:
            taken = _share(self._handle, wait) if shared else lock_descriptor(self._handle, blocking=wait)
        except OSError as error:
            taken = not self._required and error.errno in _NO_LOCKS
            if not taken:
                raise
        if not taken:
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(self.path))

    def share(self) -> None:
        """Turn an exclusive lock into a shared one.

        Raises:
            BlockingIOError: If another process took it in between.
        """
        self._take(shared=True, wait=False)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Lock], tuple[Path]]:
        return partial(Lock, shared=True), (self.path,)


def _share(handle: int, wait: bool) -> bool:
    try:
        import fcntl  # the locks of filelock that can be shared are SQLite databases, which no fork may inherit
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close(handle: int, temporary: list[Path]) -> None:
    for path in temporary:
        with suppress(OSError):  # Windows deletes no open file
            path.unlink()  # while the lock is held
    os.close(handle)


def check_files(outputs: Mapping[str, tuple[str | None, str]], inputs: Sequence[Path | str], overwrite: bool) -> None:
    """Refuse files that cannot be written, before the work.

    Args:
        outputs: By flag the file that is asked for, None where none is, and the suffix that it must have.
        inputs: What is read.
        overwrite: Whether a file may be there.

    Raises:
        UserError: Naming the first.
    """
    given = {flag: (Path(path), suffix) for flag, (path, suffix) in outputs.items() if path is not None}
    for flag, (path, suffix) in given.items():
        folder = path.absolute().parent
        if path.suffix != suffix:
            raise UserError(f"--{flag} must end in {suffix}, got {path}")
        if path.resolve() in {Path(other).resolve() for other in inputs}:
            raise UserError(f"--{flag} {path} is one of the inputs, which would be lost: give another name")
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"--{flag} {path} is there already: give another name, or --overwrite true")
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--{flag} {path} cannot be written: {folder} is not a folder to write in")


def lock_folder(folder: Path, command: str, alone: bool = True, share: bool = False) -> Lock:
    """Create a folder and lock it against other runs of a command, including those whose first process was killed.

    Args:
        folder: The value of ``--out``.
        command: The command, for the message.
        alone: Whether no other process may hold the lock.
        share: Share the lock, once it is taken, with processes that ask for it with ``alone=False``.

    Raises:
        UserError: If the folder cannot be created or written to, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--out {folder} cannot be written: its permissions, or its disk's, forbid it")
        lock = Lock(folder, shared=not alone, wait=False, required=False)
        if share:
            lock.share()
    except BlockingIOError as error:
        raise UserError(f"another {command} is writing to {folder}: wait until it has ended, or end it") from error
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error
    return lock
