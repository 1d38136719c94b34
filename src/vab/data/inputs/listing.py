"""What to extract: a folder of media files, or a CSV that names them."""

from __future__ import annotations

import difflib
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, overload
from urllib.parse import quote

import numpy as np

from vab import UserError
from vab.data.addresses import Entry, Remote, RemoteFile, is_address, without_secrets
from vab.data.inputs.tables import Table
from vab.files import as_utf8

VIDEO_SUFFIXES = frozenset((
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".vob", ".webm", ".wmv",
))  # fmt: skip
"""Files of a folder that are taken for video."""
MEDIA_SUFFIXES = VIDEO_SUFFIXES | {
    ".aac", ".aif", ".aiff", ".flac", ".m4a", ".m4b", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma",
}  # fmt: skip
"""Files of a folder that are taken for media. Those with sound alone are, too: they are kept or reported, as asked."""
_LISTS = (".csv", ".tsv")
_LATEST = 9_999_999
"""s. Four months; a later start is a mistake."""
_COLUMNS = ("file", "labels", "start", "id")
"""Of a CSV, those that are read."""
_MISSPELT = 0.75
"""Likeness to a column's name, as difflib counts it, from which on another name is taken for a slip."""
_COMPANIONS = frozenset((".csv", ".json", ".md", ".txt"))
"""Files that often lie beside media: they are counted, not named."""
_HIDDEN = "hidden"
_NAMED = 3
"""Files that are named of those with a suffix that is not media's."""


class Source(NamedTuple):
    """One input of an extraction."""

    root: str
    """Folder that ``file`` is in, or its address."""
    file: str
    """As listed: a path from ``root``, an absolute path or an address."""
    start: float | None = None
    """s, where its only segment starts; None to cut the whole file into segments."""
    labels: tuple[str, ...] = ()
    """Names of its classes."""
    given_id: str = ""
    """What its records are called, where that is not the file without its suffix."""
    size: int | None = None
    """Bytes, where the listing of an address gave them."""
    time: int = 0
    """When the file was changed last, ns, where the listing of an address said so; else 0."""

    @property
    def name(self) -> str:
        """Unique; how manifests and reports call it: the file as listed, with ``@start`` where a start is given.

        Of a web address without password and query, which may be secrets; where it has a query, ``#id`` follows if an
        id is given.
        """
        file = self._bare
        if self.given_id and _has_query(self.file):
            file += f"#{self.given_id}"
        return file if self.start is None else f"{file}@{self.start:.10g}"

    @property
    def _bare(self) -> str:
        """The file as listed, without the secrets of an address."""
        return without_secrets(self.file) if is_address(self.file) else self.file

    @property
    def location(self) -> str:
        """Where the file is: a path of this machine, or an address."""
        if is_address(self.file):
            return self.file
        if not is_address(self.root):
            return os.path.join(self.root, self.file)
        if not self.root.startswith(("http://", "https://")):
            return f"{self.root}/{self.file}"
        folder, mark, query = self.root.partition("?")
        return f"{folder}/{quote(as_utf8(self.file))}{mark}{query}"

    @property
    def shown(self) -> str:
        """``location`` for messages, without password and query."""
        return without_secrets(self.location)

    @property
    def at(self) -> Path | RemoteFile:
        """The file, for whoever reads it."""
        if is_address(self.file):
            return RemoteFile(self.file, "", self.size)
        return RemoteFile(self.root, self.file, self.size) if is_address(self.root) else Path(self.root, self.file)

    @property
    def path(self) -> Path:
        """Where the file is on this machine.

        Raises:
            UserError: If it is at an address.
        """
        if is_address(self.location):
            root = self.root.partition("?")[0]
            raise UserError(
                f"{self._bare} of {root} is not on this machine: copy the media here, then give a folder or a .csv of "
                "this machine"
            )
        return Path(self.root, self.file)

    @property
    def id(self) -> str:
        """What its records are called: the ``id`` column, or the file's name in the folder without its suffix."""
        file = self._bare.partition("://")[2] or self.file
        return self.given_id or os.path.splitext(os.path.normpath(file))[0].replace(os.sep, "/")


def _has_query(file: str) -> bool:
    return file.startswith(("http://", "https://")) and "?" in file


class Ignored(NamedTuple):
    """Files of a folder that are not taken for media."""

    suffix: str
    """What their names end in, or ``hidden``."""
    files: int
    """How many."""
    such_as: list[str]
    """The first few; none of those that nobody would take for media."""


class Sources(Sequence[Source]):
    """The inputs of an extraction, in order: a hundred bytes each, as there can be millions.

    Args:
        root: Folder that their files are in, or its address.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: list[str] = []
        self._ids: list[str] = []  # the same empty text where none is given
        self._starts = array("d")  # NaN where none is given
        self._sizes = array("q")  # -1 where it is not known
        self._times = array("q")
        self.at_addresses = is_address(root)
        """Whether some may be at addresses."""
        self._label_numbers = array("l")
        self._labels: list[tuple[str, ...]] = []  # those that occur
        self._numbers: dict[tuple[str, ...], int] = {}
        self.ignored: list[Ignored] = []
        """Files of the folder that are no inputs, by suffix."""

    def add(
        self,
        file: str,
        start: float | None = None,
        labels: tuple[str, ...] = (),
        given_id: str = "",
        size: int | None = None,
        time: int = 0,
    ) -> None:
        """Append an input, as ``Source`` has it."""
        self._sizes.append(-1 if size is None else size)
        self._times.append(time)
        self.at_addresses |= is_address(file)
        self._files.append(file)
        self._ids.append(given_id)
        self._starts.append(math.nan if start is None else start)
        if labels not in self._numbers:
            self._numbers[labels] = len(self._labels)
            self._labels.append(labels)
        self._label_numbers.append(self._numbers[labels])

    @property
    def labels(self) -> set[str]:
        """All that occur."""
        return {label for labels in self._labels for label in labels}

    def relabel(self, name: Callable[[str], str]) -> None:
        """Call each label as ``name`` says."""
        self._labels = [tuple(map(name, labels)) for labels in self._labels]
        self._numbers = {labels: number for number, labels in enumerate(self._labels)}

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Source]:
        return self._between(0, len(self))

    @overload
    def __getitem__(self, number: int) -> Source: ...
    @overload
    def __getitem__(self, number: slice) -> list[Source]: ...
    def __getitem__(self, number: int | slice) -> Source | list[Source]:
        if isinstance(number, slice):
            places = range(len(self))[number]
            if places.step == 1:
                return list(self._between(places.start, places.stop))
            return [self[place] for place in places]
        place = range(len(self))[number]
        return next(self._between(place, place + 1))

    def _between(self, begin: int, end: int) -> Iterator[Source]:
        """Sources ``begin`` to ``end``, made from slices of the columns: twice as fast as one by one."""
        columns = (self._files, self._starts, self._label_numbers, self._ids, self._sizes, self._times)
        labels = self._labels
        for file, start, number, given_id, size, when in zip(*(column[begin:end] for column in columns), strict=True):
            known_start = None if start != start else start  # NaN
            yield Source(self.root, file, known_start, labels[number], given_id, None if size < 0 else size, when)


def find_sources(
    media: str | Path,
    labels_from: str = "auto",
    suffixes: frozenset[str] = MEDIA_SUFFIXES,
    root: str | Path | None = None,
) -> Sources:
    """List the inputs of an extraction in a fixed order.

    Args:
        media: A folder, searched with its subfolders (hidden ones left out) and sorted by path; or a CSV with a column
            ``file`` (relative to the CSV) and, if wanted, ``labels`` (joined by ``;``), ``start`` (s) and ``id``,
            taken in its own order. Other columns are not read, and refused where their names are slips of these; blanks
            around names and values do not count. Or a list as VGGSound's are, which begins at once:
            the file, and one label, in which a ";" is a character like any other. Either may be at an address, such as
            ``s3://bucket/videos`` or ``https://host/list.csv``, and a CSV may list addresses;
            the query of a web address is no part of names and ids.
        labels_from: ``csv``; ``folder``: the name of the folder a file is in; ``none``; or ``auto``: ``csv`` if there
            is such a column, else none.
        suffixes: Files of a folder that count; a CSV may list any.
        root: Folder that the files of a CSV are in, or its address; the CSV's own if None.

    Raises:
        UserError: If there is nothing, the CSV cannot be understood (it says which line), or an address is of an
            unknown kind, needs a package that is not installed, or cannot be read.
    """
    if labels_from not in ("auto", "csv", "folder", "none"):
        raise UserError(f"labels_from must be auto, csv, folder or none, got {labels_from!r}")
    media, root = _local(media), None if root is None else _local(root)
    if root is not None and not is_address(root) and not Path(root).is_dir():
        raise UserError(f"media_root {root}: there is no such folder")
    shown = Remote(media).shown if is_address(media) else media  # without password and query
    listed = os.path.splitext(media.partition("?")[0] if is_address(media) else media)[1].lower() in _LISTS
    if os.path.isdir(media) or (is_address(media) and not listed):
        if root is not None:
            raise UserError(f"media_root is for a CSV; {shown} is a folder")
        if labels_from == "csv":
            raise UserError(f"labels_from is csv, but {shown} is a folder: give a CSV, or labels_from folder or none")
        sources = _from_folder(media, labels_from == "folder", suffixes)
        if not sources:
            if is_address(media) and not sources.ignored:
                raise UserError(f"{shown}: there is no such folder or bucket, or nothing in it")
            kinds = " ".join(sorted(suffixes))
            raise UserError(f"no media file in {shown}: files are known by their suffix ({kinds})")
    elif listed and (is_address(media) or os.path.isfile(media)):
        sources = _from_csv(media, labels_from, root)
        if not sources:
            raise UserError(f"{shown} lists no file: it has a first line with the columns' names, and none below it")
    elif os.path.exists(media):
        raise UserError(f"{shown} is neither a folder of media files nor a .csv or .tsv that lists them")
    else:
        raise UserError(f"{shown}: there is no such folder or CSV")
    _refuse_twins(shown, sources)
    return sources


def _local(place: str | Path) -> str:
    """A path as text; an address of kind file:// as the path that it is."""
    return str(place).removeprefix("file://")


def find_ids(path: str | Path) -> Sources:
    """List recordings by their ids alone, as those of ready features, from a CSV as ``find_sources`` reads it.

    Args:
        path: With a column ``id``, or ``file``, which without its suffix is the id, or both; if wanted, ``labels``.

    Raises:
        UserError: If the CSV cannot be understood, or gives starts, which have no meaning here.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such CSV")
    sources = _from_csv(str(path), "auto", None, by_id=True)
    if not sources:
        raise UserError(f"{path} lists nothing: it has a first line with the columns' names, and none below it")
    if started := next((source for source in sources if source.start is not None), None):
        raise UserError(f"{path} gives {started.name} a start, which ready arrays do not have: leave the column out")
    _refuse_twins(path, sources)
    return sources


def _from_folder(folder: str, label_by_folder: bool, suffixes: frozenset[str]) -> Sources:
    listed: dict[str, Entry] = {}
    if is_address(folder):
        folder = folder.rstrip("/")
        listed = Remote(folder).entries()
        everything = sorted(name for name in listed if not any(part.startswith(".") for part in name.split("/")[:-1]))
    else:
        everything = sorted(_all_below(Path(folder)))
    files = _with_suffixes(everything, suffixes)
    stems = Counter(os.path.splitext(file)[0] for file in files)
    sources = Sources(folder)
    for file in files:
        parent = os.path.dirname(file)
        labels = (os.path.basename(parent),) if label_by_folder and parent else ()
        # a.mp4 and a.mkv keep their suffixes: their records need different names.
        given_id = "" if stems[os.path.splitext(file)[0]] == 1 else file
        sources.add(file, None, labels, given_id, *listed.get(file, Entry(None))[:2])
    sources.ignored = _ignored(everything, suffixes)
    return sources


def _ignored(files: Iterable[str], suffixes: frozenset[str]) -> list[Ignored]:
    """Those of some files that do not have these suffixes or are hidden."""
    names: dict[str, list[str]] = {}
    for file in files:
        suffix = _HIDDEN if os.path.basename(file).startswith(".") else os.path.splitext(file)[1].lower()
        if suffix not in suffixes:
            names.setdefault(suffix or "no suffix", []).append(file)
    unnamed = {_HIDDEN, *_COMPANIONS}
    kinds = sorted(names, key=lambda suffix: (suffix in unnamed, suffix))  # what may be media first
    return [Ignored(kind, len(names[kind]), [] if kind in unnamed else names[kind][:_NAMED]) for kind in kinds]


def files_below(folder: Path, suffixes: frozenset[str] = MEDIA_SUFFIXES) -> list[str]:
    """Files with these suffixes below a folder, as paths from it with ``/``, sorted.

    Through links to folders too, each folder once; hidden ones are left out.

    Raises:
        UserError: If a folder cannot be read: what is in it would be missing without a word.
    """
    return _with_suffixes(sorted(_all_below(folder)), suffixes)


def _with_suffixes(files: Iterable[str], suffixes: frozenset[str]) -> list[str]:
    media = (name for name in files if os.path.splitext(name)[1].lower() in suffixes)
    return [name for name in media if not os.path.basename(name).startswith(".")]


def _all_below(folder: Path) -> Iterator[str]:
    """All files, hidden ones too, but not those in hidden folders."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): allow it, or give another folder")

    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        # In an order of its own, or which of two ways to a linked folder counts would be the disk's choice.
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            place = os.path.relpath(parent, folder).replace(os.sep, "/")
            start = "" if place == "." else f"{place}/"
            yield from (start + name for name in files)


def _from_csv(path: str, labels_from: str, root: str | None, by_id: bool = False) -> Sources:
    content = None
    if is_address(path):
        place, mark, query = path.partition("?")
        folder, _, name = place.rpartition("/")
        remote = Remote(f"{folder}{mark}{query}")
        content, path = remote.read(name), f"{remote.shown}/{name}"
        root = f"{folder}{mark}{query}" if root is None else root
    root = (os.path.dirname(path) or os.curdir) if root is None else root
    table = Table(path, _COLUMNS, any_bytes=True, content=content)
    rows = iter(table)
    plain = len(table.first) == 2 and os.path.splitext(table.first[0])[1].lower() in MEDIA_SUFFIXES
    line, columns = (1, ["file", "labels"]) if plain else next(rows, (1, []))
    for name in columns:
        table.check_text(line, name)
    _check_columns(path, columns, labels_from, by_id)
    return _read_rows(table, rows, columns, labels_from, root, plain)


def _check_columns(path: str, columns: Sequence[str], labels_from: str, by_id: bool) -> None:
    needed = ("id", "file") if by_id else ("file",)
    if not {*needed} & {*columns}:
        raise UserError(
            f"{path} needs a column {' or '.join(map(repr, needed))} in its first line, got {list(columns)}"
        )
    if labels_from == "csv" and "labels" not in columns:
        raise UserError(f"{path} has no column 'labels' (joined by ;), only {columns}: add it, or labels_from none")
    if twice := [name for name, count in Counter(filter(None, columns)).items() if count > 1]:
        raise UserError(f"{path} has more than one column {twice[0]!r} in its first line: name each column once")
    for name in columns:  # what is not read for a slip in its name would be missing without a word
        meant = _meant(name)
        if meant is None or meant in columns or (meant == "labels" and labels_from in ("folder", "none")):
            continue
        way = "say labels_from none" if meant == "labels" and not by_id else "give it a name less like that"
        raise UserError(f"{path} has a column {name!r}: call it {meant!r}, or {way}")


def _meant(name: str) -> str | None:
    """The column that is read whose name one is that is written in capitals or misspelt."""
    if name.lower() in _COLUMNS:
        return name.lower()
    # Of two letters, as id, too many names are like.
    close = difflib.get_close_matches(name.lower(), ("file", "label", "labels", "start"), 1, _MISSPELT)
    return ("labels" if close[0] == "label" else close[0]) if close else None


def _read_rows(
    table: Table,
    rows: Iterable[tuple[int, list[str]]],
    columns: Sequence[str],
    labels_from: str,
    root: str,
    plain: bool,
) -> Sources:
    """A source per line."""
    sources = Sources(root)
    places = {name: columns.index(name) for name in _COLUMNS if name in columns}
    places.setdefault("file", places.get("id", 0))
    known: dict[str, tuple[str, ...]] = {}

    def cell(row: Sequence[str], name: str) -> str:
        place = places.get(name, len(row))
        return row[place] if place < len(row) else ""

    for line, row in rows:
        name = cell(row, "file")
        if not "".join(row).isascii():  # the name of a file that is there may be of any bytes, and nothing else
            is_there = not is_address(root) and os.path.lexists(os.path.join(root, name))
            for value in row:
                if not is_there or value != name:
                    table.check_text(line, value)
        if not name or len(row) > len(columns):
            wrong = "more values than columns: a label with a comma in it must stand in double quotes"
            raise table.wrong(line, wrong if name else "no file given")
        if len(row) < len(columns):  # a label that was cut is one, too, and a start that was cut off none
            raise table.wrong(
                line,
                f"{len(row)} of {len(columns)} values ({', '.join(columns)}): is the file cut? An empty value needs its"
                " comma, too",
            )
        if "\\" in name:
            name = _with_slashes(root, name)
        text = cell(row, "labels") if labels_from in ("auto", "csv") else ""
        if labels_from == "folder":
            text = os.path.basename(os.path.dirname(without_secrets(name)))
        if text not in known:
            parts = [text] if plain or labels_from == "folder" else text.split(";")
            known[text] = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
        sources.add(name, _start(cell(row, "start"), table, line), known[text], cell(row, "id"))
    return sources


def _with_slashes(root: str, name: str) -> str:
    """A path as Windows writes it, unless there is a file of this very name."""
    slashed = name.replace("\\", "/")
    if is_address(root):
        return slashed
    return name if os.path.lexists(f"{root}/{name}") or not os.path.lexists(f"{root}/{slashed}") else slashed


def _start(text: str, table: Table, line: int) -> float | None:
    if not text:
        return None
    try:
        # Where decimals have commas, spreadsheets separate cells by something else.
        start = float(text if table.delimiter == "," else text.replace(",", "."))
    except ValueError:
        start = -1.0
    if not 0 <= start <= _LATEST:
        raise table.wrong(line, f"start must be seconds, 0 to {_LATEST}, got {text!r}")
    return start


def _refuse_twins(media: str | Path, sources: Sequence[Source]) -> None:
    """Two inputs of one name, or whose records would have one key, cannot be told apart afterwards."""
    # Hashes alone are compared: a million texts would take a tenth of a gigabyte. Starts count to the millisecond, as
    # keys have it.
    columns: np.ndarray = np.fromiter(
        ((hash(source.name), hash(source.id), -1 if source.start is None else round(source.start * 1000))
         for source in sources),
        np.dtype((np.int64, 3)), len(sources),
    )  # fmt: skip
    if len(twins := _repeated(columns[:, :1])):
        twin = sources[twins[0]]
        way = "name each file and start once"
        if _has_query(twin.file):
            way = "queries do not tell files apart, give each an id"
        raise UserError(f"{media} lists {twin.name!r} more than once ({len(twins)} such): {way}")
    if len(same := _repeated(columns[:, 1:])):
        raise UserError(
            f"{media} gives the id {sources[same[0]].id!r} and one start to several inputs ({len(same)} such): ids must"
            " differ, or starts by a millisecond"
        )
    is_whole, ids = columns[:, 2] < 0, columns[:, 1]
    if len(both := np.flatnonzero(~is_whole & np.isin(ids, ids[is_whole]))):
        raise UserError(
            f"{media} lists {sources[int(both[0])].id!r} both whole and with a start: their records could be the same;"
            " give one an id"
        )


def _repeated(rows: np.ndarray) -> list[int]:
    """Where each of the rows (N, columns) that come several times comes for the second time, sorted."""
    order = np.lexsort(rows.T)  # stable
    is_like_last = np.zeros(len(rows), bool)
    is_like_last[1:] = (rows[order[1:]] == rows[order[:-1]]).all(1)
    is_second = is_like_last & ~np.concatenate([[False], is_like_last[:-1]])
    seconds: list[int] = np.sort(order[is_second]).tolist()
    return seconds
