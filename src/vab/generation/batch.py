"""Generate the sounds of a whole test set: resumable, on any number of ranks, each input exactly once.

The outputs are divided into batches of ``batch_size`` in the order of the list, whatever is finished already, and batch
b belongs to rank (b mod ranks). A batch with a missing output is generated as a whole and its missing outputs are
written, because the rounding of a network may depend on the batch. So the outputs are equal bit for bit after any
interruption and on any number of ranks.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vab import __version__
from vab.console import ProgressBar
from vab.data.media.segments import MediaError
from vab.data.shards.format import library_versions
from vab.files import lock_folder, sha256_of
from vab.generation.outputs import Job
from vab.generation.prefetch import prefetch
from vab.generation.recipe import Recipe
from vab.generation.request import Prepared, Request
from vab.generation.resumable import Journal, Row
from vab.generation.sound import Sound
from vab.generation.table import COLUMNS, GenerationFolder
from vab.ranks import start_ranks
from vab.spec import UserError
from vab.tasks.checkpoints import find_checkpoint
from vab.tokens.sampler import Sampler

_LISTED_ERRORS = 20
"""Failed inputs that the last message names; the table has all."""
_HEALTH = ("peak", "rms_db", "silence", "longest_repeat_seconds")


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    rows: list[Row]
    """The table: one row for each output wanted."""
    made: int
    """Outputs of this run."""

    @property
    def failed(self) -> list[Row]:
        """Rows without an output."""
        return [row for row in self.rows if row["error"]]


def generate_many(
    jobs: Sequence[Job],
    out: Path,
    recipe: Recipe,
    batch_size: int = 8,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    overwrite: bool = False,
) -> Report | None:
    """Generate the sounds of a test set, or those that an interrupted run did not reach, and ``generations.csv``.

    Args:
        jobs: What to generate, each with its own target below ``out``.
        out: Folder of the outputs.
        recipe: What they are generated with. A folder that was begun with another one is refused.
        batch_size: Outputs that are generated together. It changes the results by float rounding only.
        device: auto, cpu, cuda, and for a single process cuda:1, ...
        devices: Processes on each machine, each with its own device. With more than one, the command line of this
            process is run again for each of the others.
        num_nodes: Machines.
        overwrite: Delete what an earlier run made in the folder, and start from scratch.

    Returns:
        The result; None on ranks other than the first.

    Raises:
        UserError: At the end, if any input failed, with a list of them; at once, if the disk is full, the folder was
            begun with another recipe, or another run is writing to it.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, got {batch_size}")
    ranks = start_ranks(device, devices, num_nodes)
    with ranks.ending_together(), ExitStack() as stack:
        folder = GenerationFolder(out, {_output(job, out): _stamp(job.request.source) for job in jobs})
        done: set[Path] = set()
        error = None
        try:
            run = _Run(recipe, out, batch_size, ranks.device)
            if ranks.rank == 0:
                stack.enter_context(lock_folder(out, "vab generate", share=True))
                done = {out / output for output in folder.resume(run.settings(jobs), run.about(), overwrite)}
        except UserError as problem:
            error = problem
        ranks.agree(error)
        # The first rank's list: the inputs may change while the ranks start.
        jobs, done = ranks.broadcast((list(jobs), done))
        batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        share = [
            batch for batch in batches[ranks.rank :: ranks.world_size] if any(job.target not in done for job in batch)
        ]
        made, seconds, began = 0, 0.0, time.perf_counter()
        try:
            if ranks.rank != 0:
                stack.enter_context(lock_folder(out, "vab generate", alone=False))
            with folder.journal(ranks.rank) as journal:
                words = "generating" + ("" if ranks.world_size == 1 else f" (1 of {ranks.world_size} processes)")
                total = sum(job.target not in done for batch in share for job in batch)
                with ProgressBar(words, total, "files", show=ranks.rank == 0) as bar:
                    made, seconds = run.work(share, done, journal, bar)
        except UserError as problem:
            error = problem
            if ranks.world_size > 1:  # the others may run for a long time
                print(f"process {ranks.rank} of {ranks.world_size} stops: {error}", file=sys.stderr, flush=True)
        all_made, all_seconds = zip(*ranks.gather((made, seconds)), strict=True)
        wall_seconds = time.perf_counter() - began  # without loading
        ranks.agree(error)
        if ranks.rank != 0:
            return None
        report = Report(folder.finish(), sum(all_made))
    failed, made = report.failed, report.made
    kept, warned = len(report.rows) - len(failed) - made, sum(bool(row["warnings"]) for row in report.rows)
    rate = f"; {sum(all_seconds) / wall_seconds:.1f} s of sound per second" if made else ""
    counted = f"{made} made, {kept} there before, {len(failed)} failed, {warned} with warnings"
    print(f"{folder.table_file}: {counted}{rate}")
    if failed:
        lines = [
            row["error"] if row["file"] in row["error"] else f"{row['file']}: {row['error']}"
            for row in failed[:_LISTED_ERRORS]
        ]
        if len(failed) > _LISTED_ERRORS:
            lines.append(f"and {len(failed) - _LISTED_ERRORS} more: see {folder.table_file}")
        raise UserError(f"{len(failed)} of {len(report.rows)} videos gave no sound:\n" + "\n".join(lines))
    return report


class _StoppedError(Exception):
    """Raised in the thread that prefetches, to end it."""


_Inputs = list[tuple[Job, Prepared | UserError]]
"""A batch with its media read and encoded, or the reason why they could not be."""


class _Run:
    """One rank's part: the networks on its device, and the rows of the table."""

    def __init__(self, recipe: Recipe, out: Path, batch_size: int, device: str) -> None:
        self.recipe, self.out, self.batch_size = recipe, out, batch_size
        self.generator = generator = recipe.load(device)
        self.samplers = generator.task.sampler, None if generator.fine is None else generator.fine.sampler
        self.checkpoint_hash = sha256_of(find_checkpoint(recipe.checkpoint))
        self.rate = self.generator.codec.sample_rate

    def settings(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What determines the outputs; a folder can only be resumed with the same settings."""
        recipe, requests = self.recipe, [job.request for job in jobs]
        return {
            "vab": __version__,
            "checkpoint_sha256": self.checkpoint_hash,
            "fine_checkpoint_sha256": recipe.fine_checkpoint and sha256_of(find_checkpoint(recipe.fine_checkpoint)),
            "seed": recipe.seed,
            "sampler": asdict(self.samplers[0]),
            "fine_sampler": self.samplers[1] and asdict(self.samplers[1]),
            "precision": self.generator.precision,
            "overlap_seconds": recipe.overlap_seconds,
            "format": jobs[0].target.suffix,
            "num_variations": len({request.variation for request in requests}),
            **{name: getattr(requests[0], name) for name in ("keep", "keep_levels", "seconds")},
            "weights": recipe.weights,
            "wav_format": recipe.wav_format,
        }

    def about(self) -> dict[str, Any]:
        """What may change when a folder is resumed: it affects the rounding at most."""
        fine = self.recipe.fine_checkpoint
        return {
            "checkpoint": str(self.recipe.checkpoint),
            "fine_checkpoint": fine and str(fine),
            "versions": library_versions(),
        }

    def work(
        self, batches: Sequence[Sequence[Job]], done: set[Path], journal: Journal, bar: ProgressBar
    ) -> tuple[int, float]:
        """Generate what is missing of some batches, and note each output once it is in place.

        Returns:
            How many outputs were made, and their seconds of sound.

        Raises:
            UserError: If the disk is full.
        """
        made, seconds = 0, 0.0
        with prefetch(lambda batch, stopped: self._prepare(batch, done, stopped), batches) as prepared:
            for inputs in prepared:
                for job, row in self._rows(inputs, done):
                    journal.add(_output(job, self.out), row)
                    bar.advance()
                    if not row["error"]:
                        made, seconds = made + 1, seconds + float(row["seconds"])
        return made, seconds

    def _prepare(self, batch: Sequence[Job], done: set[Path], stopped: threading.Event) -> _Inputs:
        """Read the media of a batch: all of them, unless none of the missing ones can be read."""

        def check() -> None:
            if stopped.is_set():
                raise _StoppedError

        prepared: dict[Path, Prepared | UserError] = {}
        media: dict[Request, Prepared | UserError] = {}  # variations of an input share them
        for job in sorted(batch, key=lambda job: job.target in done):
            if job.target in done and not any(isinstance(item, Prepared) for item in prepared.values()):
                break
            first = replace(job.request, variation=0)
            if first not in media:
                check()
                try:
                    media[first] = self.generator.prepare(first, check)
                except UserError as error:
                    media[first] = error
            item = media[first]
            prepared[job.target] = replace(item, request=job.request) if isinstance(item, Prepared) else item
        return [(job, prepared[job.target]) for job in batch if job.target in prepared]

    def _rows(self, inputs: _Inputs, done: set[Path]) -> Iterator[tuple[Job, Row]]:
        """Generate and write what is missing of a batch. Each row comes when its output is in place, or has failed."""
        for job, item in inputs:
            if isinstance(item, UserError) and job.target not in done:
                yield job, self._row(job, item)
        ready = [(job, item) for job, item in inputs if isinstance(item, Prepared)]
        if all(job.target in done for job, _ in ready):
            return
        began = time.perf_counter()
        items = [item for _, item in ready]
        sounds = self.generator.make(items, self.recipe.seed, batch_size=self.batch_size)
        pace = (time.perf_counter() - began) / sum(item.samples for item in items)
        for (job, item), sound in zip(ready, sounds, strict=True):
            if job.target in done:
                continue
            try:
                self.recipe.write(job, sound, self.rate)
            except UserError as error:
                if not isinstance(error, MediaError) and isinstance(error.__cause__, OSError):
                    raise  # the system failed, such as a full disk: another input would fail too
                yield job, self._row(job, error)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                yield job, self._row(job, UserError(f"{job.target}: the file system takes no name this long"))
            else:
                yield job, self._row(job) | self._measured(job, item, sound, pace * item.samples)

    def _row(self, job: Job, error: UserError | None = None) -> Row:
        """A row of the table without the columns that describe the sound."""
        return dict.fromkeys(COLUMNS, "") | {
            "file": job.request.name,
            "input": _stamp(job.request.source),
            "variation": str(job.request.variation),
            "seed": str(self.recipe.seed),
            "sampler": _compact(self.samplers[0]),
            "fine_sampler": _compact(self.samplers[1]),
            "checkpoint": str(self.recipe.checkpoint),
            "checkpoint_sha256": self.checkpoint_hash,
            "error": "" if error is None else " ".join(str(error).split()),
        }

    def _measured(self, job: Job, item: Prepared, sound: Sound, wall_seconds: float) -> Row:
        """The columns that describe the sound."""
        numbers = {"seconds": len(sound.waveform) / self.rate, "gain_db": sound.gain_db}
        numbers |= {name: getattr(sound.health, name) for name in _HEALTH}
        return {name: f"{value:.6g}" for name, value in numbers.items()} | {
            "output": _output(job, self.out),
            "wall_seconds": f"{wall_seconds:.3g}",
            "entropy": ";".join(f"{bits:.6g}" for bits in sound.health.entropy),
            "warnings": "; ".join([*item.notes, *sound.warnings]),
        }


def _output(job: Job, out: Path) -> str:
    return job.target.relative_to(out).as_posix()


def _compact(sampler: Sampler | None) -> str:
    return "" if sampler is None else json.dumps(asdict(sampler), separators=(",", ":"))


def _stamp(path: Path) -> str:
    """Size and modification time, which tell one input from another under its name; empty for a missing file."""
    try:
        status = path.stat()
    except OSError:  # reading it will raise the error
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
