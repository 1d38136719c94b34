"""The folder that a data set is written to."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from vab.data.addresses import AddressError, Entry, Remote, is_address
from vab.data.shards.format import HEAD, PARTS, rows_name, shard_name
from vab.files import explain_full_disk, own_folder, sweep, sync_folder
from vab.spec import UserError

_STORES = ("s3", "gs", "gcs", "az", "abfs", "hf", "memory")
"""Schemes of addresses that can be written to: a file appears there whole or not at all."""
_THREADS = 16
"""Files that are fetched at a time: each of a part's files is small, and a request takes longer than its bytes."""
_LATEST = 2**63 - 1
"""ns. The time of a file whose store does not tell it: no input is newer."""
_PART = re.compile(r"(\d{6,})\.json")
_NOTE = re.compile(r"head\.json|\d{6,}(-\d+)?\.(json|npy)")
_OWN_TAR = re.compile(r"shard-\d{6,}(-\d+)?\.tar")


class OutFolder:
    """The folder that a data set is written to. Files appear there whole, in a given order.

    Several processes may write to one folder: each makes its files in a work folder of its own.

    Args:
        place: The folder; it is made when the first file is published.

    Raises:
        UserError: If it is an address, or on a drive of another system.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        if is_address(self.place) or (os.name != "nt" and re.match(r"[A-Za-z]:[/\\]", self.place)):
            raise UserError(f"{self.place} is not a folder of this machine: give one, and upload it afterwards")
        self._folder = Path(place)

    @staticmethod
    def at(place: str | Path) -> OutFolder:
        """A folder of this machine, or at an address.

        Raises:
            UserError: If there is no writing to such an address.
        """
        place = str(place).removeprefix("file://")
        return _OutAddress(place) if is_address(place) else OutFolder(place)

    def __str__(self) -> str:
        return self.place

    def refresh(self) -> None:
        """Look again for what other processes have written."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._folder / name).exists()

    def is_file(self, name: str) -> bool:
        """Whether there is such a file, and it is no folder."""
        return (self._folder / name).is_file()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        return (self._folder / name).stat().st_size if self.has(name) else None

    def time(self, name: str) -> int:
        """When a file was written, ns."""
        return (self._folder / name).stat().st_mtime_ns

    def path(self, name: str) -> Path:
        """A file of this machine with the content of ``name``; not to be changed."""
        return self._folder / name

    def prefetch(self, names: Iterable[str]) -> None:
        """Fetch files that ``path`` will be asked for, many at a time. Those of this machine are there."""

    def names(self, below: str = "") -> list[str]:
        """Names of what is in the folder, or in a folder below it, sorted."""
        folder = self._folder / below
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def parts(self) -> set[int]:
        """Numbers of the parts that are done now."""
        self.refresh()
        return {int(found[1]) for name in self.names(PARTS) if (found := _PART.fullmatch(name))}

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder for files in the making; what is not published goes with it."""
        disk = self.scratch()
        try:
            disk.mkdir(parents=True, exist_ok=True)
            work = own_folder(disk)
            (work / PARTS).mkdir()
        except OSError as error:
            explained = explain_full_disk(error, disk, 0)
            if isinstance(explained, UserError):
                raise explained from error
            raise UserError(f"cannot write to {disk}: {error.strerror}; give another folder") from error
        try:
            yield work
        except UserError as error:
            raise self.explain(error, work) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def scratch(self) -> Path:
        """The folder of this machine for temporary files."""
        return self._folder

    def explain(self, error: UserError, work: Path) -> UserError:
        """An error about a file in a work folder, as one about the folder that this is in."""
        disk = f"{self.scratch()}"
        return UserError(str(error).replace(f"{work / PARTS}", disk).replace(f"{work}", disk))

    def publish(self, work: Path, names: Sequence[str]) -> None:
        """Move files from a work folder to the data set's, one after the other."""
        for name in names:
            (self._folder / name).parent.mkdir(exist_ok=True)
            (work / name).replace(self._folder / name)
        for folder in {(self._folder / name).parent for name in names}:
            sync_folder(folder)

    def remove(self, *names: str) -> None:
        """Delete files, if they are there."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed writers left half made, and nothing of writers at work."""
        sweep(self.scratch())

    def remove_versions(self, number: int, version: int) -> None:
        """Delete the files of a part's earlier versions."""
        for old in range(version):
            self.remove(shard_name(number, old), rows_name(number, old))

    def own_tars(self) -> list[str]:
        """Tars with names of parts, sorted."""
        return [name for name in self.names() if _OWN_TAR.fullmatch(name)]

    def foreign_tars(self) -> list[str]:
        """Tars that no writer of a data set has put there."""
        tars = [name for name in self.names() if name.endswith(".tar")]
        return [name for name in tars if not self.has(PARTS) or not _OWN_TAR.fullmatch(name)]

    def remove_parts(self) -> None:
        """Delete the record of what is done, and nothing else that is there."""
        names = [f"{PARTS}/{name}" for name in self.names(PARTS) if _NOTE.fullmatch(name)]
        self.remove(*(name for name in names if name != HEAD))
        self.remove(HEAD)  # what says that the folder is an extraction's comes last
        self.sweep()
        with suppress(OSError):  # it is not there, or other things are in it
            (self._folder / PARTS).rmdir()


class _OutAddress(OutFolder):
    """A folder at an address. Files are made, and read again, in temporary folders of this machine.

    What is there is listed at once, 1000 files with each request, and known until ``refresh`` or a change.
    """

    def __init__(self, place: str) -> None:
        self._remote = Remote(place)
        if place.partition("://")[0] not in _STORES:
            raise UserError(
                f"{self._remote.shown}: a data set is written to a folder of this machine or to an object store"
                f" ({', '.join(f'{scheme}://' for scheme in _STORES)})"
            )
        self.place = self._remote.shown
        self._entries: dict[str, Entry] | None = None
        self._fetched: dict[str, Entry] = {}  # what the copies in the temporary folder were made of

    def refresh(self) -> None:
        self._entries = None

    def _all(self) -> dict[str, Entry]:
        if self._entries is None:
            self._entries = self._remote.entries()
        return self._entries

    def has(self, name: str) -> bool:
        return self.is_file(name) or bool(self.names(name))

    def is_file(self, name: str) -> bool:
        return name in self._all()

    def size(self, name: str) -> int | None:
        return self._all()[name].size if name in self._all() else None

    def time(self, name: str) -> int:
        return self._all()[name].time or _LATEST

    @cached_property
    def _folder(self) -> Path:  # type: ignore[override]
        folder = own_folder(self.scratch())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def path(self, name: str) -> Path:
        copy, tried = self._folder / name, None
        while True:
            entry = self._all().get(name)
            if entry is None:
                raise FileNotFoundError(errno.ENOENT, "there is no such file", f"{self}/{name}")
            if self._fetched.get(name) == entry:
                return copy
            copy.parent.mkdir(exist_ok=True)
            copy.unlink(missing_ok=True)
            try:
                self._remote.fetch(name, entry.size or 0, copy)
                self._fetched[name] = entry
            except AddressError as error:
                self.refresh()  # another task may have written it again since it was listed
                if self._all().get(name) == entry or tried is not None:
                    raise UserError(
                        f"{self}/{name} {error}: run the same command again; what is done is kept"
                    ) from error
                tried = entry
            except OSError as error:
                raise explain_full_disk(error, self.scratch(), entry.size or 0) from error

    def prefetch(self, names: Iterable[str]) -> None:
        def fetch(name: str) -> None:
            with suppress(FileNotFoundError):  # whoever needs it will say so
                self.path(name)

        self._all(), self._folder  # made once, before the threads
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(fetch, names))

    def names(self, below: str = "") -> list[str]:
        start = f"{below}/" if below else ""
        return sorted({name.removeprefix(start).partition("/")[0] for name in self._all() if name.startswith(start)})

    def scratch(self) -> Path:
        return Path(tempfile.gettempdir())

    def publish(self, work: Path, names: Sequence[str]) -> None:
        for name in names:
            self._remote.write(work / name, name)
            (work / name).unlink()
        self.refresh()

    def remove(self, *names: str) -> None:
        for name in names:
            if self._all().pop(name, None) is not None:  # some stores permit no deleting
                self._remote.remove(name)
