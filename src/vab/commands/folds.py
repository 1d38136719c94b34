"""Cross-validation: one training for each fold, and what all of them say together."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from vab import __version__
from vab.callbacks.class_table import METRICS
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.opening import folds_of
from vab.files import write_atomically
from vab.spec import UserError

_COMMAND, _RESULT = "folds_command.json", "folds.json"
_SHOWN = {"top_1": "top-1", "map": "mAP"}


def cross_validate(arguments: Sequence[str], folds: int = 5, overwrite: bool = False) -> dict[str, Any]:
    """Train once for each fold, validate on that fold, and tell the mean and the deviation over folds.

    Each fold is a ``vab fit`` of its own with ``--data.fold i``, its run in the folder ``fold_i``; one that was done
    before with the same arguments is not done again. What counts is the last validation of a run: to choose the best
    one would be to choose by the fold that is being judged.

    Args:
        arguments: Of ``vab fit``: a recipe whose callbacks have a ``ClassTable``, and changes.
        folds: How many there are; they are numbered from 1.
        overwrite: Train again what was done before.

    Returns:
        Figures of each fold, mean and sample standard deviation; ``folds.json`` beside the runs holds the same.

    Raises:
        UserError: If there are fewer than two folds, the data lack one of them, or a run leaves no figures.
        SystemExit: With the status of a training that fails, which has said why.
    """
    if folds < 2:
        raise UserError(f"--folds must be 2 or more, got {folds}")
    config = yaml.safe_load(_vab(["fit", *arguments, "--print_config"], capture=True))
    home = _home(config)
    checked = False
    figures: dict[str, dict[str, float]] = {}
    for fold in range(1, folds + 1):
        folder = home / f"fold_{fold}"
        done, command = folder / METRICS, {"arguments": list(arguments), "fold": fold, "vab": __version__}
        if overwrite or not done.is_file() or _read(folder / _COMMAND) != command:
            for old in (folder / _COMMAND, done):  # a run that is cut off is done again
                old.unlink(missing_ok=True)
            if not checked:  # before the first training: the last one's may be a day later
                require_folds(config["data"], folds)
                checked = True
            print(f"fold {fold} of {folds}", flush=True)
            own = [f"--data.fold={fold}", f"--trainer.logger.init_args.version=fold_{fold}"]
            _vab(["fit", *arguments, *own])
            if not done.is_file():
                raise UserError(f"the run of fold {fold} left no {done}: give it the callback vab.callbacks.ClassTable")
            write_atomically(folder / _COMMAND, (json.dumps(command, indent=1) + "\n").encode())
        figures[str(fold)] = json.loads(done.read_text())
    report = {"arguments": list(arguments), "folds": figures, **summary(list(figures.values())), "vab": __version__}
    write_atomically(home / _RESULT, (json.dumps(report, indent=1) + "\n").encode())
    _show(report, home)
    return report


def summary(figures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (n - 1) over folds, of each figure that all of them have."""
    names = [name for name in _SHOWN if all(name in fold for fold in figures)]
    columns = {name: [fold[name] for fold in figures] for name in names}
    return {
        "mean": {name: statistics.fmean(column) for name, column in columns.items()},
        "deviation": {name: statistics.stdev(column) for name, column in columns.items()},
    }


def require_folds(data: Mapping[str, Any], folds: int) -> None:
    """Refuse data that lack a fold.

    Args:
        data: Arguments of ``ShardDataModule``.
        folds: How many there must be, numbered from 1.

    Raises:
        UserError: If there is one without a record; it names a number of folds that there are.
    """
    if not data.get("train") or not data.get("val") or isinstance(data["train"], dict):
        return  # the first training says at once what is wrong
    module = ShardDataModule(**{**data, "fold": None})
    there = sorted(set(folds_of(module.val_dataset, data["fold_pattern"])))
    lacking = [fold for fold in range(1, folds + 1) if fold not in there]
    if not lacking:
        return
    if there == list(range(1, len(there) + 1)) and len(there) > 1:
        advice = f"type --folds {len(there)}"
    else:
        advice = "folds are numbered from 1, as data.fold_pattern finds them in the ids of records"
    raise UserError(
        f"{data['val']} has the folds {there}: with --folds {folds} there is nothing to validate fold {lacking[0]} on;"
        f" {advice}"
    )


def _home(config: Mapping[str, Any]) -> Path:
    """Folder of the runs, by the config that the arguments make."""
    logger = (config.get("trainer") or {}).get("logger")
    settings = logger.get("init_args", {}) if isinstance(logger, dict) else {}
    if not settings.get("name"):
        raise UserError("folds needs a logger with save_dir and name, such as the recipes' TensorBoardLogger")
    return Path(settings.get("save_dir") or ".") / settings["name"]


def _vab(arguments: Sequence[str], capture: bool = False) -> str:
    """Run a command of vab's in a process of its own; its complaints are ours."""
    interrupted, out = False, ""
    with subprocess.Popen(
        [sys.executable, "-m", "vab.cli", *arguments], stdout=subprocess.PIPE if capture else None, text=True
    ) as run:
        while run.returncode is None:
            try:
                out = run.communicate()[0] or ""
            except KeyboardInterrupt:  # it hears Ctrl-C as well, ends as it should, and says so
                interrupted = True
    if interrupted or run.returncode:
        raise SystemExit(130 if interrupted else run.returncode)
    return out


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or of a run that was cut off: it is done again
        return None


def _show(report: dict[str, Any], home: Path) -> None:
    names = list(report["mean"])
    table = Table("fold", "N", *(_SHOWN[name] for name in names))
    for column in table.columns[1:]:
        column.justify = "right"
    for fold, figures in report["folds"].items():
        table.add_row(fold, f"{figures['records']:g}", *(f"{figures[name]:.4f}" for name in names))
    table.add_section()
    both = (f"{report['mean'][name]:.4f} +- {report['deviation'][name]:.4f}" for name in names)
    table.add_row("mean", "", *both)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table, markup=False)
    print(f"last validation of each run; +- is the standard deviation over folds (n - 1); {home / _RESULT}")
