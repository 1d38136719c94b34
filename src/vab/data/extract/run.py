"""An extraction from its list of inputs to the finished data set: which parts are to be done, and what is joined."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vab.data.extract.cutting import Cutting, check_segments
from vab.data.extract.decoders import digest_of
from vab.data.extract.encode import Encoders
from vab.data.extract.engines import LocalEngine, MadeWith, WorkersEngine
from vab.data.extract.identity import MISSING, Described, describe, file_stats
from vab.data.extract.parts import Part, Result, Settings, Watch, head_hash, write_part
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
from vab.data.shards.data_set import Contents, Rows, begin_folder, publish_data_set, rows_of_part
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import HEAD, MANIFEST, PARTS, Left, library_versions, parse_manifest, part_name
from vab.data.shards.part_files import read_part
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
    report = extract_parts(sources, OutFolder.at(out), LocalEngine(encoders, cutting), settings, labels, watch)
    assert report is not None
    return report


def extract_parts(
    sources: Sources,
    out: OutFolder,
    engine: LocalEngine | WorkersEngine,
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
        engine: LocalEngine | WorkersEngine,
        settings: Settings,
        labels: Sequence[str] | None,
        watch: Watch,
        share: tuple[int, int],
    ) -> None:
        self.sources, self.out, self.engine, self.settings = sources, out, engine, settings
        self.watch, self.share = watch, share
        self.made_with: MadeWith = engine.made_with
        self.head = self.made_with.head(labels or sorted(sources.labels), settings)
        self.sizes, self.times, self.shares_size = file_stats(sources)
        self.size = settings.inputs_per_part
        self._unread: dict[str, str] = {}  # names of inputs that a finished data set lacks and may get, with reasons
        self._listed: dict[str, Any] = {}  # tars of a finished data set

    @cached_property
    def known(self) -> Described:
        """What tells the inputs from others."""
        return describe(self.sources, self.sizes)

    def run(self) -> ExtractionReport | None:
        self.out.sweep()
        finished = self._manifest()
        if finished is not None:
            report = self._finished_before(finished)
            if not self.out.has(HEAD):
                return report
        else:
            self._begin()
        begun = json.loads(self.out.path(HEAD).read_bytes())
        self.size = begun.get("inputs_per_part", self.size)
        self.count = -(-len(self.sources) // self.size)
        done = self.out.parts() & {*range(self.count)}
        again, is_newer, touched = self._look(done, finished is not None)
        tried_again = len(self._unread) if again else 0
        first, step = self.share
        to_do = [number for number in range(first - 1, self.count, step) if number not in done or number in again]
        self._work(to_do, again, done)
        self.out.refresh()  # other processes may have written the parts
        if finished is not None and not (
            is_newer or any(self._is_newer(read_part(self.out, number)) for number in to_do)
        ):
            self._remove_old_tars(finished)
            return replace(report, touched=touched, tried_again=tried_again)
        if len(there := self.out.parts() & {*range(self.count)}) < self.count:
            print(
                f"{self.out}: {len(to_do)} parts done by this task ({first}/{step}), {len(there)} of {self.count} parts"
                " are there; the task that ends last joins them (or the same command without --part)"
            )
            return None
        now = library_versions(self.made_with.packages)
        then = begun.get("versions") or (now if finished is None else finished["versions"])
        manifest = self._join({"versions": then} | ({} if now == then else {"appended": now}))
        report = replace(report_of(self.out, manifest), ignored=self.sources.ignored, touched=touched)
        assert report.inputs == len(self.sources), f"{report.inputs} inputs accounted for"
        report = replace(report, tried_again=tried_again)
        write_report(report, self._tracebacks)
        return report

    def _remove_old_tars(self, finished: Mapping[str, Any]) -> None:
        """Delete tars of earlier versions of the parts, which a run that was killed after the manifest left."""
        listed = {tar["name"] for tar in finished["shards"]}
        for name in self.out.own_tars():
            if name not in listed and (number := int(name[6:-4].partition("-")[0])) in self.out.parts():
                self.out.remove_versions(number, self._version(number)[0])

    def _begin(self) -> None:
        """Check the folder and the inputs of an extraction that is not finished."""
        if self.out.has(_EARLIER):
            raise UserError(
                f"{self.out} was begun by an earlier version of vab ({_EARLIER}), which alone can finish it: delete the"
                " folder, or give another one"
            )
        if not (self.sizes != MISSING).any():
            raise UserError(
                f"none of {len(self.sources)} inputs is there, such as {self.sources[0].shown}: give --media_root, the"
                " folder that the files of a CSV are in"
            )
        refuse_foreign_report(self.out)
        versions = library_versions(self.made_with.packages)
        begin_folder(self.out, {**self.head, "inputs_per_part": self.size, "versions": versions})
        self.out.remove(REPORT)  # of a run that gave no record

    def _manifest(self) -> dict[str, Any] | None:
        if not self.out.has(MANIFEST):
            return None
        return parse_manifest(self.out.path(MANIFEST), self.out.place)

    def _finished_before(self, manifest: dict[str, Any]) -> ExtractionReport:
        """The report of a complete folder, unless it is not what was asked for now."""
        self._unread = _may_pass(manifest["left_out"])
        self._listed = {tar["name"]: tar for tar in manifest["shards"]}
        texts = [self._text(self._unread)]
        if manifest["extraction"].get("inputs") not in texts:
            texts.append(self.known.text)  # earlier versions put the sizes of unread files into their fingerprint, too
        if manifest["extraction"].get("inputs") not in texts:
            self._refuse_absent([number for number in np.flatnonzero(self.sizes < 0).tolist()
                                 if self.sources[number].name not in self._unread])  # fmt: skip
        return finished_before(self.out, self.head, self.sources, *texts, manifest=manifest)

    def _text(self, unread: Container[str]) -> str:
        """The fingerprint of the inputs. Files that could not be read are in it without their size."""
        pairs = enumerate(zip(self.sources, self.sizes.tolist(), strict=True)) if unread else ()
        places = [place for place, (source, size) in pairs if size >= 0 and source.name in unread]
        sizes = self.sizes.copy()
        sizes[places] = MISSING
        return describe(self.sources, sizes).text if places else self.known.text

    def _look(self, done: Set[int], is_finished: bool) -> tuple[dict[int, frozenset[int]], bool, list[str]]:
        """Read the parts that are done, once; of a finished data set, those that may need work.

        Returns:
            Parts with inputs to try again, and their places; whether a part is newer than the manifest; and names of
            inputs whose files are newer than their part.

        Raises:
            UserError: If parts are of other inputs.
        """
        again, is_newer, touched, changed = {}, False, list[str](), list[int]()
        if not is_finished:
            self.out.prefetch(map(part_name, sorted(done)))
        for number in sorted(done):
            begin = number * self.size
            own = slice(begin, begin + self.size)
            newer = np.flatnonzero(self.times[own] > self.out.time(part_name(number))).tolist()
            names = [source.name for source in self.sources[own]]
            if is_finished and not newer and self._unread.keys().isdisjoint(names):
                continue
            part = read_part(self.out, number)
            failed = _may_pass(part["left_out"])
            if not is_finished:
                changed += self._changed(number, part, names, failed)
            else:
                is_newer |= self._is_newer(part)
            touched += [names[place] for place in newer if names[place] not in failed
                        and part["future"].get(str(place)) != int(self.times[begin + place])]  # fmt: skip
            sizes = self.sizes[own].tolist()
            places = frozenset(place for place, name in enumerate(names) if name in failed and sizes[place] != MISSING)
            if places and self.settings.retries:
                again[number] = places
        self._refuse_changed(changed)
        return again, is_newer, touched

    def _is_newer(self, part: Mapping[str, Any]) -> bool:
        """Whether a part was written again after the manifest."""
        tar, failed = part["tar"], _may_pass(part["left_out"])
        return (tar is not None and self._listed.get(tar["name"]) != tar) or any(
            self._unread.get(name) != failed.get(name) for name in part["sources"]
        )

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
                f" {self.sources[absent[0]].shown}: check that the disk or the network folder is mounted, then run"
                " the same command again"
            )

    def _changed(self, number: int, part: Mapping[str, Any], names: Sequence[str], failed: Container[str]) -> list[int]:
        """Numbers of a part's inputs that are not what they were when it was made.

        Raises:
            UserError: If it was made of inputs of other names.
        """
        if names != part["sources"]:
            lost = sorted({*part["sources"]} - {*names})
            raise UserError(
                f"{self.out} was begun with other inputs ({lost[0] if lost else names[-1]} is"
                f" {'not listed now' if lost else 'new, or in another place of the list'}): list the same ones to"
                " resume, or give another folder"
            )
        inputs = self._hashes(number)
        return [
            number * self.size + place
            for place, (name, then, now) in enumerate(zip(names, part["inputs"], inputs, strict=True))
            if then != now and name not in failed
        ]

    def _hashes(self, number: int) -> list[str]:
        begin = number * self.size
        return [f"{value:016x}" for value in self.known.inputs[begin : begin + self.size].tolist()]

    def _part(self, number: int, again: frozenset[int] | None = None) -> Part:
        own = slice(number * self.size, (number + 1) * self.size)
        sizes, times, wants = self.sizes[own].tolist(), self.times[own].tolist(), self.shares_size[own].tolist()
        return Part(number, self.sources[own], sizes, times, self._hashes(number), wants, again)

    def _work(self, to_do: Sequence[int], again: Mapping[int, frozenset[int]], done: Set[int]) -> None:
        """Do parts."""
        if not to_do:
            return
        before = sum(min(self.size, len(self.sources) - number * self.size) for number in done)
        before -= sum(len(again.get(number, ())) for number in to_do)
        here, seconds = 0, 0.0
        parts = (self._part(number, again.get(number)) for number in to_do)
        for part in self.engine.run(parts, self.out, self.head, self.settings):
            here, seconds = here + part.inputs, seconds + part.seconds
            self.watch(before + here, here, seconds)

    def _join(self, versions: Mapping[str, Any]) -> dict[str, Any]:
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
                tars, manifest = self._join_once(versions)
                self.out.refresh()
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
        part = read_part(self.out, number)
        return part["version"], part["tar"]

    def _join_once(self, versions: Mapping[str, Any]) -> tuple[list[tuple[int, Any]], dict[str, Any]]:
        self.out.prefetch(f"{PARTS}/{name}" for name in self.out.names(PARTS))
        duplicates = self._duplicates()
        if self.settings.leaves_out_duplicates:
            for number in sorted({place // self.size for place in duplicates}):
                begin = number * self.size
                own = {place - begin: first for place, first in duplicates.items() if place // self.size == number}
                results = {place: self._duplicate(begin + place, *first) for place, first in own.items()}
                write_part(self.out, self._part(number, frozenset(own)), self.head, results)
        tars, tables, left_out, self._tracebacks = [], list[Rows](), list[Left](), {}
        changed: list[int] = []
        for number in range(self.count):
            part = read_part(self.out, number)
            if part["head"] != head_hash(self.head):
                raise UserError(
                    f"{self.out} has parts of several settings, such as {part_name(number)}: delete it, then run again"
                )
            names = [source.name for source in self.sources[number * self.size : (number + 1) * self.size]]
            changed += self._changed(number, part, names, _may_pass(part["left_out"]))
            tars.append((part["version"], part["tar"]))
            if (rows := rows_of_part(self.out, number, part)) is not None:
                tables.append(rows)
            for entry in part["left_out"]:
                if entry.traceback:
                    self._tracebacks[entry.source] = entry.traceback
                left_out.append(entry._replace(traceback=""))
        self._refuse_changed(changed)  # tasks that do other parts may have listed other inputs
        if not tables:
            self.out.remove_parts()  # so that mended files are looked at again
            raise nothing_made(self.out, self.sources, left_out, self._tracebacks)
        inputs = self._text(_may_pass(left_out))
        head = self.head | {"extraction": self.head["extraction"] | {"inputs": inputs}}
        further: dict[str, Any] = dict(versions)
        if duplicates and not self.settings.leaves_out_duplicates:
            further["duplicates"] = {self.sources[own].name: self.sources[first].name
                                     for own, (first, _) in duplicates.items()}  # fmt: skip
        return tars, publish_data_set(
            self.out, Contents(head, tables, self.made_with.codebooks, left_out, len(self.sources), further)
        )

    def _duplicates(self) -> dict[int, tuple[int, bytes]]:
        """Inputs that have the bytes, and the start, of one before them: number, and that one's, and the digest."""
        first: dict[tuple[bytes, float | None], int] = {}
        found = {}
        for number in range(self.count):
            begin = number * self.size
            places = np.flatnonzero(self.shares_size[begin : begin + self.size]).tolist()
            part = read_part(self.out, number) if places else {}
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
                digest = digest_of(source.at) if text is None else bytes.fromhex(text)
                if digest is not None and (same := first.setdefault((digest, source.start), begin + place)) != (
                    begin + place
                ):
                    found[begin + place] = same, digest
        return found

    def _duplicate(self, number: int, first: int, digest: bytes) -> Result:
        source, other = self.sources[number], self.sources[first]
        labels = "" if other.labels == source.labels else f", whose labels are {', '.join(other.labels) or 'none'}"
        return Result([], [Left(source.name, "duplicate", f"has the very bytes of {other.name}{labels}")], digest)


def _may_pass(left_out: Iterable[Left]) -> dict[str, str]:
    """Names of the inputs that are left out for a reason that may be gone later, each with its reason."""
    return {left.source: left.reason for left in left_out if left.may_pass}


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
