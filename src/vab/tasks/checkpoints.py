"""Find a checkpoint, and check that it fits a task."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vab.backbone import Backbone
from vab.spec import UserError
from vab.tasks.exported import WEIGHTS, is_exported

_SHOWN = 3
"""Weights that a message names."""


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint at a path.

    Args:
        place: A file; the folder of an exported model; or a folder with one ``.ckpt`` file or several, of which the
            newest ``last.ckpt`` is taken.

    Raises:
        UserError: If there is no checkpoint, or several and none is a ``last.ckpt``.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a .ckpt file or a run's folder, such as runs/pretrain")
    if is_exported(path):
        return path / WEIGHTS
    newest, count = newest_checkpoint(path), len([*path.rglob("*.ckpt")])
    if newest is None:
        raise UserError(f"no .ckpt file under {path}: the run has not saved a checkpoint yet")
    if count > 1 and not newest.stem.startswith("last"):
        raise UserError(f"no last.ckpt under {path}, but {count} others: give one, such as {newest}")
    return newest


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest ``last.ckpt`` under a folder, or its newest checkpoint if there is none of that name."""

    def age(file: Path) -> tuple[bool, int, bool, Path]:
        return file.stem.startswith("last"), file.stat().st_mtime_ns, file.stem == "last", file

    return max(folder.rglob("*.ckpt"), key=age, default=None)


def require_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse the weights of a run that diverged.

    Raises:
        UserError: With the name of the first that is not finite.
    """
    wrong = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(weights)} weights of {path} are not finite, {wrong[0]} the first: its run"
            " diverged; give an earlier checkpoint"
        )


def require_same_sizes(theirs: Mapping[str, Any], mine: Mapping[str, Any], called: str, free: Iterable[str]) -> None:
    """Refuse a backbone with other arguments than this task's.

    Args:
        theirs: Arguments of the checkpoint's backbone; those of an older release may lack some.
        mine: Arguments of this task's.
        called: Name of the checkpoint, for the message.
        free: Arguments that may differ.

    Raises:
        UserError: With both values of each.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Backbone).parameters.items()}
    pairs = {name: (theirs.get(name, defaults[name]), value) for name, value in mine.items() if name not in free}
    if differ := [f"{name}: {other} != {own}" for name, (other, own) in pairs.items() if other != own]:
        raise UserError(
            f"{called} has another backbone (its value != this one's: {'; '.join(differ)}): give the same"
            " --model.backbone"
        )


def require_same_weights(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], called: str) -> None:
    """Refuse weights of other names or shapes than this task's; ``called`` is the checkpoint's name.

    Raises:
        UserError: With the first that do not fit.
    """
    wrong = [f"it has no {name}" for name in mine.keys() - theirs.keys()]
    wrong += [f"there is no {name} here" for name in theirs.keys() - mine.keys()]
    shapes = {name: (tuple(theirs[name].shape), tuple(mine[name].shape)) for name in mine.keys() & theirs.keys()}
    wrong += [f"{name}: {other} != {own}" for name, (other, own) in shapes.items() if other != own]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"the weights of {called} do not fit this model ({'; '.join(sorted(wrong)[:_SHOWN])}{more}): give the"
            " config.yaml of its run as --config"
        )


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """While a checkpoint is read, turn the errors of a file that is none of ours, or cut off, into one line.

    Raises:
        UserError: With that line.
    """
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError, OSError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.partition(". ")[0]  # then torch gives advice for programmers
        if isinstance(error, KeyError):
            reason = f"it has no {reason}" if isinstance(error.args[0], str) else f"{type(error).__name__} {reason}"
        raise UserError(
            f"{path} is not a checkpoint of this version of vab: {reason}; give another .ckpt file, or a run's folder"
        ) from error
