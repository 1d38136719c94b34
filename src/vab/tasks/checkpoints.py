"""Where a checkpoint is, and what is said of a file that is none."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vab.spec import UserError
from vab.tasks.exported import WEIGHTS, is_exported


def find_checkpoint(place: str | Path) -> Path:
    """The file that a path means.

    Args:
        place: A file means itself. An exported model's folder means its weights. Any other folder means the newest
            ``last.ckpt`` under it, or its only ``.ckpt`` file.

    Raises:
        UserError: If there is no checkpoint, or several of which none is a ``last.ckpt``.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a .ckpt file or a run's folder, such as runs/pretrain")
    if is_exported(path):
        return path / WEIGHTS
    found = _by_age(path)
    last = [file for file in found if file.stem.startswith("last")]
    if not last and len(found) > 1:
        raise UserError(f"no last.ckpt under {path}, but {len(found)} others: give one, such as {found[-1]}")
    if not found:
        raise UserError(f"no .ckpt file under {path}: the run has not saved a checkpoint yet")
    return (last or found)[-1]


def newest_checkpoint(folder: Path) -> Path | None:
    """The last state of a run: its newest ``last.ckpt``, or the newest checkpoint of a run that keeps none."""
    found = _by_age(folder)
    last = [file for file in found if file.stem.startswith("last")]
    return next(reversed(last or found), None)


def _by_age(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first; of files of one moment, ``last.ckpt`` comes last."""
    return sorted(folder.rglob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.stem == "last", file))


def require_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights of a run that diverged.

    Raises:
        UserError: With the name of the first that is not finite.
    """
    wrong = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(weights)} weights of {path} are not finite, {wrong[0]} the first: its run"
            " diverged; give an earlier checkpoint"
        )


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
