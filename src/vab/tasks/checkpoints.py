"""Where a checkpoint is, and what is said of a file that is none."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vab.spec import UserError
from vab.tasks.exported import WEIGHTS, is_exported


def find_checkpoint(place: str | Path) -> Path:
    """The file that a path means: itself, the newest ``last.ckpt`` under a folder, an exported model's weights.

    Raises:
        UserError: If there is none.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a .ckpt file or a run's folder, such as runs/pretrain")
    if is_exported(path):
        return path / WEIGHTS
    found = [(file.stat().st_mtime_ns, file.stem == "last", file) for file in path.rglob("*.ckpt")]
    newest = max((entry for entry in found if entry[-1].stem.startswith("last")), default=None)
    if newest is None and found:
        raise UserError(f"no last.ckpt under {path}, but others: give one, such as {max(found)[-1]}")
    if newest is None:
        raise UserError(f"no last.ckpt under {path}: the run has not saved a checkpoint yet")
    return newest[-1]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Within it, whatever a file that is no checkpoint of ours, or half of one, makes torch and us raise is one line.

    Raises:
        UserError: That line.
    """
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError, OSError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.partition(". ")[0]  # what follows in torch's words is advice for programs
        if isinstance(error, KeyError):
            reason = f"it has no {reason}" if isinstance(error.args[0], str) else f"{type(error).__name__} {reason}"
        raise UserError(
            f"{path} is not a checkpoint of this version of vab: {reason}; give another .ckpt file, or a run's folder"
        ) from error
