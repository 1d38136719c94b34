"""Which sampler settings are best: a grid of them on the same validation records."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from vab import __version__
from vab.console import ProgressBar
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.order import spread_evenly
from vab.files import sha256_of, write_atomically
from vab.frozen.judges import load_judge
from vab.frozen.protocols import Judge
from vab.generation.generator import Generator
from vab.generation.grids import Setting, read_grid
from vab.generation.measuring import Subset
from vab.spec import UserError
from vab.tasks.checkpoints import find_checkpoint
from vab.tokens.sampler import Sampler, sampler_from

Metric = Literal["kld", "fad", "agreement", "warnings", "seconds"]

SETTINGS, TABLE, BEST = "sweep.json", "sweep.csv", "best.yaml"
_FIELDS = tuple(field.name for field in fields(Sampler))
_WORDS = tuple(name for name in _FIELDS if isinstance(getattr(Sampler(), name), str))


@dataclass(frozen=True)
class Row:
    """A setting and what was measured with it."""

    setting: Setting
    """What was tried."""
    figures: dict[str, float]
    """As ``Subset.measure`` names them."""


def sweep(
    checkpoint: str,
    data: str,
    grid: str,
    out: str,
    num_records: int = 96,
    batch_size: int = 16,
    metric: Metric = "kld",
    seed: int = 0,
    judge: str = "tiny",
    fine_checkpoint: str | None = None,
    device: str = "auto",
) -> list[Row]:
    """Try a grid of sampler settings on the same validation records, and print a table of what comes out.

    The rows go to sweep.csv in the folder --out as they are done: run again, with the same or another grid, it goes on
    with the settings that are missing. The best is best.yaml, which vab generate takes as --sampler.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        data: Folder of shards; records evenly spaced over it are used.
        grid: A YAML file: names of sampler settings, each with a list of values, of which all combinations are tried;
            or a list of such tables. What it does not name is as in the checkpoint.
        out: Folder of the results.
        num_records: Records that each setting generates; all if there are fewer.
        batch_size: Records at once.
        metric: What the table is sorted by. kld: judge's divergence from the codec's round trip, pair by pair; fad:
            its Frechet distance from it, over all; agreement: judge's agreement with the labels; warnings: share of
            sounds that seem wrong; seconds: time per record.
        seed: Of the decoding, the same for all settings.
        judge: The network that listens.
        fine_checkpoint: Of the fine stage that follows with its own settings, where the checkpoint is a coarse stage.
        device: auto, cpu, cuda, ...
    """
    if num_records < 2 or batch_size < 1:
        raise UserError(f"need num_records of 2 or more and batch_size of 1 or more, got {num_records}, {batch_size}")
    generator = Generator.load(checkpoint, device=device, fine_checkpoint=fine_checkpoint)
    task = generator.task
    settings = read_grid(grid, task.sampler, task.made_levels)
    dataset = ShardDataset(data, levels=generator.levels)
    replace(task.spec, num_codebooks=generator.levels).require(dataset.spec, "checkpoint", "shards")
    listener = load_judge(judge, task.device)
    records = spread_evenly(num_records, len(dataset))
    if len(records) < 2:
        raise UserError(f"{data} has {len(dataset)} records: a sweep needs at least 2")
    results = _Results(Path(out), _identity(generator, dataset, listener, checkpoint, fine_checkpoint)
                       | {"records": len(records), "seed": seed, "batch_size": batch_size})  # fmt: skip
    column = _column(metric, judge)
    done = {row.setting.content for row in results.rows}
    if missing := [setting for setting in settings if setting.content not in done]:
        subset = Subset(generator, dataset, listener, records, batch_size, seed)
        if column == "agreement" and subset.truth is None:
            raise _no_labels(data, judge)
        _fill(results, subset, missing, column)
    if column not in results.rows[0].figures:
        raise _no_labels(data, judge)
    rows = ranked(results.rows, column)
    if len(records) <= (width := listener.embedding_dim):
        print(
            f"warning: fad_{judge} is of {len(records)} records, with embeddings of {width} dimensions: "
            f"it compares settings of this table, but with no other number of records",
            file=sys.stderr,
        )
    results.write_best(rows[0], column)
    _print(rows, metric, results, listener)
    return rows


def ranked(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows with the best first, by a column of their figures; of equal ones those of fewer passes."""
    sign = -1 if column == "agreement" else 1
    return sorted(rows, key=lambda row: (sign * row.figures[column], row.setting.sampler.total_steps))


def _column(metric: Metric, judge: str) -> str:
    return f"{metric}_{judge}" if metric in ("kld", "fad") else metric


def _no_labels(data: str, judge: str) -> UserError:
    return UserError(f"{data} has no labels that judge {judge} knows: sort by another --metric, such as kld")


def _fill(results: _Results, subset: Subset, missing: Sequence[Setting], column: str) -> None:
    """Measure what is missing, and keep each row as it is done."""
    subset.warm_up()
    with ProgressBar("settings", len(missing)) as bar:
        for number, setting in enumerate(missing, start=1):
            figures = subset.measure(setting.sampler)
            results.add(Row(setting, figures))
            bar.advance()
            if not bar.is_shown:
                words = f"{setting.name} {_steps(setting.sampler)} steps: {column} {figures[column]:.4g}".strip()
                print(f"{number}/{len(missing)} {words}", file=sys.stderr, flush=True)


class _Results:
    """The folder of a sweep: what was measured on (sweep.json) and every row that is done (sweep.csv)."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Take up what is there.

        Args:
            folder: Made if it is not there.
            identity: On what the figures depend, but for the sampler; ``paths`` in it may change.

        Raises:
            UserError: If the folder holds figures of something else.
        """
        self.folder, self.identity = folder, identity
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be a folder: {error.strerror or error}") from error
        if (folder / SETTINGS).exists():
            self._require_same(identity)
            self.rows = self._read()
        elif (folder / TABLE).exists():
            raise UserError(f"{folder / TABLE} has no {SETTINGS} beside it that says what it is of: give another --out")
        else:
            write_atomically(folder / SETTINGS, (json.dumps(identity, indent=2) + "\n").encode())

    def add(self, row: Row) -> None:
        """Keep a row: the table is written anew, whole or not at all."""
        self.rows.append(row)
        text = io.StringIO(newline="")
        columns = ["name", *_FIELDS, "total_steps", *row.figures]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for kept in self.rows:
            sampler = kept.setting.sampler
            values = {
                name: value if name in _WORDS else json.dumps(value) for name, value in asdict(sampler).items()
            }  # fmt: skip
            values |= {"name": kept.setting.name, "total_steps": str(sampler.total_steps)}
            writer.writerow(values | {name: repr(value) for name, value in kept.figures.items()})
        write_atomically(self.folder / TABLE, text.getvalue())

    def write_best(self, row: Row, column: str) -> None:
        """The sampler file of the best row."""
        comment = f"# {column} {row.figures[column]:.6g}, the best of {len(self.rows)} settings in {TABLE}\n"
        lines = [
            yaml.safe_dump({name: value}, default_flow_style=None if isinstance(value, list) else False)
            for name, value in asdict(row.setting.sampler).items()
        ]
        write_atomically(self.folder / BEST, comment + "".join(lines))

    def _require_same(self, identity: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        try:
            theirs = json.loads(path.read_text())
            names = [name for name in dict.fromkeys([*theirs, *identity]) if name != "paths"]
            differences = [
                f"{name}: {theirs.get(name)} != {identity.get(name)}"
                for name in names
                if theirs.get(name) != identity.get(name)
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: give another --out") from error
        if differences:
            raise UserError(
                f"{self.folder} holds a sweep of something else ({'; '.join(differences)}): its figures do not compare "
                f"with this one's; give another --out"
            )

    def _read(self) -> list[Row]:
        path = self.folder / TABLE
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        rows = []
        for line in lines:
            try:
                values = {name: line.pop(name) for name in _FIELDS}
                settings = {name: value if name in _WORDS else json.loads(value) for name, value in values.items()}
                name, _ = line.pop("name"), line.pop("total_steps")
                setting = Setting(name, sampler_from(settings, where=str(path)))
                rows.append(Row(setting, {column: float(value) for column, value in line.items()}))
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{path} is not as this version of vab writes it: give another --out") from error
        return rows


def _identity(
    generator: Generator, dataset: ShardDataset, judge: Judge, checkpoint: str, fine_checkpoint: str | None
) -> dict[str, Any]:
    """What figures depend on beside sampler and subset. ``paths`` is for the reader."""
    files = {"checkpoint": find_checkpoint(checkpoint)}
    if fine_checkpoint is not None:
        files["fine_checkpoint"] = find_checkpoint(fine_checkpoint)
    identity: dict[str, Any] = {f"{name}_sha256": sha256_of(path) for name, path in files.items()}
    paths = {name: str(path) for name, path in files.items()} | {"data": str(dataset.folder)}
    return identity | {
        "vab": __version__,
        "data_manifest": dataset.manifest_hash,
        "judge": f"{judge.name} {judge.weight_hash[:12]}",
        "device": generator.task.device.type,  # the seconds are of this device and batch size
        "paths": paths,
    }


def _print(rows: Sequence[Row], metric: Metric, results: _Results, judge: Judge) -> None:
    """The table, best first."""
    console = Console(width=None if Console().is_terminal else 130)
    samplers = [row.setting.sampler for row in rows]
    others = [name for name in _FIELDS if name != "decode_steps"]
    varying = [name for name in others if len({getattr(sampler, name) for sampler in samplers}) > 1]
    columns = [name for name in ("agreement", f"kld_{judge.name}", f"fad_{judge.name}") if name in rows[0].figures]
    table = Table(title=str(results.folder), title_justify="left")
    for heading in ("", "steps", "sampler"):
        table.add_column(heading)
    for heading in (*columns, "warnings", "entropy", "s/record"):
        table.add_column(heading, justify="right")
    for row in rows:
        sampler, figures = row.setting.sampler, row.figures
        words = ", ".join(f"{name} {getattr(sampler, name)}" for name in varying if _matters(name, sampler)) or "-"
        values = [_with_error(figures, name) for name in columns]
        rest = [f"{figures['warnings']:.0%}", f"{figures['entropy']:.2f}", f"{figures['seconds']:.3f}"]
        table.add_row(row.setting.name, _steps(sampler), words, *values, *rest)
    console.print(table)
    identity = results.identity
    note = (
        f"sorted by {metric}, {'highest' if metric == 'agreement' else 'lowest'} first; +- standard error over "
        f"{identity['records']} records; kld: nats per record, KL(codec round trip || generated); fad: to the round "
        f"trip, N = {identity['records']}, {judge.embedding_dim} dimensions; judge {identity['judge']}; warnings: "
        f"share of sounds with any; entropy: bits per code, mean of levels; s/record: making the codes, "
        f"{identity['batch_size']} at once on {identity['device']}. {results.folder / BEST} is the first row."
    )
    console.print(note, style="dim", highlight=False)


def _matters(name: str, sampler: Sampler) -> bool:
    """Whether a setting has any effect beside the others, and is not the usual word, such as remask none."""
    if name in _WORDS and getattr(sampler, name) == getattr(Sampler(), name):
        return False
    if name == "choice_temperature":
        return sampler.order == "confidence"
    if name == "remask_strength":
        return sampler.remask != "none"
    if name == "guidance":
        return sampler.guidance_scale != 1
    return True


def _steps(sampler: Sampler) -> str:
    """``16``, or ``16 (13+1+1+1)``."""
    steps = sampler.decode_steps
    return f"{sampler.total_steps} ({'+'.join(map(str, steps))})" if isinstance(steps, list) else str(steps)


def _with_error(figures: dict[str, float], name: str) -> str:
    error = figures.get(f"{name}_error")
    return f"{figures[name]:.3f}" + ("" if error is None else f" +- {error:.3f}")
