"""Files that a command writes: refused before the work, not after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vab import UserError  # not from vab.spec, which needs torch
from vab.files import Lock


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
    """Create a folder, and lock it against other runs of a command, also against those whose first process was killed.

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
