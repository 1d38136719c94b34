"""``vab folds``: cross-validation, one training for each fold."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vab import UserError, __version__
from vab.console import print_table
from vab.files import write_atomically

_COMMAND, _RESULT = "folds_command.json", "folds.json"
_COLUMNS = {"top_1": "top-1", "map": "mAP"}


def cross_validate(arguments: list[str], folds: int = 5, overwrite: bool = False) -> dict[str, Any]:
    """Train once for each fold, validate on that fold, and print the mean and the standard deviation over folds.

    Each fold is a run of vab fit with --data.fold i in the folder fold_i. All other flags are those of vab fit. A fold
    that was finished with the same flags is not trained again; an interrupted fold is restarted from scratch. The
    metrics are those of a run's last validation: the best one would be chosen by the fold that is being tested.

    Args:
        arguments: Of vab fit: a recipe whose callbacks have a ClassTable, and changes.
        folds: How many there are; they are numbered from 1.
        overwrite: Train finished folds again.

    Returns:
        Metrics of each fold, mean and sample standard deviation; ``folds.json`` beside the runs holds the same.

    Raises:
        UserError: If there are fewer than two folds, the data lack one of them, or a run writes no metrics.
        SystemExit: With the status of a training that fails, which has printed why.
    """
    import yaml

    from vab.callbacks.class_table import METRICS

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
            for old in (folder / _COMMAND, done):  # else an interrupted run would count as finished
                old.unlink(missing_ok=True)
            if not checked:  # before the first training, as the last one may be a day later
                require_folds(config["data"], folds)
                checked = True
            print(f"fold {fold} of {folds}", flush=True)
            own = [f"--data.fold={fold}", f"--trainer.logger.init_args.version=fold_{fold}"]
            _vab(["fit", *arguments, *own])
            if not done.is_file():
                raise UserError(
                    f"the run of fold {fold} wrote no {done}: give it the callback vab.callbacks.ClassTable"
                )
            write_atomically(folder / _COMMAND, json.dumps(command, indent=1) + "\n")
        figures[str(fold)] = json.loads(done.read_text())
    report = {"arguments": list(arguments), "folds": figures, **summary(list(figures.values())), "vab": __version__}
    write_atomically(home / _RESULT, json.dumps(report, indent=1) + "\n")
    _show(report, home)
    return report


def summary(figures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (n - 1) over folds, of each metric that all of them have."""
    names = [name for name in _COLUMNS if all(name in fold for fold in figures)]
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
        UserError: If a fold has no record; the message names the folds that there are.
    """
    from vab.data.reading.datamodule import ShardDataModule
    from vab.data.reading.opening import folds_of

    if not data.get("train") or not data.get("val") or isinstance(data["train"], dict):
        return  # the first training reports at once what is wrong
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
    """Run a command of vab in another process, which prints its own errors."""
    interrupted, out = False, ""
    with subprocess.Popen(
        [sys.executable, "-m", "vab.cli", *arguments], stdout=subprocess.PIPE if capture else None, text=True
    ) as run:
        while run.returncode is None:
            try:
                out = run.communicate()[0] or ""
            except KeyboardInterrupt:  # it gets Ctrl-C as well, and ends as it should
                interrupted = True
    if interrupted or run.returncode:
        raise SystemExit(130 if interrupted else run.returncode)
    return out


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or of an interrupted run
        return None


def _show(report: dict[str, Any], home: Path) -> None:
    names = list(report["mean"])
    rows: list[list[str] | None] = [
        [fold, f"{metrics['records']:g}", *(f"{metrics[name]:.4f}" for name in names)]
        for fold, metrics in report["folds"].items()
    ]
    mean = [f"{report['mean'][name]:.4f} +- {report['deviation'][name]:.4f}" for name in names]
    print_table("", ["fold", "N", *(_COLUMNS[name] for name in names)], [*rows, None, ["mean", "", *mean]])
    print(f"last validation of each run; +- is the standard deviation over folds (n - 1); {home / _RESULT}")
