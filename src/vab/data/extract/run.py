"""An extraction from its list of inputs to the finished data set: which parts are to be done, and what is joined."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vab.data.extract.cutting import Cutting, check_segments
from vab.data.extract.decoders import digest_of
from vab.data.extract.encode import Encoders
from vab.data.extract.engines import Engine, Facts, LocalEngine
from vab.data.extract.parts import (
    MISSING,
    Part,
    Result,
    Settings,
    Watch,
    describe,
    file_facts,
    head_hash,
    shares_size,
    write_part,
)
from vab.data.extract.report import (
    REPORT,
    ExtractionReport,
    finished_before,
    nothing_made,
    refuse_foreign_report,
    report_of,
    write_report,
)
from vab.data.inputs.listing import Sources
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import HEAD, MANIFEST, Left, library_versions, parse_manifest
from vab.data.shards.writer import begin_folder, part_name, publish_data_set, read_part, rows_of_part
from vab.spec import UserError

_JOINS = 5
"""How often parts are joined that other tasks change meanwhile."""
_EARLIER = "extraction.partial"
"""What an unfinished extraction of vab before 0.2 has in its folder."""


def extract_sources(
    sources: Sources,
    out: str | Path,
    encoders: Encoders,
    cutting: Cutting,
    settings: Settings,
    labels: Sequence[str] | None = None,
    watch: Watch = lambda done, here, seconds: None,
) -> ExtractionReport:
    """Extract all inputs in this process, with networks that are loaded.

    Args:
        sources: From ``find_sources``.
        out: Folder of the shards.
        encoders: The frozen networks.
        cutting: How files become segments; its rate is the codec's.
        settings: How the work is done.
        labels: The vocabulary, if it is not the labels that occur.
        watch: Called with the progress.

    Raises:
        UserError: As ``extract_parts``.
    """
    report = extract_parts(sources, OutFolder(out), LocalEngine(encoders, cutting), settings, labels, watch)
    assert report is not None
    return report


def extract_parts(
    sources: Sources,
    out: OutFolder,
    engine: Engine,
    settings: Settings,
    labels: Sequence[str] | None = None,
    watch: Watch = lambda done, here, seconds: None,
    share: tuple[int, int] = (1, 1),
) -> ExtractionReport | None:
    """Do the parts that are not done, and join them.

    Args:
        sources: From ``find_sources``.
        out: Folder of the shards.
        engine: Does the parts.
        settings: How the work is done.
        labels: The vocabulary, if it is not the labels that occur.
        watch: Called with the progress.
        share: (I, N): do part I of every N, counted from 1.

    Returns:
        The report; None while parts of other shares are not done.

    Raises:
        UserError: If the folder was begun with other settings or other inputs, the disk is full, most inputs of a part
            cannot be reached any more, or not one record could be made.
    """
    return _Extraction(sources, out, engine, settings, labels, watch, share).run()


class _Extraction:
    """What ``extract_parts`` knows; its arguments."""

    def __init__(
        self,
        sources: Sources,
        out: OutFolder,
        engine: Engine,
        settings: Settings,
        labels: Sequence[str] | None,
        watch: Watch,
        share: tuple[int, int],
    ) -> None:
        self.sources, self.out, self.engine, self.settings = sources, out, engine, settings
        self.watch, self.share = watch, share
        self.facts: Facts = engine.facts
        self.head = self.facts.head(labels or sorted(sources.labels), settings)
        self.sizes, self.times = file_facts(sources)
        self.size = settings.inputs_per_part

    def run(self) -> ExtractionReport | None:
        finished = self._manifest()
        if finished is not None:
            report = self._finished_before(finished)
            if not self.out.has(HEAD):
                return report
            self.size = json.loads(self.out.path(HEAD).read_bytes()).get("inputs_per_part", self.size)
        else:
            self._begin()
        self.known = describe(self.sources, self.sizes)
        self._shares: np.ndarray | None = None
        self.count = -(-len(self.sources) // self.size)
        again, is_stale = self._again(finished)
        done = self.out.parts()
        first, step = self.share
        to_do = [number for number in range(first - 1, self.count, step) if number not in done or number in again]
        touched = self._touched(done)
        is_new = self._work(to_do, again)
        if finished is not None and not (is_new or is_stale):
            self._remove_old_tars(finished)
            return replace(report, touched=touched, tried_again=self._unread_before)
        if len(there := self.out.parts() & {*range(self.count)}) < self.count:
            print(
                f"{self.out}: {len(to_do)} parts done by this task ({first}/{step}), {len(there)} of {self.count} parts"
                " are there; the task that ends last joins them (or the same command without --part)"
            )
            return None
        manifest = self._join(finished)
        report = replace(report_of(self.out, manifest), ignored=self.sources.ignored, touched=touched)
        assert report.inputs == len(self.sources), f"{report.inputs} inputs accounted for"
        report = replace(report, tried_again=self._unread_before)
        write_report(report, self._tracebacks)
        return report

    def _remove_old_tars(self, finished: Mapping[str, Any]) -> None:
        """Delete tars of earlier versions of the parts, which a run that was killed after the manifest left."""
        listed = {tar["name"] for tar in finished["shards"]}
        for name in self.out.own_tars():
            if name not in listed and (number := int(name[6:-4].partition("-")[0])) in self.out.parts():
                self.out.remove_versions(number, read_part(self.out, number, labels=False)["version"])

    def _begin(self) -> None:
        """Check the folder and the inputs of an extraction that is not finished."""
        if self.out.has(_EARLIER):
            raise UserError(
                f"{self.out} was begun by an earlier version of vab ({_EARLIER}), which alone can finish it: delete the"
                " folder, or give another one"
            )
        if not (self.sizes != MISSING).any():
            raise UserError(
                f"none of {len(self.sources)} inputs is there, such as {self.sources[0].path}: give --media_root, the"
                " folder that the files of a CSV are in"
            )
        refuse_foreign_report(self.out)
        begin_folder(self.out, {**self.head, "inputs_per_part": self.size})
        self.out.remove(REPORT)  # of a run that gave no record

    def _manifest(self) -> dict[str, Any] | None:
        if not self.out.has(MANIFEST):
            return None
        return parse_manifest(self.out.path(MANIFEST).read_bytes(), self.out.place)

    def _finished_before(self, manifest: Mapping[str, Any]) -> ExtractionReport:
        """The report of a complete folder, unless it is not what was asked for now."""
        unread = {left.source for left in map(Left.of, manifest["left_out"]) if left.may_pass}
        is_unread = np.fromiter((source.name in unread for source in self.sources), bool, len(self.sources))
        # Data sets of earlier versions have the sizes of all files in their fingerprint.
        texts = [describe(self.sources, sizes).text for sizes in (np.where(is_unread, MISSING, self.sizes), self.sizes)]
        if manifest["extraction"].get("inputs") not in texts:
            self._refuse_absent(np.flatnonzero((self.sizes < 0) & ~is_unread).tolist())
        return finished_before(self.out, self.head, self.sources, *texts)

    def _again(self, finished: Mapping[str, Any] | None) -> tuple[dict[int, frozenset[int]], bool]:
        """Parts with inputs to try again, and their places; and whether parts are newer than the manifest.

        Raises:
            UserError: If parts are of other inputs.
        """
        found, is_stale, self._unread_before, changed = {}, False, 0, list[int]()
        there = self.out.parts()
        numbers = sorted(there & {*range(self.count)})
        if finished is not None:
            unread = {left.source for left in map(Left.of, finished["left_out"]) if left.may_pass}
            places = [number for number, source in enumerate(self.sources) if source.name in unread]
            numbers = sorted({place // self.size for place in places} & there)  # one that is not there is done anew
        for number in numbers:
            part = read_part(self.out, number, labels=False)
            failed = {left.source for left in part["left_out"] if left.may_pass}
            if finished is None:
                changed += self._changed(number, part, failed)
            begin = number * self.size
            own = self.sources[begin : begin + self.size]
            if finished is not None:
                is_stale |= any(source.name in unread and source.name not in failed for source in own)
            places = [place for place, source in enumerate(own)
                      if source.name in failed and self.sizes[begin + place] != MISSING]  # fmt: skip
            if places and self.settings.retries:
                found[number] = frozenset(places)
        self._refuse_changed(changed)
        if finished is not None and found:
            self._unread_before = len(unread)
        return found, is_stale

    def _refuse_changed(self, changed: Sequence[int]) -> None:
        """Refuse inputs that are not what they were when their parts were made."""
        self._refuse_absent([number for number in changed if self.sizes[number] < 0])
        if changed:
            raise UserError(
                f"{self.out} holds what {self.sources[changed[0]].name} was before ({len(changed)} such): its"
                " size, labels or id are others now, or it was not there; give another folder, or delete this one"
            )

    def _refuse_absent(self, absent: Sequence[int]) -> None:
        """Say of inputs that were read before that they are away: no reason to delete what was made of them."""
        if absent:
            raise UserError(
                f"{self.out} holds records of {len(absent)} inputs that are not there now, such as"
                f" {self.sources[absent[0]].location}: check that the disk or the network folder is mounted, then run"
                " the same command again"
            )

    def _changed(self, number: int, part: Mapping[str, Any], failed: set[str]) -> list[int]:
        """Numbers of a part's inputs that are not what they were when it was made.

        Raises:
            UserError: If it was made of inputs of other names.
        """
        begin = number * self.size
        own = self.sources[begin : begin + self.size]
        names = [source.name for source in own]
        if names != part["sources"]:
            lost = sorted({*part["sources"]} - {*names})
            raise UserError(
                f"{self.out} was begun with other inputs ({lost[0] if lost else names[-1]} is"
                f" {'not listed now' if lost else 'new, or in another place of the list'}): list the same ones to"
                " resume, or give another folder"
            )
        inputs = self._hashes(number)
        return [
            begin + place
            for place, (name, then, now) in enumerate(zip(names, part["inputs"], inputs, strict=True))
            if then != now and name not in failed
        ]

    def _hashes(self, number: int) -> list[str]:
        begin = number * self.size
        return [f"{value:016x}" for value in self.known.inputs[begin : begin + self.size].tolist()]

    def _part(self, number: int, again: frozenset[int] | None = None) -> Part:
        if self._shares is None:
            self._shares = shares_size(self.sources, self.sizes)
        own = slice(number * self.size, (number + 1) * self.size)
        sizes, wants = self.sizes[own].tolist(), self._shares[own].tolist()
        return Part(number, self.sources[own], sizes, self._hashes(number), wants, again)

    def _work(self, to_do: Sequence[int], again: Mapping[int, frozenset[int]]) -> bool:
        """Do parts; whether one of them has changed."""
        here, seconds, is_new = 0, 0.0, False
        sizes = {number: len(again.get(number, range(self.size))) for number in to_do}
        before = len(self.sources) - sum(sizes.values())
        if to_do:
            parts = (self._part(number, again.get(number)) for number in to_do)
            for done in self.engine.run(parts, self.out, self.head, self.settings):
                here, seconds, is_new = here + done.inputs, seconds + done.seconds, is_new or done.is_new
                self.watch(max(0, before) + here, here, seconds)
        return is_new

    def _touched(self, done: set[int]) -> list[str]:
        """Inputs of parts that are done whose files are newer than the part."""
        found = []
        for number in sorted(done):
            begin = number * self.size
            times = self.times[begin : begin + self.size]
            newer = np.flatnonzero(times > self.out.time(part_name(number)))
            part = read_part(self.out, number, labels=False) if len(newer) else {}
            unread = {left.source for left in part.get("left_out", ()) if left.may_pass}
            for place in newer.tolist():
                name = self.sources[begin + place].name
                if part["future"].get(str(place)) != int(times[place]) and name not in unread:
                    found.append(name)
        return found

    def _join(self, finished: Mapping[str, Any] | None) -> dict[str, Any]:
        """Index, manifest and all from the parts; again where another task has written a part meanwhile.

        Raises:
            UserError: If the parts do not stay what they are, or not one record could be made.
        """
        self.out.remove(REPORT)  # killed from here on, the next run writes it
        lost: OSError | None = None
        for _ in range(_JOINS):
            if not (self.out.has(HEAD) and {*range(self.count)} <= self.out.parts()):
                break
            try:
                tars, manifest = self._join_once(finished)
                if tars != [self._version(number) for number in range(self.count)]:
                    continue
            except FileNotFoundError as error:  # another task has joined, too, and deleted what it wrote again
                lost = error
                continue
            for number, (version, _) in enumerate(tars):
                self.out.remove_versions(number, version)
            self.out.sweep()
            return manifest
        raise UserError(
            f"{self.out}: its parts changed while they were joined"
            + (f" ({lost.filename} is gone)" if lost is not None else "")
            + ": run the same command again when no other task writes there; if that does not help, delete the .json"
            " of the same number in its folder parts"
        )

    def _version(self, number: int) -> tuple[int, Any]:
        """What tells a part from what it was before: its version, and its tar."""
        part = read_part(self.out, number, labels=False)
        return part["version"], part["tar"]

    def _join_once(self, finished: Mapping[str, Any] | None) -> tuple[list[tuple[int, Any]], dict[str, Any]]:
        duplicates = self._duplicates()
        if self.settings.leaves_out_duplicates:
            for number in sorted({place // self.size for place in duplicates}):
                begin = number * self.size
                own = {place - begin: first for place, first in duplicates.items() if place // self.size == number}
                results = {place: self._duplicate(begin + place, *first) for place, first in own.items()}
                write_part(self.out, self._part(number, frozenset(own)), self.head, results)
        tars, left_out, num_records, self._tracebacks = [], list[Left](), 0, {}
        changed: list[int] = []
        for number in range(self.count):
            part = read_part(self.out, number, labels=False)
            if part["head"] != head_hash(self.head):
                raise UserError(
                    f"{self.out} has parts of several settings, such as {part_name(number)}: delete it, then run again"
                )
            changed += self._changed(number, part, {left.source for left in part["left_out"] if left.may_pass})
            tars.append((part["version"], part["tar"]))
            num_records += part["tar"]["records"] if part["tar"] is not None else 0
            for entry in part["left_out"]:
                if entry.traceback:
                    self._tracebacks[entry.source] = entry.traceback
                left_out.append(entry._replace(traceback=""))
        self._refuse_changed(changed)  # tasks that do other parts may have listed other inputs
        if not num_records:
            self.out.remove_parts()  # so that mended files are looked at again
            raise nothing_made(self.out, self.sources, left_out, self._tracebacks)
        unread = {entry.source for entry in left_out if entry.may_pass}
        inputs = self.known.text
        if unread:
            is_unread = np.fromiter((source.name in unread for source in self.sources), bool, len(self.sources))
            inputs = describe(self.sources, np.where(is_unread, MISSING, self.sizes)).text
        head = self.head | {"extraction": self.head["extraction"] | {"inputs": inputs}}
        further: dict[str, Any] = {"versions": library_versions(self.facts.packages)}
        if finished is not None and finished["versions"] != further["versions"]:
            further = {"versions": finished["versions"], "appended": further["versions"]}
        if duplicates and not self.settings.leaves_out_duplicates:
            further["duplicates"] = {self.sources[own].name: self.sources[first].name
                                     for own, (first, _) in duplicates.items()}  # fmt: skip
        tables = [rows for number in range(self.count) if (rows := rows_of_part(self.out, number)) is not None]
        return tars, publish_data_set(
            self.out, head, tables, self.facts.codebooks, left_out, len(self.sources), further
        )

    def _duplicates(self) -> dict[int, tuple[int, bytes]]:
        """Inputs that have the bytes, and the start, of one before them: number, and that one's, and the digest."""
        if self._shares is None:
            self._shares = shares_size(self.sources, self.sizes)
        first: dict[tuple[bytes, float | None], int] = {}
        found = {}
        for number in range(self.count):
            begin = number * self.size
            places = np.flatnonzero(self._shares[begin : begin + self.size]).tolist()
            part = read_part(self.out, number, labels=False) if places else {}
            lacking = {
                left.source
                for left in part.get("left_out", ())
                if left.start_seconds is None and left.reason != "duplicate"
            }
            for place in places:
                source = self.sources[begin + place]
                text = part["digests"].get(str(place))
                if source.name in lacking:
                    continue
                # A file that was not there when this part was made may be as large as this one.
                digest = digest_of(source.path) if text is None else bytes.fromhex(text)
                if digest is not None and (same := first.setdefault((digest, source.start), begin + place)) != (
                    begin + place
                ):
                    found[begin + place] = same, digest
        return found

    def _duplicate(self, number: int, first: int, digest: bytes) -> Result:
        source, other = self.sources[number], self.sources[first]
        labels = "" if other.labels == source.labels else f", whose labels are {', '.join(other.labels) or 'none'}"
        return Result([], [Left(source.name, "duplicate", f"has the very bytes of {other.name}{labels}")], digest)


def check_numbers(rules: Mapping[str, Any], settings: Settings) -> None:
    """Refuse settings that make no sense.

    Args:
        rules: Arguments of ``Cutting``.
        settings: How the work is done.

    Raises:
        UserError: Saying which.
    """
    check_segments(
        *(rules[name] for name in ("segments", "segment_seconds", "video_fps", "hop_seconds", "min_seconds"))
    )
    for name, least in (("num_workers", 0), ("batch_size", 1), ("inputs_per_part", 1)):
        if (value := getattr(settings, name)) < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
    if not settings.file_timeout > 0:
        raise UserError(f"file_timeout must be above 0, got {settings.file_timeout}")
    if not float("-inf") < rules["silence_db"] <= 0:
        raise UserError(
            f"silence_db must be a finite number of dBFS, 0 or less (-200 leaves out digital silence alone), got"
            f" {rules['silence_db']}"
        )
    if rules["still_pictures"] not in ("keep", "leave_out"):
        raise UserError(f"still_pictures must be keep or leave_out, got {rules['still_pictures']!r}")
