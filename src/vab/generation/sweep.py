"""Compare sampler settings: generate the same validation records with each, and measure the sound.

The reference is the codec round trip of a record, not its original sound: no model of these codes could be nearer to
the original, so what is measured is the model alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from vab import __version__
from vab.console import ProgressBar, print_table
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.order import spread_evenly
from vab.files import lock_folder, write_atomically
from vab.frozen.batches import JudgeOutputs, class_columns, decode_sounds, judge_sounds, true_classes
from vab.frozen.protocols import Judge
from vab.generation.generator import Generator
from vab.generation.resumable import ResumableFolder
from vab.generation.resumable import Row as Cells
from vab.generation.sampler_files import Setting
from vab.metrics.agreement import class_agreement
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments
from vab.metrics.health import Health, audio_statistics, health, warnings_for
from vab.metrics.uncertainty import mean_and_error
from vab.spec import Batch, UserError
from vab.tokens.sampler import Sampler, sampler_from

Metric = Literal["kld", "fad", "agreement", "warnings", "seconds"]
BEST = "best.yaml"
_FIELDS = tuple(field.name for field in fields(Sampler))
_WORDS = tuple(name for name in _FIELDS if isinstance(getattr(Sampler(), name), str))


@dataclass(frozen=True)
class Row:
    """A setting and its metrics."""

    setting: Setting
    """What was tried."""
    metrics: dict[str, float]
    """As ``Subset.measure`` names them."""


class Subset:
    """Some records of a data set, and how well a model generates them with given settings.

    Args:
        generator: The model with its codec.
        dataset: With as many levels as the generator has.
        judge: Embeds and classifies the sounds.
        num_records: Number of records, evenly spaced over the data set; all if it has fewer.
        batch_size: Records at once.
        seed: Of the decoding; the same for all settings.

    Raises:
        UserError: If a number is out of range, or the data set has fewer than 2 records.
    """

    def __init__(
        self, generator: Generator, dataset: ShardDataset, judge: Judge, num_records: int, batch_size: int, seed: int
    ) -> None:
        self.generator, self.dataset, self.judge = generator, dataset, judge
        self.batch_size, self.seed = batch_size, seed
        self.records = spread_evenly(num_records, len(dataset))
        if len(self.records) < 2:
            raise UserError(f"{dataset.folder} has {len(dataset)} records: a sweep needs at least 2")

    def measure(self, sampler: Sampler) -> dict[str, float]:
        """Generate all records, and measure them.

        Returns:
            ``agreement`` (if classes are known) and ``kld_<judge>`` (nats, KL(round trip || generated)), each with its
            standard error as ``..._error``; ``fad_<judge>``; ``warnings``, the share of sounds with any; ``silence``,
            ``rms_db``, ``entropy``, ``longest_repeat_seconds``, means over sounds (and levels); and ``seconds``, the
            time to generate the codes of a record, without the codec.
        """
        start = time.perf_counter()
        codes = [self._generate(number, sampler) for number in range(len(self._batches))]  # copied, so it has ended
        seconds = time.perf_counter() - start
        outputs, measured = self._judge_outputs(codes)
        real, _ = self._real
        name = self.judge.name
        metrics: dict[str, float] = {}
        if self.truth is not None:
            known = self.truth.any(1)
            agreement = class_agreement(outputs.probabilities[known], self.truth[known])
            metrics["agreement"], metrics["agreement_error"] = mean_and_error(agreement)
        metrics[f"kld_{name}"], metrics[f"kld_{name}_error"] = mean_and_error(paired_kl(real.logits, outputs.logits))
        metrics[f"fad_{name}"] = float(frechet_distance(*moments(real.embedding), *moments(outputs.embedding)))
        metrics["warnings"] = _mean([bool(warnings_for(sound, self._statistics)) for sound in measured])
        for value in ("silence", "rms_db", "longest_repeat_seconds"):
            metrics[value] = _mean([getattr(sound, value) for sound in measured])
        metrics["entropy"] = _mean([_mean(sound.entropy) for sound in measured])
        return metrics | {"seconds": seconds / len(self.records)}

    def warm_up(self) -> None:
        """Generate a batch, so that what is slow only once is in no setting's time."""
        self._generate(0, Sampler(decode_steps=1))

    @cached_property
    def truth(self) -> Tensor | None:
        """(M, L) bool true classes; None if the records have no labels that the judge knows."""
        try:
            columns = class_columns(self.judge, self.dataset.labels)
        except UserError:
            return None
        truth = torch.cat([true_classes(self.judge, columns, batch.labels) for batch in self._batches])
        return truth if int(truth.any(1).sum()) > 1 else None

    @cached_property
    def _batches(self) -> list[Batch]:
        starts = range(0, len(self.records), self.batch_size)
        return [self.dataset.read(self.records[start : start + self.batch_size]) for start in starts]

    @cached_property
    def _real(self) -> tuple[JudgeOutputs, list[Health]]:
        """Judge and health of the codec round trips."""
        return self._judge_outputs([batch.codes for batch in self._batches])

    @cached_property
    def _statistics(self) -> dict[str, float]:
        return self.generator.audio_statistics or audio_statistics(self._real[1])

    def _generate(self, number: int, sampler: Sampler) -> Tensor:
        """(B, K, T) codes of a batch on the CPU; a fine stage follows with its own settings."""
        return self.generator.codes_of_records(self._batches[number], self.seed, sampler).cpu()

    @torch.inference_mode()
    def _judge_outputs(self, codes: Sequence[Tensor]) -> tuple[JudgeOutputs, list[Health]]:
        spec, rate = self.generator.task.spec, self.generator.codec.sample_rate
        outputs, measured = [], []
        for batch, part in zip(self._batches, codes, strict=True):
            sounds = decode_sounds(self.generator.codec, part, batch.steps)
            outputs.append(judge_sounds(self.judge, sounds, rate))
            for sound, record, steps in zip(sounds, part, batch.steps.tolist(), strict=True):
                measured.append(health(sound, record[:, :steps], rate, spec.code_rate))
        return JudgeOutputs(*map(torch.cat, zip(*outputs, strict=True))), measured


def run_sweep(
    subset: Subset, settings: Sequence[Setting], out: Path, metric: Metric, identity: dict[str, Any], about: Any
) -> list[Row]:
    """Measure the settings that the folder's table lacks, and print all of it, best first.

    Args:
        subset: Measures them.
        settings: What to try.
        out: Folder of the results: ``sweep.json``, ``sweep.csv`` and ``best.yaml``.
        metric: What the table is sorted by.
        identity: What the metrics depend on beside sampler and subset.
        about: Written beside it for the reader.

    Raises:
        UserError: If the folder has results of something else, or the metric cannot be computed.
    """
    judge, data = subset.judge, subset.dataset
    identity = identity | {
        "vab": __version__,
        "data_manifest": data.manifest_hash,
        "judge": f"{judge.name} {judge.weight_hash[:12]}",
        "device": subset.generator.task.device.type,  # the seconds are of this device and batch size
        "records": len(subset.records),
        "seed": subset.seed,
        "batch_size": subset.batch_size,
    }
    column = f"{metric}_{judge.name}" if metric in ("kld", "fad") else metric
    no_labels = UserError(
        f"{data.folder} has no labels that judge {judge.name} knows: sort by another --metric, such as kld"
    )
    folder = ResumableFolder(out, "sweep")
    with lock_folder(out, "vab sweep"):
        folder.check(identity)
        rows = _read_rows(folder)
        folder.begin(identity, about, {})
        done = [row.setting.sampler for row in rows]
        if missing := [setting for setting in settings if setting.sampler not in done]:
            if column == "agreement" and subset.truth is None:
                raise no_labels
            subset.warm_up()
            with ProgressBar("settings", len(missing)) as bar:
                for number, setting in enumerate(missing, start=1):
                    rows.append(Row(setting, subset.measure(setting.sampler)))
                    _write_rows(folder, rows)
                    bar.advance()
                    if not bar.is_shown:
                        words = (
                            f"{setting.name} {_steps(setting.sampler)} steps: {column} {rows[-1].metrics[column]:.4g}"
                        )
                        print(f"{number}/{len(missing)} {words.strip()}", file=sys.stderr, flush=True)
        if column not in rows[0].metrics:
            raise no_labels
        rows = ranked(rows, column)
        _write_best(out / BEST, rows, column)
    _print(rows, metric, subset, out)
    return rows


def ranked(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows with the best first, by a column of their metrics; of equal ones, those of fewer passes first."""
    sign = -1 if column == "agreement" else 1
    return sorted(rows, key=lambda row: (sign * row.metrics[column], row.setting.sampler.total_steps))


def _read_rows(folder: ResumableFolder) -> list[Row]:
    """The rows that earlier runs wrote."""
    rows = []
    for cells in folder.table_rows():
        try:
            own = {name: cells.pop(name) for name in ("name", *_FIELDS, "total_steps")}
            values = {name: own[name] if name in _WORDS else json.loads(own[name]) for name in _FIELDS}
            setting = Setting(own["name"], sampler_from(values))
            rows.append(Row(setting, {column: float(value) for column, value in cells.items()}))
        except (KeyError, ValueError) as error:
            raise folder.not_readable(folder.table_file) from error
    return rows


def _write_rows(folder: ResumableFolder, rows: Sequence[Row]) -> None:
    """Write the table; whole or not at all."""
    table: list[Cells] = []
    for row in rows:
        sampler = row.setting.sampler
        cells = {name: value if name in _WORDS else json.dumps(value) for name, value in asdict(sampler).items()}
        cells |= {"name": row.setting.name, "total_steps": str(sampler.total_steps)}
        table.append(cells | {name: repr(value) for name, value in row.metrics.items()})
    folder.write_table(["name", *_FIELDS, "total_steps", *rows[0].metrics], table)


def _write_best(path: Path, rows: Sequence[Row], column: str) -> None:
    """The sampler file of the first row."""
    comment = f"# {column} {rows[0].metrics[column]:.6g}, the best of {len(rows)} settings in sweep.csv\n"
    write_atomically(path, comment + yaml.safe_dump(asdict(rows[0].setting.sampler), sort_keys=False))


def _print(rows: Sequence[Row], metric: Metric, subset: Subset, out: Path) -> None:
    """The table, best first."""
    name, count, width = subset.judge.name, len(subset.records), subset.judge.embedding_dim
    if count <= width:
        print(
            f"warning: fad_{name} is of {count} records, with embeddings of {width} dimensions: it compares settings "
            "of this table, but with no other number of records",
            file=sys.stderr,
        )
    samplers = [row.setting.sampler for row in rows]
    others = [field for field in _FIELDS if field != "decode_steps"]
    varying = [field for field in others if len({getattr(sampler, field) for sampler in samplers}) > 1]
    columns = [column for column in ("agreement", f"kld_{name}", f"fad_{name}") if column in rows[0].metrics]
    cells = []
    for row in rows:
        sampler, metrics = row.setting.sampler, row.metrics
        words = ", ".join(f"{field} {getattr(sampler, field)}" for field in varying if _matters(field, sampler)) or "-"
        values = [_with_error(metrics, column) for column in columns]
        rest = [f"{metrics['warnings']:.0%}", f"{metrics['entropy']:.2f}", f"{metrics['seconds']:.3f}"]
        cells.append([row.setting.name, _steps(sampler), words, *values, *rest])
    note = (
        f"sorted by {metric}, {'highest' if metric == 'agreement' else 'lowest'} first; +- standard error over {count} "
        f"records; kld: nats per record, KL(codec round trip || generated); fad: to the round trip, N = {count}, "
        f"{width} dimensions; judge {name} {subset.judge.weight_hash[:12]}; warnings: share of sounds with any; "
        f"entropy: bits per code, mean of levels; s/record: time to generate the codes, {subset.batch_size} at once "
        f"on {subset.generator.task.device.type}. {out / BEST} is the first row."
    )
    headings = ["", "steps", "sampler", *columns, "warnings", "entropy", "s/record"]
    print_table(str(out), headings, cells, left=(0, 1, 2), notes=[note])


def _matters(name: str, sampler: Sampler) -> bool:
    """Whether a setting has an effect beside the others, and is not the default word, such as remask none."""
    has_effect = {
        "choice_temperature": sampler.order == "confidence",
        "remask_strength": sampler.remask != "none",
        "guidance": sampler.guidance_scale != 1,
    }
    return has_effect.get(name, True) and not (name in _WORDS and getattr(sampler, name) == getattr(Sampler(), name))


def _steps(sampler: Sampler) -> str:
    """``16``, or ``16 (13+1+1+1)``."""
    steps = sampler.decode_steps
    return f"{sampler.total_steps} ({'+'.join(map(str, steps))})" if isinstance(steps, list) else str(steps)


def _with_error(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(f"{name}_error")
    return f"{metrics[name]:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
