"""What became of every input of an extraction: for people, and as ``report.json`` beside the shards."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vab.data.inputs.listing import Ignored, Sources
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    INDEX,
    MANIFEST,
    Left,
    head_differences,
    json_lines,
    make_key,
    parse_manifest,
    read_json_lines,
)
from vab.files import write_atomically
from vab.spec import UserError

REPORT = "report.json"
LEFT_OUT_STATUS = 3
"""Exit status of an extraction with ``--strict`` that has left something out."""


@dataclass(frozen=True)
class ExtractionReport:
    """What became of every input; ``report.json`` in the folder holds the same."""

    folder: str
    """Where the shards are."""
    inputs: int
    """Files (or rows of the CSV) that were asked for."""
    kept: int
    """Inputs with at least one record. ``inputs`` is this plus the inputs left out whole."""
    records: int
    """Segments in the shards."""
    left_out: list[Left]
    """Whole inputs, and single segments of inputs that are kept otherwise."""
    already_finished: bool = False
    """True if the folder was complete before, and nothing was done."""
    hours: float = 0.0
    """Of sound in the shards."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Inputs that are kept although they have the very bytes (and the start) of another one, and that one."""
    ignored: list[Ignored] = field(default_factory=list)
    """Files of the folder that are no inputs, as their suffix is not one of media."""
    touched: list[str] = field(default_factory=list)
    """Inputs whose files are of another time than when they were put into the shards, but of the same size."""
    tried_again: int = 0
    """Inputs that a finished folder lacked, as they could not be read then, and that were tried again."""
    strict: bool = False
    """Whether it is a failure if anything is left out."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many inputs were left out whole, by reason."""
        return dict(Counter(entry.reason for entry in self.left_out if entry.start_seconds is None))

    @property
    def exit_status(self) -> int:
        """0; with ``strict`` ``LEFT_OUT_STATUS`` if anything is left out."""
        return LEFT_OUT_STATUS if self.left_out and self.strict else 0

    def __str__(self) -> str:
        lost = self.inputs - self.kept
        hours = f", {self.hours:.2f} h of sound" if self.hours else ""
        lines = [
            f"{self.folder}: {self.records} records of {self.kept} inputs{hours}",
            f"{lost} of {self.inputs} inputs left out" + (":" if lost else ""),
        ]
        for reason, count in sorted(self.reasons.items()):
            names = (left.source for left in self.left_out if left.reason == reason and left.start_seconds is None)
            some = itertools.islice(names, _NAMED)
            lines.append(f"  {count} {reason}: {', '.join(some)}{', ...' if count > _NAMED else ''}")
        segments = Counter(entry.reason for entry in self.left_out if entry.start_seconds is not None)
        if segments:
            words = ", ".join(f"{count} {reason}" for reason, count in sorted(segments.items()))
            lines.append(f"{segments.total()} single segments left out: {words}")
        if self.duplicates:
            lines.append(f"{len(self.duplicates)} inputs are kept that have the very bytes of another one")
        if self.left_out or self.duplicates:
            lines.append(f"each with its reason in {self.folder}/{REPORT}")
        if self.ignored:
            files = sum(kind.files for kind in self.ignored)
            lines.append(f"{files} files ignored, by suffix no media: {', '.join(map(_words, self.ignored))}")
        if self.touched:
            lines.append(
                f"{len(self.touched)} inputs were written again since their records were made"
                f" ({self.touched[0]}{', ...' if len(self.touched) > 1 else ''}): their records stay as they are; if"
                " more than the time has changed, give another folder"
            )
        if self.tried_again:
            vain = ", in vain" if self.already_finished else ""
            lines.append(f"{self.tried_again} inputs that could not be read before were tried again{vain}")
        elif self.already_finished:
            lines.append("it was finished before: nothing to do")
        text = "\n".join(lines)
        return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8


def _words(kind: Ignored) -> str:
    names = ", ".join(kind.such_as) + (", ..." if kind.files > len(kind.such_as) else "")
    return f"{kind.files} {kind.suffix}" + (f" ({names})" if kind.such_as else "")


_NAMED = 3
"""Inputs that the printed report names of each reason; the file names all."""


def report_of(out: OutFolder, manifest: dict[str, Any]) -> ExtractionReport:
    """The report of a finished data set.

    Args:
        out: Its folder.
        manifest: As ``ShardWriter.finish`` or ``parse_manifest`` of its path gives it.
    """
    left_out: list[Left] = manifest["left_out"]
    counts = manifest["counts"]
    whole = sum(entry.start_seconds is None for entry in left_out)
    steps = np.load(out.path(INDEX), mmap_mode="r", allow_pickle=False)["steps"].sum(dtype=np.int64)
    hours = round(float(steps) / manifest["spec"]["code_rate"] / 3600, 3)
    kept = counts["sources"] - whole
    return ExtractionReport(
        out.place, counts["sources"], kept, counts["records"], left_out, False, hours, manifest.get("duplicates", {})
    )


def write_report(report: ExtractionReport, tracebacks: Mapping[str, str] | None = None) -> None:
    """Write ``report.json`` into the report's folder.

    Args:
        report: What became of the inputs.
        tracebacks: Of exceptions that nobody foresaw, by input.
    """
    names = ("folder", "inputs", "kept", "records", "hours", "duplicates", "left_out")
    values: dict[str, Any] = {"reasons": report.reasons, "ignored": [kind._asdict() for kind in report.ignored]}
    values |= {name: getattr(report, name) for name in names}
    traces = tracebacks or {}
    values["left_out"] = [entry._replace(traceback=traces.get(entry.source, "")) for entry in report.left_out]
    out = OutFolder.at(report.folder)
    with out.work() as work:
        write_atomically(work / REPORT, json_lines(values, "ignored", "left_out"))
        out.publish(work, [REPORT])


def refuse_foreign_report(out: OutFolder) -> None:
    """Refuse a folder whose ``report.json`` none of these wrote: it would be replaced.

    Raises:
        UserError: If there is such a file.
    """
    if not out.has(REPORT):
        return
    try:
        values = read_json_lines(out.path(REPORT), "left_out", None)
    except UserError:  # that it cannot be fetched
        raise
    except (OSError, ValueError):
        values = {}
    if not {"reasons", "folder", "inputs", "kept", "records"} <= {*values}:
        raise UserError(
            f"{out}/{REPORT} is the report of no extraction, and would be replaced: give another folder, or take it"
            " elsewhere"
        )


def nothing_made(
    out: OutFolder, sources: Sources, left_out: list[Left], tracebacks: Mapping[str, str] | None = None
) -> UserError:
    """What to raise where not one record was made; the report is written and says why."""
    report = ExtractionReport(out.place, len(sources), 0, 0, left_out, ignored=sources.ignored)
    write_report(report, tracebacks)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
    first = f"; {left_out[0].source}: {left_out[0].detail}" if left_out else ""
    remedy = "; to take files of sound alone: --without_video keep" if "no_video" in report.reasons else ""
    return UserError(
        f"not one of {len(sources)} inputs gave a record ({reasons}): see {out}/{REPORT} for each{first}{remedy}"
    )


def finished_before(
    out: OutFolder, head: dict[str, Any], sources: Sources, *inputs: str, manifest: dict[str, Any] | None = None
) -> ExtractionReport:
    """The report of a folder that is complete, unless it is not what was asked for now.

    Args:
        out: The folder.
        head: Spec, label vocabulary and rules that were asked for.
        sources: What the records were to be made from.
        *inputs: Their fingerprint, or several, any of which may be that of the folder.
        manifest: Of the folder, where it is read already.

    Raises:
        UserError: With what is different.
    """
    manifest = parse_manifest(out.path(MANIFEST), out.place) if manifest is None else manifest
    asked = json.loads(json.dumps(head))
    then = asked["extraction"]["inputs"] = manifest["extraction"].get("inputs")
    differences = (
        [f"made with other settings ({'; '.join(found)})"] if (found := head_differences(manifest, asked)) else []
    )
    if then not in inputs:
        differences.append(_other_inputs(out, manifest, sources))
    if differences:
        raise UserError(
            f"{out} already holds a finished data set, {' and '.join(differences)}: give another folder, or delete this"
            " one"
        )
    report = replace(report_of(out, manifest), ignored=sources.ignored)
    if not out.has(REPORT):
        write_report(report)
    return replace(report, already_finished=True)


def _other_inputs(out: OutFolder, manifest: dict[str, Any], sources: Sources) -> str:
    """In what the inputs differ from those of a finished data set, as far as its keys tell, in words."""
    keys = np.load(out.path(INDEX), mmap_mode="r", allow_pickle=False)["key"]
    known = {key.rpartition(b"_")[0].decode() for key in keys.tolist()}  # without the start
    left_out = {entry.source for entry in manifest["left_out"]}
    new = (
        source.name
        for source in sources
        if source.name not in left_out and make_key(source.id, source.start or 0.0).rpartition("_")[0] not in known
    )
    first = next(new, None)
    then, now = manifest["counts"]["sources"], len(sources)
    if first is not None:
        which = f"the first new one is {first}"
    else:
        which = "none is new" if now < then else "sizes, labels or starts are others"
    return f"made of other inputs ({then} then, {now} now; {which})"
