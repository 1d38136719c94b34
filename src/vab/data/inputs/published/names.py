"""What the files of a data set are called, and which entry of its list each of them is."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vab.spec import UserError

# An id of YouTube has 11 characters, of which any may be "_", "-" or a first Y: the place says where it ends, and no
# name can be read in two ways.
_NAME = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?)(?:[_-](\d+(?:\.\d+)?))?)?")
_LONGEST = 1000
"""Numbers of a start and an end that are as far apart are milliseconds: no list has a segment of so many seconds."""
FORMS = "ID, YID, ID_START or ID_START_END, in seconds or milliseconds, such as ID_000030.mp4 or YID_30.000_40.000.wav"


class Name(NamedTuple):
    """What a file's name says."""

    id: str
    """Of YouTube, 11 characters."""
    starts: tuple[int, ...] = ()
    """ms, where the file may start in the video, the likelier first: a number alone may be of seconds or of
    milliseconds. Empty where the name does not tell."""


def parse_name(stem: str) -> Name | None:
    """Read the name of a file, without its suffix, as downloaders of AudioSet and VGGSound write it.

    ``ID``, ``YID`` (AudioSet's way to begin with a letter), ``ID_000030``, ``ID_30``, ``ID_30.0``, ``ID_30_40``,
    ``ID_30-40``, ``ID_30000_40000`` (milliseconds, as nothing lasts 10,000 s), each also with Y.

    Returns:
        None if it is none of these.
    """
    found = _NAME.fullmatch(stem)
    if found is None:
        return None
    name, start, end = found.groups()
    if start is None:
        return Name(name)
    seconds = round(float(start) * 1000)
    if end is not None:
        is_milliseconds = float(end) - float(start) >= _LONGEST
        return Name(name, (round(float(start)),) if is_milliseconds else (seconds,))
    return Name(name, (seconds,) if "." in start else (seconds, int(start)))


class Excerpts:
    """Entries of a list, each an excerpt of a video; in columns, as there can be millions."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        """Of the video."""
        self.starts = array("q")
        """ms."""
        self.labels: list[tuple[str, ...]] = []
        self.parts: list[str] = []
        """Train, test, ..."""
        self.repeats = 0
        """Entries that were there before, with the same labels."""
        self._first: dict[str, int] = {}
        self._all: dict[str, list[int]] = {}  # of videos with several entries

    def add(self, video: str, start: int, labels: tuple[str, ...], part: str) -> None:
        """Append an entry, unless it is there.

        Raises:
            ValueError: If it is there with other labels.
        """
        number, earlier = len(self.ids), self.of(video)
        for other in earlier:
            if (self.starts[other], self.parts[other]) == (start, part):
                if self.labels[other] != labels:
                    raise ValueError(f"{video} at {start / 1000:g} s is there before, with {self.labels[other]}")
                self.repeats += 1
                return
        if earlier:
            self._all.setdefault(video, list(earlier)).append(number)
        else:
            self._first[video] = number
        self.ids.append(video)
        self.starts.append(start)
        self.labels.append(labels)
        self.parts.append(part)

    def of(self, video: str) -> list[int]:
        """Numbers of a video's entries."""
        if video in self._all:
            return self._all[video]
        return [self._first[video]] if video in self._first else []

    def is_only(self, number: int) -> bool:
        """Whether the video of an entry has no other one."""
        return self.ids[number] not in self._all

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Found:
    """Which files a list's entries are in."""

    files: list[str | None]
    """Of each entry."""
    starts_in_file: list[bool]
    """Of each entry, whether its file is a whole video, of which it is a part."""
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Files that are of no entry: how many, and one of them, by why."""


UNNAMED = f"not named as {FORMS}"
UNLISTED = "of nothing that is listed"
AMBIGUOUS = "of videos with several entries: name them ID_START, or say --whole_videos true"


def find_files(entries: Excerpts, files: Iterable[str], whole_videos: bool = False) -> Found:
    """Find the entries of a list among files by their names.

    A name with a start is the excerpt that starts there. One with the id alone is the only excerpt of its video, or,
    with ``whole_videos``, the video that all of its excerpts are parts of.

    Args:
        entries: Of the list.
        files: As paths with ``/``.
        whole_videos: Files called by the id alone are whole videos.

    Raises:
        UserError: If several files are of one entry.
    """
    found = Found([None] * len(entries), [False] * len(entries))
    twice: dict[int, str] = {}
    for file in files:
        name = parse_name(os.path.splitext(file.rpartition("/")[2])[0])
        numbers = [] if name is None else entries.of(name.id)
        chosen: list[int] = []
        if name is None:
            _count(found.unused, UNNAMED, file)
        elif not numbers:
            _count(found.unused, UNLISTED, file)
        elif name.starts:
            readings = ([number for number in numbers if entries.starts[number] == start] for start in name.starts)
            chosen = next(filter(None, readings), [])
            if not chosen:
                _count(found.unused, UNLISTED, file)
        elif whole_videos or len(numbers) == 1:
            chosen = numbers
        else:
            _count(found.unused, AMBIGUOUS, file)
        for number in chosen:
            if found.files[number] is not None:
                twice.setdefault(number, file)
            else:
                found.files[number] = file
                found.starts_in_file[number] = whole_videos and name is not None and not name.starts
    if twice:
        number, other = next(iter(twice.items()))
        raise UserError(
            f"{len(twice)} listed segments have more than one file, such as {found.files[number]} and {other}: keep"
            " one of each, or give a folder that has one"
        )
    return found


def by_stem(files: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """Files by their names without folders and suffix, those that are wanted.

    Raises:
        UserError: If several have one name.
    """
    found: dict[str, str] = {}
    twice: dict[str, str] = {}
    for file in files:
        stem = os.path.splitext(file.rpartition("/")[2])[0]
        if stem in wanted and found.setdefault(stem, file) != file:
            twice.setdefault(stem, file)
    if twice:
        stem, other = next(iter(twice.items()))
        raise UserError(
            f"{len(twice)} listed names have more than one file, such as {found[stem]} and {other}: keep one of each,"
            " or give a folder that has one"
        )
    return found


def _count(counts: dict[str, tuple[int, str]], why: str, file: str) -> None:
    number, example = counts.get(why, (0, file))
    counts[why] = (number + 1, example)
