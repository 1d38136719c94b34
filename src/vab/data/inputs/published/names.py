"""Names of the files of AudioSet and VGGSound, and the entry of the list that each file belongs to."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vab.data.inputs.published.rows import refuse_repeated, stem_of

# A YouTube id has 11 characters, of which any may be "_", "-" or a first Y: it ends after 11 characters, and no name
# can be read in two ways.
_NAME = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?)(?:[_-](\d+(?:\.\d+)?))?)?")
_LONGEST = 1000
"""A start and an end that differ by this number or more are milliseconds: no list has a segment of 1000 seconds."""
FORMS = "ID, YID, ID_START or ID_START_END, in seconds or milliseconds, such as ID_000030.mp4 or YID_30.000_40.000.wav"


class Name(NamedTuple):
    """What a file's name states."""

    id: str
    """YouTube id, 11 characters."""
    starts: tuple[int, ...] = ()
    """ms, possible starts of the file in the video, the likelier first: a number alone may be seconds or milliseconds.
    Empty if the name states no start."""


def parse_name(stem: str) -> Name | None:
    """Read the name of a file, without its suffix, as downloaders of AudioSet and VGGSound write it.

    ``ID``, ``YID`` (AudioSet's way to begin with a letter), ``ID_000030``, ``ID_30``, ``ID_30.0``, ``ID_30_40``,
    ``ID_30-40``, ``ID_30000_40000`` (milliseconds, because no segment lasts 10,000 s), each also with Y.

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
        return Name(name, (round(float(start)) if float(end) - float(start) >= _LONGEST else seconds,))
    return Name(name, (seconds,) if "." in start else (seconds, int(start)))


class Excerpts:
    """Entries of a list, each an excerpt of a video; in columns, because there can be millions.

    Attributes:
        ids: YouTube ids.
        starts: ms.
        labels: Classes.
        parts: Train, test, ...
        repeats: Number of entries that repeat an earlier one, with the same labels.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.starts = array("q")
        self.labels: list[tuple[str, ...]] = []
        self.parts: list[str] = []
        self.repeats = 0
        self._numbers: dict[str, tuple[int, ...]] = {}  # by video
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal labels are one object

    def add(self, video: str, start: int, labels: tuple[str, ...], part: str) -> None:
        """Append an entry, unless it repeats an earlier one.

        Raises:
            ValueError: If an earlier one has other labels.
        """
        earlier = self.of(video)
        for other in earlier:
            if (self.starts[other], self.parts[other]) == (start, part):
                if self.labels[other] != labels:
                    raise ValueError(f"{video} at {start / 1000:g} s is there before, with {self.labels[other]}")
                self.repeats += 1
                return
        self._numbers[video] = (*earlier, len(self.ids))
        self.ids.append(video)
        self.starts.append(start)
        self.labels.append(self._known.setdefault(labels, labels))
        self.parts.append(part)

    def of(self, video: str) -> tuple[int, ...]:
        """Numbers of a video's entries."""
        return self._numbers.get(video, ())

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Found:
    """The files of a list's entries."""

    files: list[str | None]
    """For each entry."""
    starts_in_file: list[bool]
    """For each entry, whether its file is a whole video that contains the excerpt."""
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number of the files without an entry and an example, by reason."""


UNNAMED = f"not named as {FORMS}"
UNLISTED = "of nothing that is listed"
AMBIGUOUS = "of videos with several entries: name them ID_START, or say --whole_videos true"


def find_files(entries: Excerpts, files: Iterable[str], whole_videos: bool = False) -> Found:
    """Find the files of a list's entries by their names.

    A name with a start is the excerpt that starts there. A name without a start is the only excerpt of its video, or,
    with ``whole_videos``, the video that contains all of its excerpts.

    Args:
        entries: Entries of the list.
        files: Paths with ``/``.
        whole_videos: Whether files named by the id alone are whole videos.

    Raises:
        UserError: If several files belong to one entry.
    """
    found = Found([None] * len(entries), [False] * len(entries))
    repeated: dict[int, tuple[str, str]] = {}
    for file in files:
        name = parse_name(stem_of(file))
        numbers = () if name is None else entries.of(name.id)
        if name is not None and name.starts:
            readings = (tuple(each for each in numbers if entries.starts[each] == start) for start in name.starts)
            numbers = next(filter(None, readings), ())
        elif len(numbers) > 1 and not whole_videos:
            numbers = ()
        if name is None or not numbers:
            reason = UNNAMED if name is None else UNLISTED if name.starts or not entries.of(name.id) else AMBIGUOUS
            count, example = found.unused.get(reason, (0, file))
            found.unused[reason] = (count + 1, example)
            continue
        for number in numbers:
            if (first := found.files[number]) is not None:
                repeated.setdefault(number, (first, file))
                continue
            found.files[number] = file
            found.starts_in_file[number] = whole_videos and not name.starts
    refuse_repeated("segments", repeated.values())
    return found
