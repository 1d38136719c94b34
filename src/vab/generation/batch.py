"""Sounds for a whole test set: resumable, over any number of ranks, each input exactly once.

The work is cut into groups of ``batch_size`` outputs that follow each other in the list, whatever is done already, and
group g is rank (g mod ranks)'s. A group of which anything is missing is generated whole and what is missing is written,
because a network's rounding may depend on the batch. So the outputs are equal bit for bit after any interruption and
for any number of ranks.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vab import __version__
from vab.console import ProgressBar
from vab.data.media.segments import MediaError
from vab.data.shards.format import library_versions
from vab.files import sha256_of
from vab.generation.generator import Generator, Sound
from vab.generation.ledger import COLUMNS, TABLE, Journal, Ledger, Row
from vab.generation.outputs import Job
from vab.generation.prefetch import one_ahead
from vab.generation.request import Prepared, Request
from vab.ranks import start_ranks
from vab.spec import UserError
from vab.tasks.checkpoints import find_checkpoint
from vab.tokens.sampler import Sampler

_LISTED_ERRORS = 20
"""Failed inputs that the last message names; the table has all."""


@dataclass(frozen=True)
class Recipe:
    """What the sounds of a test set are made with."""

    checkpoint: str
    """File, or a run's folder."""
    load: Callable[[str], Generator]
    """Reads it onto a device."""
    samplers: Callable[[Generator], tuple[Sampler, Sampler | None]]
    """How codes are drawn: by the model, by its fine stage if there is one."""
    write: Callable[[Job, Sound, int], None]
    """Puts a sound (of a sample rate, Hz) at its target, whole or not at all."""
    fine_checkpoint: str | None = None
    """Of the fine stage."""
    seed: int = 0
    """Of the randomness."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the outputs depend on and neither the generator nor the requests say, in plain JSON."""


@dataclass(frozen=True)
class Report:
    """What became of a test set."""

    folder: Path
    """Where the outputs are."""
    rows: list[Row]
    """The table: one row for each output wanted."""
    made: int
    """Outputs of this run."""
    seconds: float
    """Of sound, made in this run."""
    wall_seconds: float
    """That this run took to generate, without loading."""

    @property
    def failed(self) -> list[Row]:
        """Rows without an output."""
        return [row for row in self.rows if row["error"]]

    def __str__(self) -> str:
        warned = sum(bool(row["warnings"]) for row in self.rows)
        skipped = len(self.rows) - len(self.failed) - self.made
        rate = f"; {self.seconds / self.wall_seconds:.1f} s of sound per second" if self.made else ""
        return (
            f"{self.folder / TABLE}: {self.made} made, {skipped} there before, {len(self.failed)} failed, "
            f"{warned} with warnings{rate}"
        )


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
    """Make the sounds of a test set, or what an interrupted run left of them, and the table ``generations.csv``.

    Args:
        jobs: What to make, each with a target of its own below ``out``.
        out: Folder of the outputs.
        recipe: What they are made with. A folder that was begun with another one is refused.
        batch_size: Outputs that are generated together. It may change the rounding of the network, no more.
        device: auto, cpu, cuda, and for a single process cuda:1, ...
        devices: Processes on each machine, each with a device of its own. More than one, and this process's command
            line is run again for each of the others.
        num_nodes: Machines.
        overwrite: Delete what an earlier run made in the folder, and begin again.

    Returns:
        What became of them; None on other ranks than the first.

    Raises:
        UserError: At the end, if inputs gave no sound, with the list of them; at once, if the disk is full, the folder
            was begun with another recipe, or another run is at work in it.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, got {batch_size}")
    ranks = start_ranks(device, devices, num_nodes)
    with ranks.ending_together(), ExitStack() as stack:
        ledger = Ledger(out, {job.target.relative_to(out).as_posix(): _stamp(job.request.source) for job in jobs})
        done: set[Path] = set()
        error = None
        try:
            run = _Run(recipe, out, batch_size, ranks.device)
            if ranks.rank == 0:
                stack.enter_context(ledger.hold(alone=True))
                done = {out / output for output in ledger.begin(run.settings(jobs), run.about(), overwrite)}
        except UserError as problem:
            error = problem
        ranks.agree(error)
        # The first rank's list: a folder may change while the ranks start.
        jobs, done = ranks.broadcast((list(jobs), done))
        groups = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        share = [
            group for group in groups[ranks.rank :: ranks.world_size] if any(job.target not in done for job in group)
        ]
        tally, error = _Tally(), None
        try:
            if ranks.rank != 0:
                stack.enter_context(ledger.hold(alone=False))
            with ledger.journal(ranks.rank) as journal:
                words = "generating" + ("" if ranks.world_size == 1 else f" (1 of {ranks.world_size} processes)")
                mine = sum(job.target not in done for group in share for job in group)
                bar = ProgressBar(words, mine, "files", show=ranks.rank == 0)
                run.work(share, done, journal, tally, bar)
        except UserError as problem:
            error = problem
            if ranks.world_size > 1:  # the others may take long
                print(f"process {ranks.rank} of {ranks.world_size} stops: {error}", file=sys.stderr, flush=True)
        tallies = ranks.gather(tally)
        ranks.agree(error)
        if ranks.rank != 0:
            return None
        report = Report(
            out,
            ledger.finish(),
            made=sum(each.made for each in tallies),
            seconds=sum(each.seconds for each in tallies),
            wall_seconds=max(each.wall_seconds for each in tallies),
        )
    print(report)
    if failed := report.failed:
        lines = [
            row["error"] if row["file"] in row["error"] else f"{row['file']}: {row['error']}"
            for row in failed[:_LISTED_ERRORS]
        ]
        if len(failed) > _LISTED_ERRORS:
            lines.append(f"and {len(failed) - _LISTED_ERRORS} more: see {out / TABLE}")
        raise UserError(f"{len(failed)} of {len(report.rows)} videos gave no sound:\n" + "\n".join(lines))
    return report


@dataclass
class _Tally:
    """What one rank has made in this run."""

    made: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0


_Inputs = list[tuple[Job, Prepared | UserError]]
"""A group with its media read and encoded, or why they could not be."""


class _Run:
    """One rank's work: the networks on its device, and what goes into each row of the table."""

    def __init__(self, recipe: Recipe, out: Path, batch_size: int, device: str) -> None:
        self.recipe, self.out, self.batch_size = recipe, out, batch_size
        self.generator = recipe.load(device)
        self.sampler, self.fine_sampler = recipe.samplers(self.generator)
        self.checkpoint_hash = sha256_of(find_checkpoint(recipe.checkpoint))
        self.rate = self.generator.codec.sample_rate

    def settings(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What determines the outputs: equal for all runs that go on in a folder."""
        requests = [job.request for job in jobs]
        options = {name: getattr(requests[0], name) for name in ("keep", "keep_levels", "seconds")}
        return {
            "vab": __version__,
            "checkpoint_sha256": self.checkpoint_hash,
            "fine_checkpoint_sha256": self.recipe.fine_checkpoint
            and sha256_of(find_checkpoint(self.recipe.fine_checkpoint)),
            "seed": self.recipe.seed,
            "sampler": asdict(self.sampler),
            "fine_sampler": self.fine_sampler and asdict(self.fine_sampler),
            "precision": self.generator.precision,
            "overlap_seconds": self.generator.overlap_seconds,
            "format": jobs[0].target.suffix,
            "num_variations": len({request.variation for request in requests}),
            **options,
            **self.recipe.settings,
        }

    def about(self) -> dict[str, Any]:
        """What is good to know, but may change in a folder: it alters the rounding at most."""
        fine = self.recipe.fine_checkpoint
        return {
            "checkpoint": str(self.recipe.checkpoint),
            "fine_checkpoint": fine and str(fine),
            "versions": library_versions(),
        }

    def work(
        self, groups: Sequence[Sequence[Job]], done: set[Path], journal: Journal, tally: _Tally, bar: ProgressBar
    ) -> None:
        """Make what is missing of some groups, and note each output once it is in place.

        Raises:
            UserError: If the disk is full.
        """
        began = time.perf_counter()

        def prepare(group: Sequence[Job], stopped: threading.Event) -> _Inputs:
            return self._prepare(group, done, stopped)

        def note(job: Job, row: Row) -> None:
            journal.add(job.target.relative_to(self.out).as_posix(), row)
            bar.advance()

        with bar, one_ahead(prepare, groups) as prepared:
            for inputs in prepared:
                for job, item in inputs:
                    if isinstance(item, UserError) and job.target not in done:
                        note(job, self._row(job, item))
                ready = [(job, item) for job, item in inputs if isinstance(item, Prepared)]
                for job, item, sound, wall_seconds in self._make(ready, done):
                    try:
                        self.recipe.write(job, sound, self.rate)
                    except UserError as error:
                        if not _is_of_input(error):
                            raise
                        note(job, self._row(job, error))
                    except OSError as error:
                        if error.errno != errno.ENAMETOOLONG:
                            raise
                        note(job, self._row(job, UserError(f"{job.target}: the file system takes no name this long")))
                    else:
                        note(job, self._row(job, None) | self._found(job, item, sound, wall_seconds))
                        tally.made += 1
                        tally.seconds += len(sound.waveform) / self.rate
                        tally.wall_seconds = time.perf_counter() - began

    def _prepare(self, group: Sequence[Job], done: set[Path], stopped: threading.Event) -> _Inputs:
        """Read the media of a group: all of them, unless none of the missing ones can be had."""
        found: dict[Path, Prepared | UserError] = {}
        media: dict[Request, Prepared | UserError] = {}  # the variations of an input share them
        for job in sorted(group, key=lambda job: job.target in done):
            if job.target in done and not any(isinstance(item, Prepared) for item in found.values()):
                break
            if stopped.is_set():
                break
            first = replace(job.request, variation=0)
            if first not in media:
                try:
                    media[first] = self.generator.prepare(first)
                except UserError as error:
                    media[first] = error
            item = media[first]
            found[job.target] = replace(item, request=job.request) if isinstance(item, Prepared) else item
        return [(job, found[job.target]) for job in group if job.target in found]

    def _make(
        self, ready: Sequence[tuple[Job, Prepared]], done: set[Path]
    ) -> Iterator[tuple[Job, Prepared, Sound, float]]:
        """The missing sounds of a group, each with its share of the time."""
        if all(job.target in done for job, _ in ready):
            return
        items = [item for _, item in ready]
        began = time.perf_counter()
        sounds = self.generator.make(
            items, self.recipe.seed, self.sampler, self.fine_sampler, batch_size=self.batch_size
        )
        pace = (time.perf_counter() - began) / sum(item.samples for item in items)
        for (job, item), sound in zip(ready, sounds, strict=True):
            if job.target not in done:
                yield job, item, sound, pace * item.samples

    def _row(self, job: Job, error: UserError | None) -> Row:
        """A row of the table without what was found out about the sound."""
        values = {
            "file": job.request.name,
            "input": _stamp(job.request.source),
            "variation": job.request.variation,
            "seed": self.recipe.seed,
            "sampler": _compact(self.sampler),
            "fine_sampler": "" if self.fine_sampler is None else _compact(self.fine_sampler),
            "checkpoint": self.recipe.checkpoint,
            "checkpoint_sha256": self.checkpoint_hash,
            "error": "" if error is None else " ".join(str(error).split()),
        }
        return dict.fromkeys(COLUMNS, "") | {name: str(value) for name, value in values.items()}

    def _found(self, job: Job, item: Prepared, sound: Sound, wall_seconds: float) -> Row:
        """The rest of a row."""
        health = sound.health
        return {
            "output": job.target.relative_to(self.out).as_posix(),
            "seconds": f"{len(sound.waveform) / self.rate:.6g}",
            "wall_seconds": f"{wall_seconds:.3g}",
            "peak": f"{health.peak:.6g}",
            "rms_db": f"{health.rms_db:.6g}",
            "silence": f"{health.silence:.6g}",
            "entropy": ";".join(f"{bits:.6g}" for bits in health.entropy),
            "longest_repeat_seconds": f"{health.longest_repeat_seconds:.6g}",
            "gain_db": f"{sound.gain_db:.6g}",
            "warnings": "; ".join([*item.notes, *sound.warnings]),
        }


def _is_of_input(error: UserError) -> bool:
    """Whether another input may fare better: not if it was the system that failed, such as a full disk."""
    return isinstance(error, MediaError) or not isinstance(error.__cause__, OSError)


def _compact(sampler: Sampler) -> str:
    return json.dumps(asdict(sampler), separators=(",", ":"))


def _stamp(path: Path) -> str:
    """Size and time of change, which tell one input from another under its name; nothing for a missing file."""
    try:
        status = path.stat()
    except OSError:  # reading it will say what is wrong
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"
